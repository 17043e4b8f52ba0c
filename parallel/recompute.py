"""Activation recomputation: what each block keeps for backward, and what backward makes again.

`selective` takes names of ops: `norms` (leaf modules whose parameters are all vectors), `rope` and `swiglu` (kernels),
and every other leaf module with parameters by its attribute name. What a name drops per token of a Llama block, with e
bytes per value, C hidden size, I intermediate size, H query and K key/value heads of size D:

    norms            2 e C            both norms' outputs (parallel block: e C); their inputs are kept anyway
    swiglu           e I              the input of `down`
    gate, up         2 e I            made from the norm's output
    rope with q, k   e (H + K) D      rotated queries and keys; rope alone drops nothing, it keeps its inputs instead
    v                e K D            values
    o, down          0                nobody saves them: they go into the residual sum

Attention is always kept: its inputs unless dropped above, its output (e H D) and what its kernel keeps of the softmax
(4 H bytes if fused; the reference keeps the weights themselves). So is whatever else a kernel keeps inside itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from shardwright.conf.schema import (
    BudgetRecomputeConfig,
    FullRecomputeConfig,
    RecomputeConfig,
    SelectiveRecomputeConfig,
)
from shardwright.parallel.plan import PlanError
from shardwright.parallel.provenance import RecomputedBlock
from shardwright.parallel.recompute_budget import Budget


def recompute(blocks: Sequence[nn.Module], config: RecomputeConfig, live: Sequence[int] | None = None) -> None:
    """Let blocks drop activations and make them again in backward (local; mutates the blocks).

    Comes after whatever replaces a module's `forward` or `kernels` (tensor and context parallelism), before sharding.

    Args:
        blocks: modules of which none contains another, called as `block(x, ...)`.
        config: what to drop; a budget is divided in the first forward for training, which shows the sizes.
        live: for a budget, how many microbatches of each block are between forward and backward at once; None: one.

    Raises:
        PlanError: `selective.ops` names what no block has; in the first forward: a budget that cannot be kept.
    """
    if isinstance(config, FullRecomputeConfig):
        for block in blocks:
            RecomputedBlock(block).ops = None
    elif isinstance(config, SelectiveRecomputeConfig):
        recomputed = [RecomputedBlock(block) for block in blocks]
        for block in recomputed:
            block.ops = frozenset(config.ops)
        if blocks:  # a stage of a pipeline may have none
            _check_names(config.ops, frozenset().union(*(block.names for block in recomputed)))
    elif isinstance(config, BudgetRecomputeConfig):
        Budget(blocks, live or [1] * len(blocks), config.gib)


def _check_names(ops: Iterable[str], known: frozenset[str]) -> None:
    for name in ops:
        if name not in known:
            raise PlanError(f"recompute.ops has {name!r}, which no block has; use any of {', '.join(sorted(known))}")
