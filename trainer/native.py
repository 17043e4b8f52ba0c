"""The engine that runs our own parallelism."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from shardwright.checkpoint import Stateful
from shardwright.data.pack import Batch
from shardwright.kernels.linear_cross_entropy import IGNORED
from shardwright.parallel.gradients import global_norm, sum_over_data
from shardwright.parallel.mesh import Mesh
from shardwright.parallel.shard import set_gradient_sync
from shardwright.trainer.engine import Engine, StepResult, StepValues
from shardwright.trainer.optim import AdamW


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
        self, model: nn.Module, optimizer: AdamW, mesh: Mesh, device: torch.device, max_grad_norm: float | None
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._mesh, self._device, self._max_grad_norm = mesh, device, max_grad_norm
        self._num_skipped = torch.zeros((), dtype=torch.int64, device=device)

    def train_step(self, batches: Sequence[Batch], *, lr: float) -> StepResult:
        """See `Engine`. The loss is a sum over tokens divided by the labels of the whole global batch."""
        batches = [batch.to(self._device) for batch in batches]
        num_labels = self._count_labels(batches)
        loss = torch.zeros((), device=self._device)
        for i, batch in enumerate(batches):
            set_gradient_sync(self.model, enabled=i == len(batches) - 1)
            part = self._summed_loss(batch) / num_labels
            part.backward()
            loss += part.detach()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = global_norm(gradients)
        skip = ~norm.isfinite()
        self._num_skipped += skip
        scale = torch.ones_like(norm) if self._max_grad_norm is None else (norm / self._max_grad_norm).clamp(min=1.0)
        self.optimizer.step(lr=lr, grad_scale=scale, skip=skip)
        return StepResult(loss=loss, grad_norm=norm, num_skipped=self._num_skipped.clone())

    @torch.no_grad()
    def evaluate(self, steps: Sequence[Sequence[Batch]]) -> float:
        """See `Engine`."""
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        for batch in (batch.to(self._device) for batches in steps for batch in batches):
            totals[0] += self._summed_loss(batch)
            totals[1] += (batch.labels != IGNORED).sum()
        loss, count = sum_over_data(self._mesh, totals).tolist()
        return loss / max(count, 1.0)

    def read(self, result: StepResult) -> StepValues:
        """See `Engine`."""
        loss = sum_over_data(self._mesh, result.loss.double().reshape(1))
        values = torch.cat((loss, torch.stack((result.grad_norm, result.num_skipped)).double())).tolist()
        return StepValues(loss=values[0], grad_norm=values[1], num_skipped=int(values[2]))

    @property
    def parts(self) -> dict[str, Stateful]:
        """See `Engine`."""
        return {"model": self.model, "optimizer": self.optimizer}

    def _summed_loss(self, batch: Batch) -> torch.Tensor:
        return self.model(batch.ids, batch.positions, batch.bounds, batch.longest, batch.labels)

    def _count_labels(self, batches: Sequence[Batch]) -> torch.Tensor:
        count = torch.stack([(batch.labels != IGNORED).sum() for batch in batches]).sum()
        return sum_over_data(self._mesh, count).clamp(min=1)
