"""What owns everything between a batch and new weights."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from shardwright.checkpoint import Stateful
from shardwright.data.pack import Batch


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step left on the device; reading it is the engine's `read`.

    Attributes:
        loss_sum: this process's part of the loss in nats, summed over tokens (float64); the parts add up.
        num_labels: predicted tokens of the global batch.
        grad_norm: L2 norm of the whole gradient before clipping.
        num_skipped: steps not applied so far because their gradient was not finite.
    """

    loss_sum: torch.Tensor
    num_labels: torch.Tensor
    grad_norm: torch.Tensor
    num_skipped: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """The numbers of a `StepResult`, the same on all processes."""

    loss: float
    grad_norm: float
    num_skipped: int


class Engine(abc.ABC):
    """Owns model parts, optimizer and their communication; knows no steps, files or loggers."""

    @abc.abstractmethod
    def train_step(
        self, batches: Sequence[Batch], *, lr: float, before_update: Callable[[], None] | None = None
    ) -> StepResult:
        """Update the weights from this process's microbatches of one global batch (collective; no host sync).

        A step whose gradient is not finite changes nothing, on all processes alike.

        Args:
            batches: microbatches.
            lr: learning rate.
            before_update: called when the gradient is under way and nothing that a checkpoint holds has changed yet.
        """

    @abc.abstractmethod
    def evaluate(self, steps: Sequence[Sequence[Batch]]) -> float:
        """Return the mean loss in nats per token over global batches (collective)."""

    @abc.abstractmethod
    def read(self, result: StepResult) -> StepValues:
        """Wait for a step and return its numbers (collective: one reduction, one host read)."""

    @property
    @abc.abstractmethod
    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint must hold to go on from here."""
