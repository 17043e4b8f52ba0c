"""Which blocks each pipeline stage holds, and the part of the model that it is."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence

from torch import nn

from shardwright.parallel.plan import ParallelPlan, PlanError


def partition(blocks: Sequence[float], num_stages: int, *, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Cut a row of blocks into runs, one per stage, so that the dearest stage is as cheap as possible.

    Args:
        blocks: cost of each block.
        num_stages: at most as many as blocks; every stage gets one at least.
        first: cost of what stands before the blocks.
        last: cost of what stands after them.
    """
    num_blocks = len(blocks)
    sums = [0.0]
    for cost in blocks:
        sums.append(sums[-1] + cost)

    def stage_cost(stage: int, start: int, end: int) -> float:
        ends = first * (stage == 0) + last * (stage == num_stages - 1)
        return sums[end] - sums[start] + ends

    # best[end]: (greatest cost of a stage, cuts) for the first stages over the blocks before `end`.
    best = {end: (stage_cost(0, 0, end), [0, end]) for end in range(1, num_blocks + 1)}
    for stage in range(1, num_stages):
        best = {
            end: min(
                (max(best[start][0], stage_cost(stage, start, end)), [*best[start][1], end])
                for start in range(stage, end)
            )
            for end in range(stage + 1, num_blocks + 1)
        }
    cuts = best[num_blocks][1]
    return [range(start, end) for start, end in itertools.pairwise(cuts)]


def split_by_cost(model: nn.Module, plan: ParallelPlan, num_stages: int, sequence_length: int) -> list[range]:
    """Return which blocks each stage gets, by the products that a token passes through.

    A block costs its weights and, where the plan knows the attention's width, the causal scores of an average token;
    what stands after the blocks costs its weights; an embedding look-up costs nothing.

    Raises:
        PlanError: the family cannot be cut, or into fewer stages only.
    """
    if plan.ends is None:
        raise PlanError("parallel.pipeline: this model family names no ends; add them to its plan, or use pipeline=1")
    modules = dict(model.named_modules())
    names = plan.match_blocks(modules)
    if len(names) < num_stages:
        raise PlanError(
            f"parallel.pipeline: {num_stages} stages need as many blocks, the model has {len(names)}; "
            f"use fewer processes along pipeline, or fewer chunks"
        )
    scores = plan.ends.attention_width * sequence_length
    blocks = [_weights(modules[name]) + scores for name in names]
    return partition(blocks, num_stages, last=sum(_weights(modules[name]) for name in plan.ends.last))


def cut(model: nn.Module, plan: ParallelPlan, split: Sequence[range], stage: int) -> nn.Module:
    """Return a copy of a model on the meta device that has only what belongs to one stage."""
    assert plan.ends is not None
    part = copy.deepcopy(model)
    blocks = plan.match_blocks(dict(part.named_modules()))
    foreign = {name for index, name in enumerate(blocks) if index not in split[stage]}
    kept = {*(plan.ends.first if stage == 0 else ()), *(plan.ends.last if stage == len(split) - 1 else ())}
    foreign |= {*plan.ends.first, *plan.ends.last} - kept
    for name in foreign:
        owner, _, leaf = name.rpartition(".")
        holder = part.get_submodule(owner)
        if isinstance(holder, nn.ModuleDict):
            del holder[leaf]
        else:
            setattr(holder, leaf, None)
    return part


def _weights(module: nn.Module) -> int:
    return sum(math.prod(p.shape) for p in module.parameters() if p.ndim > 1)
