"""Attention over sequences whose tokens are split over the processes of the `context` axis.

Only attention communicates; all else works on the local tokens. Two ways to do it:

- ring (parallel/ring.py): keys and values travel round the processes; any number of heads.
- ulysses (arXiv 2309.14509): an all-to-all turns "some tokens, all heads" into "all tokens, some heads", another one
  turns back; the degree must divide the query heads.

Shapes: B sequences, T tokens, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from shardwright.parallel.mesh import TopologyError
from shardwright.parallel.ring import ring_attention, zigzag

Mode = Literal["ring", "ulysses"]
Attention = Callable[..., torch.Tensor]


def _chunks(length: int, mode: Mode, degree: int, rank: int) -> tuple[int, tuple[int, ...]]:
    """Return into how many chunks a sequence is cut, and which of them a rank holds."""
    parts, mine = (2 * degree, zigzag(degree, rank)) if mode == "ring" else (degree, (rank,))
    if length % parts:
        raise TopologyError(
            f"parallel.context={degree} with context_mode={mode} cannot split sequences of {length} tokens: "
            f"{parts} must divide the length; use {length // parts * parts or parts} tokens, or another degree"
        )
    return parts, mine


def local_indices(length: int, mode: Mode, degree: int, rank: int) -> torch.Tensor:
    """Return which tokens of a sequence a rank holds: int64 [length / degree].

    Ring: of 2 * degree chunks number `rank` and, from behind, number `rank` again. Ulysses: chunk `rank` of `degree`.

    Raises:
        TopologyError: the sequence cannot be cut into chunks of one size.
    """
    parts, mine = _chunks(length, mode, degree, rank)
    return torch.arange(length).view(parts, -1)[list(mine)].flatten()


def take_local(x_BT: torch.Tensor, mode: Mode, degree: int, rank: int) -> torch.Tensor:
    """Return the tokens of `local_indices` of every sequence: contiguous [B, T / degree]; waits for no device.

    Raises:
        TopologyError: the sequences cannot be cut into chunks of one size.
    """
    parts, mine = _chunks(x_BT.shape[1], mode, degree, rank)
    chunks = x_BT.chunk(parts, dim=1)
    return torch.cat([chunks[i] for i in mine], dim=1)


def context_attention(attention: Attention, mode: Mode, group: dist.ProcessGroup) -> Attention:
    """Return a function that attends as `attention` does, to sequences that are split over a group.

    It takes the same arguments. Queries, keys, values and positions are those of the local tokens (`local_indices`);
    `bounds` and `longest` speak of the whole batch, as ever. Forward and backward are collective over the group.

    Args:
        attention: a candidate of kernels.attention. Ulysses calls it with all tokens and some of the heads; the ring,
            which needs partial results and their normalisers, has block functions of its own.
        mode: ring or ulysses.
        group: the processes of the `context` axis, at least two.

    Raises:
        TopologyError: when called: ulysses, and the degree does not divide the query heads.
    """

    def ring(q_BTHD, k_BTKD, v_BTKD, positions_BT, bounds, longest, *, window=None):
        reach = longest if window is None else min(window, longest)
        return ring_attention(q_BTHD, k_BTKD, v_BTKD, positions_BT, reach, group)

    def ulysses(q_BTHD, k_BTKD, v_BTKD, positions_BT, bounds, longest, *, window=None):
        q, k, v = _tokens_to_heads(q_BTHD, k_BTKD, v_BTKD, group)
        out = attention(q, k, v, _whole_positions(bounds, *q.shape[:2]), bounds, longest, window=window)
        return _exchange([out], group, scattered=1, gathered=2)

    return ring if mode == "ring" else ulysses


def _tokens_to_heads(
    q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    """Give up the other ranks' heads for the other ranks' tokens, in one exchange.

    Keys and values are repeated as often as it takes for the degree to divide their heads; as the degree divides the
    query heads, each rank then has the very heads that its queries read.
    """
    degree, num_heads, num_kv_heads = group.size(), q_BTHD.shape[2], k_BTKD.shape[2]
    if num_heads % degree:
        raise TopologyError(
            f"parallel.context={degree} does not divide the {num_heads} query heads of a process, which "
            f"parallel.context_mode=ulysses needs; use a degree that does, or parallel.context_mode=ring"
        )
    times = degree // math.gcd(degree, num_kv_heads)
    k, v = (x[:, :, :, None].expand(-1, -1, -1, times, -1).flatten(2, 3) for x in (k_BTKD, v_BTKD))
    counts = [x.shape[2] // degree for x in (q_BTHD, k, v)]
    return _exchange([q_BTHD, k, v], group, scattered=2, gathered=1).split(counts, dim=2)


def _exchange(
    xs_BTHD: Sequence[torch.Tensor], group: dist.ProcessGroup, *, scattered: int, gathered: int
) -> torch.Tensor:
    """Scatter one dim over the group and gather another; the tensors' heads come back side by side."""
    chunks = [x.unflatten(scattered, (group.size(), -1)).movedim(scattered, 0) for x in xs_BTHD]
    received = _AllToAll.apply(torch.cat(chunks, dim=3), group)
    return received.movedim(0, gathered).flatten(gathered, gathered + 1)


class _AllToAll(torch.autograd.Function):
    """Send chunk j of dim 0 to rank j: its own inverse, and so its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, x.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[override]
        return _AllToAll.apply(grad, ctx.group), None


def _whole_positions(bounds: torch.Tensor, num_sequences: int, length: int) -> torch.Tensor:
    """Return the position of every token in its document, [B, T], from the documents' bounds."""
    index = torch.arange(num_sequences * length, dtype=bounds.dtype, device=bounds.device)
    document = torch.searchsorted(bounds, index, right=True) - 1
    return (index - bounds[document]).long().view(num_sequences, length)
