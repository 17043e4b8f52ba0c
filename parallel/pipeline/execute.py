"""Runs a rank's row of a schedule: computes its actions in order, with sends and receives beside them.

Every (direction, kind of tensor) between two ranks is a channel of its own, so that a forward never waits for a
gradient on the wire (MegaScale, arXiv 2402.15627, section 3.2). A send starts when its tensor exists and is never
waited for before the end of the step; the receive for an action is posted while the action before it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import get_gradient_edge

from shardwright.parallel.mesh import make_group
from shardwright.parallel.pipeline.schedule import Action, Schedule
from shardwright.parallel.products import WeightGradients
from shardwright.parallel.shard import accumulate_gradients, expect_backward, reduce_gradients

ACTIVATION, GRADIENT = "activation", "gradient"
Microbatch = tuple[Any, ...]


class Channels:
    """Point-to-point transfers between the ranks of a pipeline, one process group per kind and direction.

    Args:
        group: the pipeline's processes.
        device: of the tensors.
        edges: (source rank, destination rank, kind) of every transfer that will occur.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, edges: Sequence[tuple[int, int, str]]) -> None:
        ranks = dist.get_process_group_ranks(group)
        self._groups = {
            (kind, up): make_group(ranks, f"pipeline {kind} {'up' if up else 'down'}")
            for kind in (ACTIVATION, GRADIENT)
            for up in (False, True)
        }
        self._rank, self._device = group.rank(), device
        for source, target, kind in sorted(set(edges)):  # in one order everywhere: a first contact blocks
            probe = torch.zeros(1, device=device)
            if self._rank == source:
                self.send(probe, target, kind).wait()
            elif self._rank == target:
                self.receive(probe, source, kind).wait()

    def send(self, tensor: torch.Tensor, target: int, kind: str) -> dist.Work:
        """Start to send."""
        work = dist.isend(tensor, group=self._groups[kind, target > self._rank], group_dst=target)
        assert work is not None
        return work

    def receive(self, tensor: torch.Tensor, source: int, kind: str) -> dist.Work:
        """Start to fill a tensor."""
        work = dist.irecv(tensor, group=self._groups[kind, self._rank > source], group_src=source)
        assert work is not None
        return work


@dataclass
class _Step:
    """What is under way in one step: saved ends of the graphs, tensors handed over, and transfers."""

    microbatches: Sequence[Microbatch]
    loss: torch.Tensor
    graphs: dict[tuple[int, int], tuple[Any, Any]] = field(default_factory=dict)
    arrived: dict[tuple[str, int, int], torch.Tensor] = field(default_factory=dict)
    expected: dict[tuple[str, int, int], tuple[torch.Tensor, dist.Work]] = field(default_factory=dict)
    sent: list[tuple[torch.Tensor, dist.Work]] = field(default_factory=list)
    deferred: dict[tuple[int, int], list[Callable[[], None]]] = field(default_factory=dict)


class Executor:
    """Executes a schedule on the stages of this rank.

    Args:
        schedule: checked.
        rank: this process's place along the pipeline.
        stages: stage number -> module; takes ids or hidden states and the other arguments, returns hidden states, or
            from the last stage the summed loss.
        gradients: what the stages' products leave their weights' gradients with.
        hidden: makes an empty tensor for the hidden states of a microbatch.
        channels: to the other ranks; None if there are none.
        free_weights: free a stage's gathered weights after each backward (ZeRO-3 form).
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        stages: Mapping[int, nn.Module],
        *,
        gradients: WeightGradients,
        hidden: Callable[[Microbatch], torch.Tensor],
        channels: Channels | None,
        free_weights: bool,
    ) -> None:
        self.schedule, self._rank, self._stages = schedule, rank, stages
        self._gradients, self._hidden, self._channels, self._free = gradients, hidden, channels, free_weights
        self._last_stage = schedule.num_stages - 1
        actions = schedule.actions[rank]
        self._final = {a.stage: i for i, a in enumerate(actions) if a.kind in "BW"}
        self.observe: Callable[[Action], AbstractContextManager[Any]] = lambda action: nullcontext()

    def run(self, microbatches: Sequence[Microbatch], grad_scale: torch.Tensor) -> torch.Tensor:
        """Run forward and backward of a step; gradients are left reduced on the parameters.

        Args:
            microbatches: the arguments of the model's forward; the first is replaced from the second stage on.
            grad_scale: float64 scalar, the gradient of the step's loss with respect to the summed loss.

        Returns:
            The summed loss (float64 scalar), zero on ranks without the last stage.
        """
        step = self._begin(microbatches)
        actions = self.schedule.actions[self._rank]
        self._expect(step, actions[0])
        for index, action in enumerate(actions):
            if index + 1 < len(actions):
                self._expect(step, actions[index + 1])
            given = grad_scale if self._starts_backward(action) else self._take(step, action)
            with self.observe(action):
                self._act(step, action, given, final=index == self._final[action.stage])
        return self._finish(step)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch]) -> torch.Tensor:
        """Run forward only, over any number of microbatches; returns the summed loss as `run` does."""
        step = self._begin(microbatches)
        width = self.schedule.num_ranks
        order = sorted(
            (m // width, stage, m)
            for stage in range(self._last_stage + 1)
            for m in range(len(microbatches))
            if self.schedule.ranks[stage] == self._rank
        )
        for _, stage, m in order:
            action = Action(stage, "F", m)
            self._expect(step, action)
            self._forward(step, action, self._take(step, action))
            step.graphs.clear()
        return self._finish(step)

    def _begin(self, microbatches: Sequence[Microbatch]) -> _Step:
        return _Step(microbatches, torch.zeros((), dtype=torch.float64, device=microbatches[0][0].device))

    def _finish(self, step: _Step) -> torch.Tensor:
        for _, work in step.sent:
            work.wait()
        return step.loss

    def _act(self, step: _Step, action: Action, given: torch.Tensor | None, *, final: bool) -> None:
        stage = self._stages[action.stage]
        match action.kind:
            case "F":
                self._forward(step, action, given)
            case "B":
                expect_backward(stage, last=final, free=self._free)
                self._backward(step, action, given)
            case "I":
                expect_backward(stage, last=False, free=False)
                self._gradients.deferring = True
                self._backward(step, action, given)
                self._gradients.deferring = False
                step.deferred[action.stage, action.microbatch] = self._gradients.take()
            case "W":
                for compute in step.deferred.pop((action.stage, action.microbatch)):
                    compute()
                accumulate_gradients(stage)
                if final:
                    reduce_gradients(stage)

    def _forward(self, step: _Step, action: Action, given: torch.Tensor | None) -> None:
        stage, m = action.stage, action.microbatch
        first, *rest = step.microbatches[m]
        if given is not None:
            first = given.requires_grad_(torch.is_grad_enabled())
        out = self._stages[stage](first, *rest)
        if stage == self._last_stage:
            step.loss += out.detach()
            step.graphs[stage, m] = first, out
        else:
            step.graphs[stage, m] = first, get_gradient_edge(out) if torch.is_grad_enabled() else None
            self._give(step, ACTIVATION, stage + 1, m, out.detach())

    def _backward(self, step: _Step, action: Action, given: torch.Tensor | None) -> None:
        stage, m = action.stage, action.microbatch
        first, out = step.graphs.pop((stage, m))
        torch.autograd.backward((out,), (given,))
        if stage > 0:
            self._give(step, GRADIENT, stage - 1, m, first.grad)

    def _starts_backward(self, action: Action) -> bool:
        return action.kind in "BI" and action.stage == self._last_stage

    def _source(self, action: Action) -> tuple[str, int] | None:
        """Return the kind of tensor that an action needs from another stage, and that stage's rank."""
        if action.kind == "F" and action.stage > 0:
            return ACTIVATION, self.schedule.ranks[action.stage - 1]
        if action.kind in "BI" and action.stage < self._last_stage:
            return GRADIENT, self.schedule.ranks[action.stage + 1]
        return None

    def _expect(self, step: _Step, action: Action) -> None:
        """Post the receive that an action needs, if any."""
        source = self._source(action)
        if source is not None and source[1] != self._rank:
            assert self._channels is not None
            tensor = self._hidden(step.microbatches[action.microbatch])
            work = self._channels.receive(tensor, source[1], source[0])
            step.expected[source[0], action.stage, action.microbatch] = tensor, work

    def _take(self, step: _Step, action: Action) -> torch.Tensor | None:
        """Return what an action needs from another stage, on this rank or another; None if it needs nothing."""
        source = self._source(action)
        if source is None:
            return None
        key = source[0], action.stage, action.microbatch
        if key in step.arrived:
            return step.arrived.pop(key)
        tensor, work = step.expected.pop(key)
        work.wait()
        return tensor

    def _give(self, step: _Step, kind: str, stage: int, m: int, tensor: torch.Tensor) -> None:
        """Hand a tensor to the stage that needs it."""
        target = self.schedule.ranks[stage]
        if target == self._rank:
            step.arrived[kind, stage, m] = tensor
            return
        assert self._channels is not None
        step.sent = [(held, work) for held, work in step.sent if not work.is_completed()]
        tensor = tensor.contiguous()
        step.sent.append((tensor, self._channels.send(tensor, target, kind)))


def edges(schedule: Schedule) -> list[tuple[int, int, str]]:
    """Return (source rank, destination rank, kind) of every transfer of a schedule."""
    neighbours = list(zip(schedule.ranks[:-1], schedule.ranks[1:], strict=True))
    forward = [(a, b, ACTIVATION) for a, b in neighbours if a != b]
    return forward + [(b, a, GRADIENT) for a, b in neighbours if a != b]
