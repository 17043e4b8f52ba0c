"""FlashAttention backward over packed documents, for Hopper: five products a block, none of them twice.

A program is one warp that loads and two warpgroups with 64 keys each. All scores are transposed, keys by queries: so
weights and their gradients are operands from registers where the gradients of values and keys are summed. For the
gradients of queries both warpgroups write theirs to shared memory and then multiply all 128 keys, each for its half of
the result, which the memory adds to sums in float32. The order of these additions is not fixed: gradients of queries
may differ in their last bits from run to run, those of keys and values do not.

A first kernel writes what every query needs, block by block, padded to whole tiles: log-sum-exp (infinite after the
end of a document, where all weights become zero) and delta. It also clears the sums, which a last kernel converts.

Shapes: P packed tokens, H query heads, K key/value heads, G = H / K, D head size, M tiles.

Source: arXiv 2407.08608, section 3 and appendix B.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportOptionalMemberAccess=false
# (Gluon's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from shardwright.kernels.gluon.attention_forward import unsupported
from shardwright.kernels.gluon.hopper import aggregate, barriers, describable, load, place, ragged, store
from shardwright.kernels.triton.attention_forward import LOG2E, Documents, Scores, load_tile, read_tile, store_tile
from shardwright.kernels.triton.config import Config, pick
from shardwright.kernels.triton.launch import launch_kernel

__all__ = ["CONFIGS", "backward", "compilations", "unsupported"]

TILE = gl.constexpr(128)  # keys of a program
ROWS = gl.constexpr(64)  # keys of a warpgroup
HALF = gl.constexpr(64)  # rows, and columns, of the part of the queries' gradients that a warpgroup makes
STAGES = gl.constexpr(2)
_CACHED_BYTES = 32 * 2**20  # what programs that run together should share in the second-level cache


def _config(block_m: int, early: int) -> Config:
    return Config(blocks={"BLOCK_M": block_m, "EARLY": early}, num_warps=4, num_stages=1)


CONFIGS = {128: (_config(64, 1), _config(64, 0)), 64: (_config(128, 1), _config(128, 0))}

if hasattr(tma, "async_atomic_add"):
    _add_to_memory = tma.async_atomic_add
else:  # Triton 3.6 has the operation but no name for it
    from triton._C.libtriton import ir  # pyright: ignore[reportMissingImports]

    @_core.builtin
    def _add_to_memory(tensor_desc, coord, src, _semantic=None):
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


def backward(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    outputs: tuple[torch.Tensor, torch.Tensor],
    gradients: tuple[torch.Tensor, torch.Tensor | None],
    documents: Documents,
    scores: Scores,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of queries [P, H, D], keys and values [P, K, D].

    Args:
        inputs: of the forward: queries, keys, values.
        outputs: of the forward: attended values, log-sum-exp.
        gradients: of the outputs; None for a log-sum-exp that nobody used.
        documents: as in the forward.
        scores: as in the forward, without a softcap.
        config: None: the one to pick.
    """
    q, k, v, out, dout = (describable(x) for x in (*inputs, outputs[0], gradients[0]))
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    config = config or pick("gluon_attention_backward", f"head_dim={dim}", lambda: CONFIGS[dim], q.device)
    tiles = documents.tiles(TILE.value)
    padded = len(tiles) * TILE.value
    rows = torch.empty(heads * padded * 2, dtype=torch.float32, device=q.device)
    sums = torch.empty((heads * padded, dim), dtype=torch.float32, device=q.device)
    dkv = torch.empty((2 * tokens, kv_heads, dim), dtype=k.dtype, device=k.device)
    dq = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    dlse = None if gradients[1] is None else gradients[1].contiguous()
    units = (len(tiles) * heads,)
    launch_kernel(
        _prepare_kernel,
        units,
        *(out, dout, outputs[1].contiguous(), dlse, tiles, rows, sums, out.stride(0), dout.stride(0), tokens, heads),
        DIM=dim,
        BLOCK_M=config.blocks["BLOCK_M"],
        TILE=TILE.value,
        num_warps=8,
    )
    launch_kernel(
        _key_kernel,
        (len(tiles) * kv_heads,),
        *_arguments(
            (q, k, v), dout, dkv, rows, sums, tiles, _together(kv_heads, heads * dim, documents), scores, config
        ),
        **_options(dim, scores, config),
    )
    launch_kernel(_finish_kernel, units, sums, dq, tiles, heads, scores.scale, DIM=dim, TILE=TILE.value, num_warps=8)
    return dq, dkv[:tokens], dkv[tokens:]


def _together(kv_heads: int, width: int, documents: Documents) -> int:
    """Return the programs of how many key heads run at a time: longest tiles first, yet what they read stays cached."""
    item_bytes = 2 + 2 + 4  # of queries, gradients of the output, sums
    head_bytes = item_bytes * min(documents.longest, documents.tokens) * width // kv_heads
    return max(1, min(kv_heads, _CACHED_BYTES // max(1, head_bytes)))


def _arguments(  # noqa: PLR0913
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    dout: torch.Tensor,
    dkv: torch.Tensor,
    rows: torch.Tensor,
    sums: torch.Tensor,
    tiles: torch.Tensor,
    together: int,
    scores: Scores,
    config: Config,
) -> tuple[Any, ...]:
    (q, k, v), block_m = inputs, config.blocks["BLOCK_M"]
    descriptors = (
        *(ragged(q, block_m), ragged(k, ROWS.value), ragged(v, ROWS.value), ragged(dout, block_m)),
        ragged(dkv, ROWS.value),
        TensorDescriptor(rows, [rows.numel()], [1], [2 * block_m], gl.NVMMASharedLayout(0, 32, 1)),
        TensorDescriptor(
            sums, list(sums.shape), [sums.shape[1], 1], [HALF.value] * 2, gl.NVMMASharedLayout(128, 32, 2)
        ),
    )
    sizes = (len(tiles), len(k), k.shape[1], q.shape[1] // k.shape[1], together, scores.window or 0)
    return *descriptors, tiles, *sizes, math.log2(math.e) * scores.scale, scores.scale


def _options(dim: int, scores: Scores, config: Config) -> dict[str, Any]:
    return {
        "DIM": dim,
        "CAUSAL": scores.causal,
        "WINDOWED": scores.window is not None,
        **config.arguments,
        "enable_fp_fusion": True,
    }


@triton.jit
def _prepare_kernel(  # noqa: PLR0913
    out,
    dout,
    lse,
    dlse,
    tiles,
    rows,
    sums,
    out_stride,
    dout_stride,
    tokens,
    heads,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write what a tile of queries of one head needs, in blocks: log-sum-exp to base 2, then -delta; clear its sums."""
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    begin, _, end = read_tile(tiles, tile)
    if begin >= end:
        return
    out_tile = load_tile(out + head * DIM, begin, end, out_stride, TILE, DIM, DIM, True)
    dout_tile = load_tile(dout + head * DIM, begin, end, dout_stride, TILE, DIM, DIM, True)
    lanes = tl.arange(0, TILE)
    inside = begin + lanes < end
    at = tl.cast(head, tl.int64) * tokens + begin + lanes
    delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse is not None:
        delta -= tl.load(dlse + at, mask=inside, other=0.0)
    padded = (tl.cast(head, tl.int64) * (tl.num_programs(0) // heads) + tile) * TILE
    row = rows + padded * 2 + lanes // BLOCK_M * (2 * BLOCK_M) + lanes % BLOCK_M
    tl.store(row, tl.load(lse + at, mask=inside, other=float("inf")) * LOG2E)
    tl.store(row + BLOCK_M, -delta)
    spot = lanes[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(sums + padded * DIM + spot, tl.zeros([TILE, DIM], tl.float32))


@triton.jit
def _finish_kernel(sums, dq, tiles, heads, scale, DIM: tl.constexpr, TILE: tl.constexpr):
    """Convert the sums of one tile of queries of one head."""
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    begin, _, end = read_tile(tiles, tile)
    if begin >= end:
        return
    padded = (tl.cast(head, tl.int64) * (tl.num_programs(0) // heads) + tile) * TILE
    spot = tl.arange(0, TILE)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    total = tl.load(sums + padded * DIM + spot) * scale
    store_tile(dq + head * DIM, total, begin, end, heads * DIM, TILE, DIM, DIM)


@aggregate
class _Shared:
    """Buffers, and barriers that tell when they are loaded and when both warpgroups are through with them."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    rows: gl.shared_memory_descriptor
    dscores: gl.shared_memory_descriptor
    dq: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    dout_full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, q, k, v, dout, rows, dscores, dq, k_full, v_full, q_full, dout_full, empty):  # noqa: PLR0913
        self.q = q
        self.k = k
        self.v = v
        self.dout = dout
        self.rows = rows
        self.dscores = dscores
        self.dq = dq
        self.k_full = k_full
        self.v_full = v_full
        self.q_full = q_full
        self.dout_full = dout_full
        self.empty = empty


@aggregate
class _Work:
    """One tile of keys of one head, and the queries that see it: from `first`, of these from `bare_first` all of it.

    `padded` plus a token's number is its place in the padded sums of a head, which are `stride` apart.
    """

    kv_head: gl.tensor
    group: gl.tensor
    begin: gl.tensor
    end: gl.tensor
    first: gl.tensor
    bare_first: gl.tensor
    bare_last: gl.tensor
    last: gl.tensor
    padded: gl.tensor
    stride: gl.tensor
    window: gl.tensor
    DIM: gl.constexpr
    BLOCK_M: gl.constexpr
    CAUSAL: gl.constexpr
    WINDOWED: gl.constexpr
    EARLY: gl.constexpr

    @gluon.constexpr_function
    def __init__(  # noqa: PLR0913
        self, kv_head, group, begin, end, first, bare_first, bare_last, last, padded, stride, window,
        DIM, BLOCK_M, CAUSAL, WINDOWED, EARLY,
    ):  # fmt: skip
        self.kv_head = kv_head
        self.group = group
        self.begin = begin
        self.end = end
        self.first = first
        self.bare_first = bare_first
        self.bare_last = bare_last
        self.last = last
        self.padded = padded
        self.stride = stride
        self.window = window
        self.DIM = gl.constexpr(DIM)
        self.BLOCK_M = gl.constexpr(BLOCK_M)
        self.CAUSAL = gl.constexpr(CAUSAL)
        self.WINDOWED = gl.constexpr(WINDOWED)
        self.EARLY = gl.constexpr(EARLY)


@gluon.jit
def _query_range(begin, start, end, window, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr, BLOCK_M: gl.constexpr):
    """Return the blocks of queries that see a tile of keys, and in the middle of them those that need no mask."""
    first, last = start, end
    if CAUSAL:
        first = begin
    bare_first = gl.where(begin + TILE > end, last, first)  # keys after the end must not count
    bare_last = last + BLOCK_M
    if CAUSAL:
        bare_first = begin + TILE - 1
    if WINDOWED:
        last = gl.minimum(end, begin + TILE - 1 + window)
        bare_last = gl.where(begin + window < end, begin + window, bare_last)
    bare_first = gl.minimum(first + gl.cdiv(gl.maximum(bare_first - first, 0), BLOCK_M) * BLOCK_M, last)
    bare_last = gl.minimum(first + gl.maximum(bare_last - first, 0) // BLOCK_M * BLOCK_M, last)
    return first, bare_first, gl.maximum(bare_first, bare_last), last


@gluon.jit
def _load_pair(desc, bar, buffer, row, end, column):
    """Load a tile of keys, one half for each warpgroup."""
    mbarrier.expect(bar.index(0), 2 * desc.block_type.nbytes)
    for i in gl.static_range(2):
        load(desc, place(row + i * ROWS, end, column), bar.index(0), buffer.index(i))


@gluon.jit
def _produce(shared, work, q_desc, k_desc, v_desc, dout_desc, rows_desc):
    """Load the keys and values, and one block of queries after the other as soon as there is room."""
    if work.begin < work.end:
        _load_pair(k_desc, shared.k_full, shared.k, work.begin, work.end, work.kv_head * work.DIM)
        turn = 0
        for head in range(work.kv_head * work.group, (work.kv_head + 1) * work.group):
            for at in range(work.first, work.last, work.BLOCK_M):
                stage = turn & 1
                q_bar, dout_bar = shared.q_full.index(stage), shared.dout_full.index(stage)
                mbarrier.wait(shared.empty.index(stage), (turn >> 1 & 1) ^ 1)
                mbarrier.expect(q_bar, q_desc.block_type.nbytes + rows_desc.block_type.nbytes)
                load(q_desc, place(at, work.end, head * work.DIM), q_bar, shared.q.index(stage))
                load(rows_desc, [(head * work.stride + work.padded + at) * 2], q_bar, shared.rows.index(stage))
                if turn == 0:
                    _load_pair(v_desc, shared.v_full, shared.v, work.begin, work.end, work.kv_head * work.DIM)
                mbarrier.expect(dout_bar, dout_desc.block_type.nbytes)
                load(dout_desc, place(at, work.end, head * work.DIM), dout_bar, shared.dout.index(stage))
                turn += 1


@gluon.jit
def _meet():
    """Wait for the other warpgroup, which waits here too. (Barriers up to 8 are Triton's.)"""
    gl.inline_asm_elementwise(
        "bar.sync 9, 256; mov.u32 $0, 0;", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _hide(weights, work, at, CONSUMER: gl.constexpr, layout: gl.constexpr):
    """Zero the weights of keys that a query does not see; [keys, queries]."""
    key = gl.expand_dims(work.begin + CONSUMER * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)), 1)
    if work.CAUSAL:
        query = gl.expand_dims(at + gl.arange(0, work.BLOCK_M, layout=gl.SliceLayout(0, layout)), 0)
        weights = gl.where(query >= key, weights, 0.0)
        if work.WINDOWED:
            weights = gl.where(query - key < work.window, weights, 0.0)
    else:
        weights = gl.where(key < work.end, weights, 0.0)
    return weights


@gluon.jit
def _query_gradients(shared, work, stage, zero, CONSUMER: gl.constexpr):
    """Start the product of all dscores with all keys, for this warpgroup's half of rows or of columns."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    total = gl.zeros([HALF, HALF], gl.float32, LAYOUT)
    for i in gl.static_range(2):
        dscores = shared.dscores.index(stage * 2 + i)
        k = shared.k.index(zero + i).reshape([ROWS, work.DIM])
        if work.BLOCK_M == HALF:
            k = k.slice(CONSUMER * HALF, HALF, dim=1)
        else:
            dscores = dscores.slice(CONSUMER * HALF, HALF, dim=1)
        total = warpgroup_mma(dscores.permute((1, 0)), k, total, use_acc=i > 0, is_async=True)
    return total


@gluon.jit
def _add(  # noqa: PLR0913, PLR0915
    dk,
    dv,
    turn,
    shared,
    work,
    sums_desc,
    head,
    first,
    last,
    factor,
    CONSUMER: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Add what the queries from `first` to `last` of a head give to the gradients of 64 keys and values, and theirs."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, work.BLOCK_M, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, work.DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    BLOCK_M: gl.constexpr = work.BLOCK_M
    dtype: gl.constexpr = shared.q.dtype
    nothing = gl.zeros([ROWS, BLOCK_M], gl.float32, SCORES)
    for at in range(first, last, BLOCK_M):
        stage = turn & 1
        phase = turn >> 1 & 1
        zero = turn >> 30  # which a compiler does not see: else it would keep every operand's address in registers
        q = shared.q.index(stage).reshape([BLOCK_M, work.DIM])
        dout = shared.dout.index(stage).reshape([BLOCK_M, work.DIM])
        k = shared.k.index(CONSUMER + zero).reshape([ROWS, work.DIM])
        v = shared.v.index(CONSUMER + zero).reshape([ROWS, work.DIM])
        rows = shared.rows.index(stage)

        mbarrier.wait(shared.q_full.index(stage), phase)
        scores = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(shared.dout_full.index(stage), phase)
        if MASKED:
            dweights = warpgroup_mma(v, dout.permute((1, 0)), nothing, use_acc=False, is_async=True)
        else:  # less delta from the start; with a mask there are no registers for it
            less = gl.expand_dims(rows.slice(BLOCK_M, BLOCK_M).load(COLUMNS), 0).broadcast_to([ROWS, BLOCK_M])
            dweights = warpgroup_mma(v, dout.permute((1, 0)), less, is_async=True)
        lse = gl.expand_dims(rows.slice(0, BLOCK_M).load(COLUMNS), 0)

        scores = warpgroup_mma_wait(1, deps=[scores])
        weights = gl.exp2(scores * factor - lse)
        if MASKED:
            weights = _hide(weights, work, at, CONSUMER, SCORES)
        if work.EARLY:
            operand = gl.convert_layout(weights.to(dtype), OPERAND, assert_trivial=True)
            dv = warpgroup_mma(operand, dout, dv, is_async=True)
            dweights = warpgroup_mma_wait(1, deps=[dweights])
        else:
            dweights = warpgroup_mma_wait(0, deps=[dweights])
        if MASKED:
            dweights += gl.expand_dims(rows.slice(BLOCK_M, BLOCK_M).load(COLUMNS), 0)
        dscores = (weights * dweights).to(dtype)
        if not work.EARLY:
            operand = gl.convert_layout(weights.to(dtype), OPERAND, assert_trivial=True)
            dv = warpgroup_mma(operand, dout, dv, is_async=True)
        shared.dscores.index(stage * 2 + CONSUMER).store(dscores)
        fence_async_shared()
        _meet()

        dq = _query_gradients(shared, work, stage, zero, CONSUMER)
        dscores = gl.convert_layout(dscores, OPERAND, assert_trivial=True)
        dk = warpgroup_mma(dscores, q, dk, is_async=True)
        dq, dv, operand = warpgroup_mma_wait(1, deps=[dq, dv, operand])
        tma.store_wait(0)  # of the block before, from the same buffer
        shared.dq.index(CONSUMER).store(dq)
        fence_async_shared()
        row = head * work.stride + work.padded + at
        if BLOCK_M == HALF:
            _add_to_memory(sums_desc, [row, CONSUMER * HALF], shared.dq.index(CONSUMER))
        else:
            _add_to_memory(sums_desc, [row + CONSUMER * HALF, 0], shared.dq.index(CONSUMER))
        dk, dscores = warpgroup_mma_wait(0, deps=[dk, dscores])
        mbarrier.arrive(shared.empty.index(stage), count=1)
        turn += 1
    return dk, dv, turn


@gluon.jit
def _consume(shared, work, dkv_desc, sums_desc, tokens, factor, scale, CONSUMER: gl.constexpr):
    """Write the gradients of 64 keys and values, from all query heads that read them."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, work.DIM, 16])
    dtype: gl.constexpr = shared.q.dtype
    if work.begin < work.end:
        dk = gl.zeros([ROWS, work.DIM], gl.float32, SUMS)
        dv = gl.zeros([ROWS, work.DIM], gl.float32, SUMS)
        turn = 0
        mbarrier.wait(shared.k_full.index(0), 0)
        mbarrier.wait(shared.v_full.index(0), 0)
        for head in range(work.kv_head * work.group, (work.kv_head + 1) * work.group):
            dk, dv, turn = _add(
                *(dk, dv, turn, shared, work, sums_desc, head, work.first, work.bare_first, factor, CONSUMER, True)
            )
            dk, dv, turn = _add(
                *(dk, dv, turn, shared, work, sums_desc, head, work.bare_first, work.bare_last, factor, CONSUMER, False)
            )
            if work.WINDOWED:
                dk, dv, turn = _add(
                    *(dk, dv, turn, shared, work, sums_desc, head, work.bare_last, work.last, factor, CONSUMER, True)
                )
        _meet()  # until nobody reads the keys any more: the gradients take their place
        k = shared.k.index(CONSUMER)
        v = shared.v.index(CONSUMER)
        k.reshape([ROWS, work.DIM]).store((dk * scale).to(dtype))
        v.reshape([ROWS, work.DIM]).store(dv.to(dtype))
        fence_async_shared()
        row = work.begin + CONSUMER * ROWS
        store(dkv_desc, place(row, work.end, work.kv_head * work.DIM), k)
        # The values' gradients lie `tokens` rows after the keys', and so does the end of the document there.
        store(dkv_desc, place(row + tokens, work.end + tokens, work.kv_head * work.DIM), v)
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tiles", "tokens", "kv_heads", "group", "together", "window"])
def _key_kernel(  # noqa: PLR0913
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    dkv_desc,
    rows_desc,
    sums_desc,
    tiles,
    num_tiles,
    tokens,
    kv_heads,
    group,
    together,
    window,
    factor,
    scale,
    DIM: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOWED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    EARLY: gl.constexpr,
):
    """Write the gradients of one tile of keys and values of one head, and add to the sums of queries that see it."""
    dtype: gl.constexpr = q_desc.dtype
    shared = _Shared(
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, DIM], q_desc.layout),
        gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, DIM], k_desc.layout),
        gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, DIM], v_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, DIM], dout_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 2 * BLOCK_M], rows_desc.layout),
        gl.allocate_shared_memory(dtype, [2 * STAGES, ROWS, BLOCK_M], gl.NVMMASharedLayout(128, 16, 2)),
        gl.allocate_shared_memory(gl.float32, [2, HALF, HALF], sums_desc.layout),
        *(barriers(1, 1), barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 1), barriers(STAGES, 2)),
    )
    # Programs of `together` heads come together, those with most to do, the first of a document, first.
    program = gl.program_id(0)
    first_head = program // (num_tiles * together) * together
    heads = gl.minimum(together, kv_heads - first_head)
    rest = program - first_head * num_tiles
    tile = rest // heads
    begin = gl.load(tiles + tile * 3)
    start = gl.load(tiles + tile * 3 + 1)
    end = gl.load(tiles + tile * 3 + 2)
    first, bare_first, bare_last, last = _query_range(begin, start, end, window, CAUSAL, WINDOWED, BLOCK_M)
    work = _Work(
        *(first_head + rest % heads, group, begin, end, first, bare_first, bare_last, last),
        *(tile * TILE - begin, num_tiles * TILE, window, DIM, BLOCK_M, CAUSAL, WINDOWED, EARLY),
    )
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (shared, work, dkv_desc, sums_desc, tokens, factor, scale, 0)),
            (_consume, (shared, work, dkv_desc, sums_desc, tokens, factor, scale, 1)),
            (_produce, (shared, work, q_desc, k_desc, v_desc, dout_desc, rows_desc)),
        ],
        [4, 1],
        [240, 24],
    )


_VARIANTS = (
    ("causal", Scores(scale=0.1, softcap=None, causal=True, window=None), torch.bfloat16),
    ("causal", Scores(scale=0.1, softcap=None, causal=True, window=None), torch.float16),
    ("full", Scores(scale=0.1, softcap=None, causal=False, window=None), torch.bfloat16),
    ("window", Scores(scale=0.1, softcap=None, causal=True, window=1024), torch.bfloat16),
)


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield label, kernel, arguments and keyword arguments of everything that a compiler should be tried on."""
    tiles = torch.empty((16, 3), dtype=torch.int32)
    for dim, configs in CONFIGS.items():
        x, row = torch.empty((256, 4, dim), dtype=torch.bfloat16), torch.empty(4 * 256)
        args = (x, x, row, row, tiles, row, row, 4 * dim, 4 * dim, 256, 4, dim, configs[0].blocks["BLOCK_M"], 128)
        yield f"gluon attention backward prepare head_dim={dim}", _prepare_kernel, args, {"num_warps": 8}
        args = (row, x, tiles, 4, 0.1, dim, 128)
        yield f"gluon attention backward finish head_dim={dim}", _finish_kernel, args, {"num_warps": 8}
    for name, scores, dtype in _VARIANTS:
        for dim, configs in CONFIGS.items():
            x, sums = torch.empty((256, 4, dim), dtype=dtype), torch.empty((4 * 256, dim))
            for config in configs if name == "causal" and dtype == torch.bfloat16 else configs[:1]:
                blocks = " ".join(f"{key.lower()}={value}" for key, value in config.blocks.items())
                label = f"gluon attention backward {name} {str(dtype)[6:]} head_dim={dim} {blocks}"
                arguments = _arguments((x, x, x), x, x, sums.view(-1), sums, tiles, 2, scores, config)
                yield label, _key_kernel, arguments, _options(dim, scores, config)
