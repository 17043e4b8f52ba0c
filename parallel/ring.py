"""Ring attention: queries stay, keys and values travel round the processes beside the work on the block before.

Each process holds an early and a late chunk of every sequence (zigzag), so that causality costs all of them alike.

Shapes: B sequences, T tokens of the queries, S tokens of the keys, H query heads, K key/value heads, G = H / K,
D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from shardwright.kernels.attention import softmax_dtype, widen

_NOTHING = torch.finfo(torch.float32).min  # log-sum-exp of no keys: as good as -inf, and no NaN from a difference


def zigzag(degree: int, rank: int) -> tuple[int, int]:
    """Return which two of 2 * degree chunks a rank holds: number `rank` from the front, and from behind."""
    return rank, 2 * degree - 1 - rank


def ring_attention(
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    positions_BT: torch.Tensor,
    reach: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Attend causally inside each document, to the tokens of all ranks; forward and backward are collective.

    Args:
        q_BTHD: queries of the two chunks of `zigzag`, one after the other.
        k_BTKD: keys; query head h reads key head h // G.
        v_BTKD: values.
        positions_BT: int64, position of each token in its document.
        reach: a token sees at most itself and the `reach - 1` before it.
        group: at least two processes.

    Returns:
        [B, T, H, D] in the dtype of the queries; softmax and sums over blocks are float32.

    Source: arXiv 2310.01889; partial results are merged by their log-sum-exp.
    """
    return _Ring.apply(q_BTHD, k_BTKD, v_BTKD, positions_BT, reach, group)


# A fused kernel replaces exactly the next two functions.


def block_forward(
    q_BTHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, before_BT: torch.Tensor, offset: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from a run of queries to a run of keys.

    Args:
        q_BTHD: consecutive queries.
        k_BSKD: consecutive keys; query head h reads key head h // G.
        v_BSKD: values.
        before_BT: int64, how many tokens before itself each query sees, in this block or in others.
        offset: tokens from the first key to the first query: query t sees key s if
            0 <= t + offset - s <= before[t].

    Returns:
        The weighted values [B, T, H, D], and the logarithm of the sum of exponentiated scores [B, T, H], both float32
        (float64 for float64 inputs).
        A query that sees no key of the block has zeros and the lowest float32.
    """
    scores = _scores(q_BTHD, k_BSKD, before_BT, offset)
    lse = scores.logsumexp(-1).clamp(min=_NOTHING)
    weights = (scores - lse[..., None]).exp().to(v_BSKD.dtype)
    out = torch.einsum("bkgts,bskd->btkgd", weights, v_BSKD)
    return out.flatten(2, 3).to(lse.dtype), lse.flatten(1, 2).transpose(1, 2)


def block_backward(
    dout_BTHD: torch.Tensor,
    q_BTHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    lse_BTH: torch.Tensor,
    delta_BTH: torch.Tensor,
    before_BT: torch.Tensor,
    offset: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what one block adds to the gradients of its queries, keys and values, in float32.

    Args:
        dout_BTHD: gradient of the attended values.
        q_BTHD: as in `block_forward`, also the following two.
        k_BSKD: keys.
        v_BSKD: values.
        lse_BTH: float32 log-sum-exp over all keys that a query sees, not only those of this block.
        delta_BTH: float32 sum over D of gradient times attended values.
        before_BT: as in `block_forward`.
        offset: as in `block_forward`.

    Source: arXiv 2307.08691, algorithm 2.
    """
    num_kv_heads, dtype = k_BSKD.shape[2], q_BTHD.dtype
    q, dout = (x.unflatten(2, (num_kv_heads, -1)) for x in (q_BTHD, dout_BTHD))
    lse, delta = (x.transpose(1, 2).unflatten(1, (num_kv_heads, -1))[..., None] for x in (lse_BTH, delta_BTH))
    weights = (_scores(q_BTHD, k_BSKD, before_BT, offset) - lse).exp()
    dweights = torch.einsum("btkgd,bskd->bkgts", dout, v_BSKD).float()
    dscores = (weights * (dweights - delta) * q.shape[-1] ** -0.5).to(dtype)
    dq = torch.einsum("bkgts,bskd->btkgd", dscores, k_BSKD).flatten(2, 3)
    dk = torch.einsum("bkgts,btkgd->bskd", dscores, q)
    dv = torch.einsum("bkgts,btkgd->bskd", weights.to(dtype), dout)
    return dq.float(), dk.float(), dv.float()


def _scores(q_BTHD: torch.Tensor, k_BSKD: torch.Tensor, before_BT: torch.Tensor, offset: int) -> torch.Tensor:
    """Return scores [B, K, G, T, S] in the softmax's dtype, -inf where a query does not see a key."""
    q_BTKGD = q_BTHD.unflatten(2, (k_BSKD.shape[2], -1))
    scores = torch.einsum("btkgd,bskd->bkgts", q_BTKGD, k_BSKD)
    scores = scores.to(softmax_dtype(scores)) * q_BTHD.shape[-1] ** -0.5
    queries, keys = (torch.arange(x.shape[1], device=x.device) for x in (q_BTHD, k_BSKD))
    distance_TS = queries[:, None] + offset - keys
    seen_BTS = (distance_TS >= 0) & (distance_TS <= before_BT[..., None])
    return scores.masked_fill(~seen_BTS[:, None, None], -torch.inf)


class Block(NamedTuple):
    """A chunk of the local queries, one of the visiting keys, and the tokens from the first key to the first query."""

    queries: slice
    keys: slice
    offset: int


def ring_blocks(degree: int, rank: int, source: int, length: int, reach: int) -> Iterator[Block]:
    """Yield the blocks in which a query of `rank` may see a key of `source`; known without looking at a tensor.

    Args:
        degree: processes in the ring.
        rank: whose queries.
        source: whose keys.
        length: tokens per chunk.
        reach: a token sees at most itself and the `reach - 1` before it.
    """
    parts = slice(0, length), slice(length, 2 * length)
    for queries, i in zip(parts, zigzag(degree, rank), strict=True):
        for keys, j in zip(parts, zigzag(degree, source), strict=True):
            nearest = max((i - j - 1) * length + 1, 0)
            if i >= j and nearest < reach:
                yield Block(queries, keys, (i - j) * length)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTHD, k_BTKD, v_BTKD, positions_BT, reach: int, group: dist.ProcessGroup) -> torch.Tensor:
        before_BT = positions_BT.clamp(max=reach - 1)
        wide_BTHD = widen(q_BTHD)  # as the reference: the sum over keys is split without a trace
        out_BTHD = torch.zeros_like(wide_BTHD, dtype=softmax_dtype(wide_BTHD))
        lse_BTH = torch.full_like(out_BTHD[..., 0], _NOTHING)
        length = q_BTHD.shape[1] // 2
        for source, (k, v) in _visitors(k_BTKD, v_BTKD, group):
            for rows, keys, offset in ring_blocks(group.size(), group.rank(), source, length, reach):
                k_BSKD, v_BSKD = widen(k[:, keys]), widen(v[:, keys])
                part = block_forward(wide_BTHD[:, rows], k_BSKD, v_BSKD, before_BT[:, rows], offset)
                _merge(out_BTHD[:, rows], lse_BTH[:, rows], *part)
        out_BTHD = out_BTHD.to(q_BTHD.dtype)
        ctx.save_for_backward(q_BTHD, k_BTKD, v_BTKD, out_BTHD, lse_BTH.float(), before_BT)
        ctx.reach, ctx.group = reach, group
        return out_BTHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTHD: torch.Tensor):  # type: ignore[override]
        q_BTHD, k_BTKD, v_BTKD, out_BTHD, lse_BTH, before_BT = ctx.saved_tensors
        group, length = ctx.group, q_BTHD.shape[1] // 2
        delta_BTH = (dout_BTHD.float() * out_BTHD.float()).sum(-1)
        dq_BTHD = torch.zeros_like(out_BTHD, dtype=torch.float32)
        arrive = None
        for source, (k, v) in _visitors(k_BTKD, v_BTKD, group):
            dkv = torch.zeros((2, *k.shape), dtype=torch.float32, device=k.device)
            for rows, keys, offset in ring_blocks(group.size(), group.rank(), source, length, ctx.reach):
                dout, q, lse, delta, before = (x[:, rows] for x in (dout_BTHD, q_BTHD, lse_BTH, delta_BTH, before_BT))
                dq, dk, dv = block_backward(dout, q, k[:, keys], v[:, keys], lse, delta, before, offset)
                dq_BTHD[:, rows] += dq
                dkv[0, :, keys] += dk
                dkv[1, :, keys] += dv
            if arrive is not None:
                dkv += arrive()
            arrive = _pass_on(dkv, group)  # one hop behind its keys; home after the last
        assert arrive is not None, "a ring has at least one process"
        dk, dv = arrive().to(k_BTKD.dtype)
        return dq_BTHD.to(q_BTHD.dtype), dk, dv, None, None, None


def _visitors(k: torch.Tensor, v: torch.Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each rank of the ring and its keys and values, own first; they travel on while the caller works."""
    degree, rank, kv = group.size(), group.rank(), torch.stack([k, v])
    for hop in range(degree - 1):
        arrive = _pass_on(kv, group)
        yield (rank - hop) % degree, kv
        kv = arrive()
    yield (rank + 1) % degree, kv


def _pass_on(x: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], torch.Tensor]:
    """Begin to send a tensor to the next rank; return a function that waits for the one of the previous rank.

    The function holds what is sent, which must not be freed before it has gone.
    """
    degree, rank = group.size(), group.rank()
    send = dist.P2POp(dist.isend, x, group=group, group_peer=(rank + 1) % degree)
    receive = dist.P2POp(dist.irecv, torch.empty_like(x), group=group, group_peer=(rank - 1) % degree)
    operations = [send, receive]
    works = dist.batch_isend_irecv(operations)

    def arrive() -> torch.Tensor:
        for work in works:
            work.wait()
        return operations[1].tensor

    return arrive


def _merge(out_BTHD: torch.Tensor, lse_BTH: torch.Tensor, more_BTHD: torch.Tensor, more_lse_BTH: torch.Tensor) -> None:
    """Merge the result of further keys into a result, in place."""
    total_BTH = torch.logaddexp(lse_BTH, more_lse_BTH)
    old, new = ((x - total_BTH).exp()[..., None] for x in (lse_BTH, more_lse_BTH))
    out_BTHD.mul_(old).add_(more_BTHD * new)
    lse_BTH.copy_(total_BTH)
