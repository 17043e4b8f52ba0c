"""FlashAttention backward over packed documents: two kernels, each sum made by one program in one order.

Weights are computed again from the log-sum-exp. The kernel of the queries' gradients also computes delta, the sum over
D of gradient times attended values, less the gradient of the log-sum-exp, which the kernel of the keys' and values'
gradients then reads.

Shapes: P packed tokens, H query heads, K key/value heads, G = H / K, D head size.

Source: arXiv 2307.08691, algorithm 2.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from shardwright.kernels.triton.attention_forward import (
    ITEM_BYTES,
    LOG2E,
    VARIANTS,
    Documents,
    Need,
    Scores,
    adjacent_heads,
    describe,
    fitting,
    key_range,
    load_tile,
    peel,
    read_tile,
    seen,
    shared_bytes,
    store_tile,
    tanh,
    tried,
    width,
)
from shardwright.kernels.triton.block_sparse import along, list_arguments, list_of, token_at
from shardwright.kernels.triton.config import Config, pick
from shardwright.kernels.triton.launch import launch_kernel

QUERY_CONFIGS = (
    Config(blocks={"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2),
    Config(blocks={"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=2),
    Config(blocks={"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=3),
    Config(blocks={"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=2),
    Config(blocks={"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=1),
)
KEY_CONFIGS = (
    Config(blocks={"BLOCK_M": 32, "BLOCK_N": 128}, num_warps=8, num_stages=2),
    Config(blocks={"BLOCK_M": 64, "BLOCK_N": 128}, num_warps=8, num_stages=2),
    Config(blocks={"BLOCK_M": 32, "BLOCK_N": 64}, num_warps=4, num_stages=2),
    Config(blocks={"BLOCK_M": 32, "BLOCK_N": 64}, num_warps=8, num_stages=2),
    Config(blocks={"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=1),
)


def query_need(config: Config, dim: int) -> Need:
    """Return what the queries' kernel asks: queries, their gradients, every stage of keys and values; sum, scores."""
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    rows = 2 * block_m + 2 * config.num_stages * block_n
    return Need(rows * width(dim) * ITEM_BYTES, block_m * (width(dim) + 2 * block_n) // (32 * config.num_warps))


def key_need(config: Config, dim: int) -> Need:
    """Return what the keys' kernel asks: keys, values, every stage of queries and gradients; two sums, scores."""
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    rows = 2 * block_n + 2 * config.num_stages * block_m
    return Need(rows * width(dim) * ITEM_BYTES, 2 * block_n * (width(dim) + block_m) // (32 * config.num_warps))


def _query_config(dim: int, scores: Scores, device: torch.device) -> Config:
    def configs() -> list[Config]:
        return fitting(QUERY_CONFIGS, lambda config: query_need(config, dim), shared_bytes(device), scores.block)

    return pick("attention_backward_queries", scores.key(dim), configs, device)


def _key_config(dim: int, scores: Scores, device: torch.device) -> Config:
    def configs() -> list[Config]:
        return fitting(KEY_CONFIGS, lambda config: key_need(config, dim), shared_bytes(device), scores.block)

    return pick("attention_backward_keys", scores.key(dim), configs, device)


def backward_queries(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    outputs: tuple[torch.Tensor, torch.Tensor],
    gradients: tuple[torch.Tensor, torch.Tensor | None],
    documents: Documents,
    scores: Scores,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of the queries [P, H, D], and delta, float32 [H, P].

    Args:
        inputs: of the forward: queries, keys, values.
        outputs: of the forward: attended values, log-sum-exp.
        gradients: of the outputs; None for a log-sum-exp that nobody used.
        documents: as in the forward.
        scores: as in the forward.
        config: None: the one to pick.
    """
    tokens, heads, dim = inputs[0].shape
    q, k, v, out, dout = (adjacent_heads(x) for x in (*inputs, outputs[0], gradients[0]))
    config = config or _query_config(dim, scores, q.device)
    dq = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    delta = torch.empty_like(outputs[1])
    tiles = documents.tiles(config.blocks["BLOCK_M"])
    dlse = None if gradients[1] is None else gradients[1].contiguous()
    strides = (x.stride(0) for x in (q, k, v, out, dout))
    launch_kernel(
        _query_kernel,
        (len(tiles), heads),
        *(q, k, v, out, dout, outputs[1], dlse, delta, dq, tiles, *strides, tokens, heads // k.shape[1]),
        *list_arguments(scores.lists and scores.lists.keys),
        **scores.arguments(dim),
        scale=scores.scale,
        **config.arguments,
    )
    return dq, delta


def backward_keys(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    dout_PHD: torch.Tensor,
    lse_HP: torch.Tensor,
    delta_HP: torch.Tensor,
    documents: Documents,
    scores: Scores,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of keys and values [P, K, D], from what `backward_queries` takes and returns."""
    q, k, v, dout = (adjacent_heads(x) for x in (*inputs, dout_PHD))
    tokens, kv_heads, dim = k.shape
    config = config or _key_config(dim, scores, q.device)
    dk, dv = (torch.empty((tokens, kv_heads, dim), dtype=k.dtype, device=k.device) for _ in range(2))
    tiles = documents.tiles(config.blocks["BLOCK_N"])
    strides = (x.stride(0) for x in (q, k, v, dout))
    launch_kernel(
        _key_kernel,
        (len(tiles), kv_heads),
        *(q, k, v, dout, lse_HP, delta_HP, dk, dv, tiles, *strides, tokens, q.shape[1] // kv_heads),
        *list_arguments(scores.lists and scores.lists.queries),
        **scores.arguments(dim),
        scale=scores.scale,
        **config.arguments,
    )
    return dk, dv


@triton.jit
def _add_query_gradients(  # noqa: PLR0913
    acc,
    q,
    dout,
    lse,
    delta,
    k,
    v,
    first,
    last,
    begin,
    start,
    end,
    k_stride,
    v_stride,
    row,
    window,
    factor,
    inner,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add what the keys from `first` to `last` give to the gradients of a tile of queries, but for the scale."""
    if LISTED:
        following = token_at(first, last, row, start, LISTED)
    for place in tl.range(first, last, BLOCK_N):
        at = place
        if LISTED:
            at = following
            following = token_at(place + BLOCK_N, last, row, start, LISTED)
        k_tile = load_tile(k, at, end, k_stride, BLOCK_N, WIDTH, DIM, MASKED)
        scores = tl.dot(q, tl.trans(k_tile))  # of what was loaded: it turns in shared memory
        if CAPPED:
            scores = tanh(scores * inner)
        weights = tl.exp2(scores * factor - lse[:, None])
        if MASKED:
            query, key = begin + tl.arange(0, BLOCK_M)[:, None], at + tl.arange(0, BLOCK_N)[None, :]
            weights = tl.where(seen(query, key, end, window, CAUSAL, WINDOWED), weights, 0.0)
        v_tile = load_tile(v, at, end, v_stride, BLOCK_N, WIDTH, DIM, MASKED, TRANSPOSED=True)
        dscores = weights * (tl.dot(dout, v_tile) - delta[:, None])
        if CAPPED:
            dscores *= 1 - scores * scores
        acc = tl.dot(dscores.to(k_tile.dtype), k_tile, acc)
    return acc


@triton.jit
def _query_kernel(  # noqa: PLR0913
    q,
    k,
    v,
    out,
    dout,
    lse,
    dlse,
    delta,
    dq,
    tiles,
    q_stride,
    k_stride,
    v_stride,
    out_stride,
    dout_stride,
    tokens,
    group,
    lists,
    list_head,
    list_block,
    window,
    factor,
    inner,
    scale,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write delta and the gradients of one tile of queries of one head."""
    head = tl.program_id(1)
    begin, start, end = read_tile(tiles, tl.num_programs(0) - 1 - tl.program_id(0))
    if begin >= end:
        return
    k += head // group * DIM
    v += head // group * DIM
    q_tile = load_tile(q + head * DIM, begin, end, q_stride, BLOCK_M, WIDTH, DIM, True)
    dout_tile = load_tile(dout + head * DIM, begin, end, dout_stride, BLOCK_M, WIDTH, DIM, True)
    out_tile = load_tile(out + head * DIM, begin, end, out_stride, BLOCK_M, WIDTH, DIM, True)
    rows = begin + tl.arange(0, BLOCK_M)
    at = tl.cast(head, tl.int64) * tokens + rows
    delta_tile = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse is not None:
        delta_tile -= tl.load(dlse + at, mask=rows < end, other=0.0)
    if LISTED:  # no keys, no gradients
        delta_tile = tl.where(tl.load(lse + at, mask=rows < end, other=0.0) == float("-inf"), 0.0, delta_tile)
    tl.store(delta + at, delta_tile, mask=rows < end)
    lse_tile = tl.load(lse + at, mask=rows < end, other=0.0) * LOG2E
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    first, last, bare_first, bare_last = key_range(begin, start, end, window, CAUSAL, WINDOWED, BLOCK_M)
    row = tiles  # a pointer that is not read
    if LISTED:
        row = list_of(lists, list_head, list_block, head, (begin - start) // LISTED)
        first, last, bare_first, bare_last = along(row, start, first, last, bare_first, bare_last, LISTED, BLOCK_N)
    bare_first, bare_last = peel(first, last, bare_first, bare_last, BLOCK_N)
    if WINDOWED:
        acc = _add_query_gradients(
            *(acc, q_tile, dout_tile, lse_tile, delta_tile, k, v, first, bare_first, begin, start, end),
            *(k_stride, v_stride, row, window, factor, inner),
            *(DIM, WIDTH, CAUSAL, WINDOWED, CAPPED, LISTED, BLOCK_M, BLOCK_N, True),
        )
    acc = _add_query_gradients(
        *(acc, q_tile, dout_tile, lse_tile, delta_tile, k, v, bare_first, bare_last, begin, start, end),
        *(k_stride, v_stride, row, window, factor, inner),
        *(DIM, WIDTH, CAUSAL, WINDOWED, CAPPED, LISTED, BLOCK_M, BLOCK_N, False),
    )
    acc = _add_query_gradients(
        *(acc, q_tile, dout_tile, lse_tile, delta_tile, k, v, bare_last, last, begin, start, end),
        *(k_stride, v_stride, row, window, factor, inner),
        *(DIM, WIDTH, CAUSAL, WINDOWED, CAPPED, LISTED, BLOCK_M, BLOCK_N, True),
    )
    store_tile(dq + head * DIM, acc * scale, begin, end, tl.num_programs(1) * DIM, BLOCK_M, WIDTH, DIM)


@triton.jit
def _query_range(
    begin,
    start,
    end,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return the queries that see a tile of keys, as a range, and the range of those that see all of it.

    The document's end ends neither, as zeros are all that queries after it give.
    """
    stop = tl.minimum(begin + BLOCK_N, end)
    first, last = start, end
    if CAUSAL:
        first = begin
    bare_first, bare_last = first, last + BLOCK_M
    if CAUSAL:
        bare_first = stop - 1
    if WINDOWED:
        last = tl.minimum(end, stop - 1 + window)
        bare_last = tl.where(begin + window < end, begin + window, bare_last)
    return first, last, bare_first, bare_last


@triton.jit
def _load_row(pointer, first, end, COUNT: tl.constexpr):
    """Return what stands for the tokens from `first` on, and zeros from `end` on."""
    lanes = tl.arange(0, COUNT)
    at = pointer + first + lanes  # in this order a thread's many addresses differ by constants, and take one register
    return tl.load(at, mask=lanes < end - first, other=0.0)


@triton.jit
def _add_key_gradients(  # noqa: PLR0913
    dk_acc,
    dv_acc,
    k,
    v,
    q,
    dout,
    lse,
    delta,
    first,
    last,
    begin,
    start,
    end,
    q_stride,
    dout_stride,
    row,
    window,
    factor,
    inner,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add what the queries from `first` to `last` give to the gradients of a tile of keys and values.

    All scores are transposed: keys by queries. Queries after the end of the document are zeros, and so is all that
    they give.
    """
    if LISTED:
        following = token_at(first, last, row, start, LISTED)
    for place in tl.range(first, last, BLOCK_M):
        at = place
        if LISTED:
            at = following
            following = token_at(place + BLOCK_M, last, row, start, LISTED)
        lse_tile = _load_row(lse, at, end, BLOCK_M) * LOG2E
        delta_tile = _load_row(delta, at, end, BLOCK_M)
        q_tile = load_tile(q, at, end, q_stride, BLOCK_M, WIDTH, DIM, True)
        scores = tl.dot(k, tl.trans(q_tile))  # of what was loaded: it turns in shared memory
        if CAPPED:
            scores = tanh(scores * inner)
        weights = tl.exp2(scores * factor - lse_tile[None, :])
        if MASKED:
            query, key = at + tl.arange(0, BLOCK_M)[None, :], begin + tl.arange(0, BLOCK_N)[:, None]
            weights = tl.where(seen(query, key, end, window, CAUSAL, WINDOWED), weights, 0.0)
        dout_tile = load_tile(dout, at, end, dout_stride, BLOCK_M, WIDTH, DIM, True)
        dv_acc = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv_acc)
        dscores = weights * (tl.dot(v, tl.trans(dout_tile)) - delta_tile[None, :])
        if CAPPED:
            dscores *= 1 - scores * scores
        dk_acc = tl.dot(dscores.to(q_tile.dtype), q_tile, dk_acc)
    return dk_acc, dv_acc


@triton.jit
def _key_kernel(  # noqa: PLR0913
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dk,
    dv,
    tiles,
    q_stride,
    k_stride,
    v_stride,
    dout_stride,
    tokens,
    group,
    lists,
    list_head,
    list_block,
    window,
    factor,
    inner,
    scale,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the gradients of one tile of keys and values of one head, from all query heads that read it."""
    kv_head = tl.program_id(1)
    begin, start, end = read_tile(tiles, tl.program_id(0))
    if begin >= end:
        return
    k_tile = load_tile(k + kv_head * DIM, begin, end, k_stride, BLOCK_N, WIDTH, DIM, True)
    v_tile = load_tile(v + kv_head * DIM, begin, end, v_stride, BLOCK_N, WIDTH, DIM, True)
    dk_acc = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    first, last, bare_first, bare_last = _query_range(begin, start, end, window, CAUSAL, WINDOWED, BLOCK_M, BLOCK_N)
    for head in range(kv_head * group, (kv_head + 1) * group):
        row = tiles  # a pointer that is not read
        low, high, bare_low, bare_high = first, last, bare_first, bare_last
        if LISTED:
            row = list_of(lists, list_head, list_block, head, (begin - start) // LISTED)
            low, high, bare_low, bare_high = along(row, start, first, last, bare_first, bare_last, LISTED, BLOCK_M)
        bare_low, bare_high = peel(low, high, bare_low, bare_high, BLOCK_M)
        at = tl.cast(head, tl.int64) * tokens
        q_head, dout_head, lse_head, delta_head = q + head * DIM, dout + head * DIM, lse + at, delta + at
        if CAUSAL:
            dk_acc, dv_acc = _add_key_gradients(
                *(dk_acc, dv_acc, k_tile, v_tile, q_head, dout_head, lse_head, delta_head, low, bare_low),
                *(begin, start, end, q_stride, dout_stride, row, window, factor, inner),
                *(DIM, WIDTH, CAUSAL, WINDOWED, CAPPED, LISTED, BLOCK_M, BLOCK_N, True),
            )
        dk_acc, dv_acc = _add_key_gradients(
            *(dk_acc, dv_acc, k_tile, v_tile, q_head, dout_head, lse_head, delta_head, bare_low, bare_high),
            *(begin, start, end, q_stride, dout_stride, row, window, factor, inner),
            *(DIM, WIDTH, CAUSAL, WINDOWED, CAPPED, LISTED, BLOCK_M, BLOCK_N, False),
        )
        if WINDOWED:
            dk_acc, dv_acc = _add_key_gradients(
                *(dk_acc, dv_acc, k_tile, v_tile, q_head, dout_head, lse_head, delta_head, bare_high, high),
                *(begin, start, end, q_stride, dout_stride, row, window, factor, inner),
                *(DIM, WIDTH, CAUSAL, WINDOWED, CAPPED, LISTED, BLOCK_M, BLOCK_N, True),
            )
    stride = tl.num_programs(1) * DIM
    store_tile(dk + kv_head * DIM, dk_acc * scale, begin, end, stride, BLOCK_N, WIDTH, DIM)
    store_tile(dv + kv_head * DIM, dv_acc, begin, end, stride, BLOCK_N, WIDTH, DIM)


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield label, kernel, arguments and keyword arguments of everything that a compiler should be tried on."""
    integers, lse = torch.empty(16, dtype=torch.int32), torch.empty(16)
    for name, scores, dtype, dim in VARIANTS:
        x = torch.empty(16, dtype=dtype)
        label = f"{name} {str(dtype)[6:]} head_dim={dim}"
        arguments = {**scores.arguments(dim), "scale": scores.scale}
        fits = fitting(QUERY_CONFIGS, lambda config, dim=dim: query_need(config, dim), block=scores.block)
        for config in tried(name, dtype, fits):
            args = (x, x, x, x, x, lse, lse, lse, x, integers, 4096, 1024, 1024, 4096, 4096, 4096, 4)
            args += list_arguments(scores.lists and scores.lists.keys)
            yield (
                f"attention backward queries {label} {describe(config)}",
                *(_query_kernel, args, {**arguments, **config.arguments}),
            )
        fits = fitting(KEY_CONFIGS, lambda config, dim=dim: key_need(config, dim), block=scores.block)
        for config in tried(name, dtype, fits):
            args = (x, x, x, x, lse, lse, x, x, integers, 4096, 1024, 1024, 4096, 4096, 4)
            args += list_arguments(scores.lists and scores.lists.queries)
            yield (
                f"attention backward keys {label} {describe(config)}",
                *(_key_kernel, args, {**arguments, **config.arguments}),
            )
