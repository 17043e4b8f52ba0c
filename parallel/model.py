"""A model as one process of a layout holds it: one or more stages of it, run by an executor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shardwright.parallel.context import Mode, take_local
from shardwright.parallel.gradients import global_norm, local, sum_over_tensor
from shardwright.parallel.mesh import Mesh, make_group
from shardwright.parallel.pipeline.execute import Executor, Microbatch
from shardwright.parallel.shard import free_weights


class ParallelModel:
    """Forward, backward and the gradient of a model, whatever its layout. Made by `apply`.

    Args:
        stages: stage number -> module, in order; the plain model itself where there is one stage.
        executor: over these stages.
        mesh: live.
        context_mode: how sequences are split over the context axis.
        tied: names of the parameters that the first and the last of several stages both have.
        ends: ranks along the pipeline of the first and the last stage.
    """

    def __init__(
        self,
        stages: dict[int, nn.Module],
        executor: Executor,
        mesh: Mesh,
        *,
        context_mode: Mode,
        tied: Sequence[str],
        ends: tuple[int, int],
    ) -> None:
        self.stages, self.executor = stages, executor
        self._mesh = mesh
        self._context_mode: Mode = context_mode
        here = mesh.coordinate("pipeline")
        same_rank = ends[0] == ends[1]
        self._copies: dict[str, nn.Parameter] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        for stage in stages.values():
            for name, parameter in stage.named_parameters():
                (self._copies if name in self._parameters else self._parameters)[name] = parameter
        self._shared = [] if same_rank else [name for name in tied if name in self._parameters]
        self._counted_elsewhere = set(self._shared) if here == ends[1] else set()
        self._tied_group = _group_along_pipeline(mesh, ends) if self._shared else None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this process's parameters under their names in the plain model, each once."""
        yield from self._parameters.items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield this process's parameters."""
        yield from self._parameters.values()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return parameters and buffers of all stages by name, sharing memory."""
        state: dict[str, torch.Tensor] = {}
        for stage in self.stages.values():
            state = stage.state_dict() | state
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the tensors of `state_dict` back, filled in place."""
        self.refresh_copies()

    def forward_backward(self, microbatches: Sequence[Microbatch], grad_scale: torch.Tensor) -> torch.Tensor:
        """Leave the whole step's gradient on the parameters (collective).

        Args:
            microbatches: arguments of the plain model's forward; matrices among them are [B, T] and are split over the
                context axis.
            grad_scale: float64 scalar that the summed loss is multiplied with.

        Returns:
            This process's part of the summed loss (float64 scalar); the parts over `LOSS_AXES` add up.
        """
        loss = self.executor.run([self._take_local(m) for m in microbatches], grad_scale)
        for name in self._shared:
            dist.all_reduce(local(self._gradient(name)), group=self._tied_group)
        for name, copy in self._copies.items():
            if copy.grad is not None:
                local(self._gradient(name)).add_(local(copy.grad))
                copy.grad = None
        sum_over_tensor(self.parameters())
        return loss

    def evaluate(self, microbatches: Sequence[Microbatch]) -> torch.Tensor:
        """Return this process's part of the summed loss, without gradients (collective)."""
        loss = self.executor.evaluate([self._take_local(m) for m in microbatches])
        for stage in self.stages.values():
            free_weights(stage)
        return loss

    def gradient_norm(self) -> torch.Tensor:
        """Return the L2 norm of the gradient of the whole model (float32 scalar; collective)."""
        counted = [p.grad for name, p in self._parameters.items() if name not in self._counted_elsewhere]
        norm = global_norm(gradient for gradient in counted if gradient is not None)
        if self._mesh.degrees["pipeline"] == 1:
            return norm
        return self._mesh.sum(norm.square(), ["pipeline"]).sqrt()

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Copy tied parameters to the second stage of this process that has them. Call after every update."""
        for name, copy in self._copies.items():
            local(copy).copy_(local(self._parameters[name]))

    def _gradient(self, name: str) -> torch.Tensor:
        gradient = self._parameters[name].grad
        assert gradient is not None
        return gradient

    def _take_local(self, microbatch: Microbatch) -> Microbatch:
        degree, rank = self._mesh.degrees["context"], self._mesh.coordinate("context")
        if degree == 1:
            return microbatch
        return tuple(
            take_local(x, self._context_mode, degree, rank) if isinstance(x, torch.Tensor) and x.ndim == 2 else x
            for x in microbatch
        )


def _group_along_pipeline(mesh: Mesh, ends: tuple[int, int]) -> dist.ProcessGroup:
    ranks = dist.get_process_group_ranks(mesh.get_group("pipeline"))
    return make_group([ranks[end] for end in ends], "tied")
