"""The engine that runs our own parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from shardwright.checkpoint import Stateful
from shardwright.data.pack import Batch
from shardwright.kernels.linear_cross_entropy import IGNORED
from shardwright.parallel.mesh import DATA_AXES, LOSS_AXES, Mesh
from shardwright.parallel.model import ParallelModel
from shardwright.trainer.engine import Engine, StepResult, StepValues
from shardwright.trainer.optim import Optimizer


class NativeEngine(Engine):
    """Gradient accumulation over microbatches, one global norm, one decision, one update.

    Args:
        model: as `parallel.apply` left it.
        optimizer: over the model's parameters.
        mesh: live.
        device: where the model is.
        max_grad_norm: clip the gradient to this L2 norm; None: never.
    """

    def __init__(
        self, model: ParallelModel, optimizer: Optimizer, mesh: Mesh, device: torch.device, max_grad_norm: float | None
    ) -> None:
        self.model, self.optimizer, self.mesh = model, optimizer, mesh
        self._device, self._max_grad_norm = device, max_grad_norm
        self._num_skipped = torch.zeros((), dtype=torch.int64, device=device)

    def train_step(
        self, batches: Sequence[Batch], *, lr: float, before_update: Callable[[], None] | None = None
    ) -> StepResult:
        """See `Engine`."""
        result = self.backward(batches)
        norm = result.grad_norm
        skip = ~norm.isfinite()
        self._num_skipped = self._num_skipped + skip
        scale = torch.ones_like(norm) if self._max_grad_norm is None else (norm / self._max_grad_norm).clamp(min=1.0)
        if before_update is not None:
            before_update()
        self.optimizer.step(lr=lr, grad_scale=scale, skip=skip)
        self.model.refresh_copies()
        return replace(result, num_skipped=self._num_skipped)

    def backward(self, batches: Sequence[Batch]) -> StepResult:
        """Leave the gradient of a step on the model's parameters, not clipped (collective).

        The loss is a sum over tokens divided by the labels of the whole global batch.
        """
        batches = [batch.to(self._device) for batch in batches]
        num_labels = self._count_labels(batches).clamp(min=1)
        loss_sum = self.model.forward_backward([_arguments(b) for b in batches], num_labels.double().reciprocal())
        norm = self.model.gradient_norm()
        return StepResult(loss_sum=loss_sum, num_labels=num_labels, grad_norm=norm, num_skipped=self._num_skipped)

    @torch.no_grad()
    def evaluate(self, steps: Sequence[Sequence[Batch]]) -> float:
        """See `Engine`."""
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        count = torch.zeros((), dtype=torch.int64, device=self._device)
        for batches in steps:
            moved = [batch.to(self._device) for batch in batches]
            loss += self.model.evaluate([_arguments(batch) for batch in moved])
            count += self._count_labels(moved)
        return self.mesh.sum(loss, LOSS_AXES).item() / max(int(count.item()), 1)

    def read(self, result: StepResult) -> StepValues:
        """See `Engine`."""
        loss = self.mesh.sum(result.loss_sum.clone(), LOSS_AXES)
        others = result.num_labels, result.grad_norm, result.num_skipped
        loss_sum, num_labels, grad_norm, num_skipped = torch.stack((loss, *(x.double() for x in others))).tolist()
        return StepValues(loss=loss_sum / num_labels, grad_norm=grad_norm, num_skipped=int(num_skipped))

    @property
    def parts(self) -> dict[str, Stateful]:
        """See `Engine`."""
        return {"model": self.model, "optimizer": self.optimizer}

    def _count_labels(self, batches: Sequence[Batch]) -> torch.Tensor:
        count = torch.stack([(batch.labels != IGNORED).sum() for batch in batches]).sum()
        return self.mesh.sum(count, DATA_AXES)


def _arguments(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    return batch.ids, batch.positions, batch.bounds, batch.longest, batch.labels
