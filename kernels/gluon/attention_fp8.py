"""FlashAttention forward in FP8 for Hopper.

The structure is that of attention_forward, and its parts are in attention_parts. What differs: tiles of queries, keys
and values come from `quantise`, dense and padded; the scales of a block go into the factor of its scores and the decay
of the sums before it; weights are scaled by 2^8, so that small ones keep their precision; and they need no exchange
between threads to become an operand, as values lie in the order of keys that threads have. Sums stay in the tensor
cores, which keep 14 bits: added up outside for every block, they cost 5 to 8 % of the speed, and were no more exact in
five digits.

Shapes: P packed tokens, H query heads, K key/value heads, D head size, M tiles.

Source: FlashAttention-3, arXiv 2407.08608, section 3.3.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# (Gluon's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

# No `from __future__ import annotations`: Triton 3.6 reads the types of an aggregate's fields as they are.

import math
from collections.abc import Iterator
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from shardwright.kernels.gluon.attention_parts import (
    CACHED_BYTES,
    LN2,
    LOWEST,
    ROWS,
    Shared,
    Work,
    await_all_room,
    await_room,
    blocks_of,
    is_edge,
    mask_scores,
    options,
    release,
    release_all,
    store_lse,
    store_out,
)
from shardwright.kernels.gluon.hopper import (
    VARIANTS,
    advance,
    aggregate,
    barriers,
    load,
    processors,
    ragged,
)
from shardwright.kernels.gluon.units import (
    HEADER,
    Queue,
    heads_together,
    longest_first,
    no_posts,
    post,
    receive,
    take,
)
from shardwright.kernels.gluon.weights_fp8 import exponentiate, highest, operand, pack
from shardwright.kernels.triton.attention_forward import Documents, Scores
from shardwright.kernels.triton.config import Config, pick
from shardwright.kernels.triton.launch import Address, kept, launch_kernel
from shardwright.kernels.triton.quantise import TILE, Quantised

KEYS = gl.constexpr(TILE)  # of a block


def _config(consumers: int, stages: int) -> Config:
    """Return a configuration: warpgroups, and blocks of keys in flight."""
    blocks = {"BLOCK_N": TILE, "CONSUMERS": consumers, "STAGES": stages}
    return Config(blocks=blocks, num_warps=4, num_stages=1)


CONFIGS = {128: (_config(2, 3),), 64: (_config(3, 3),)}


def forward(
    quantised: Quantised,
    documents: Documents,
    scores: Scores,
    dtype: torch.dtype,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attended values [P, H, D], and float32 [H, P], the natural logarithm of the sum of exp(scores).

    Args:
        quantised: of `quantise`, with the same documents.
        documents: where they lie.
        scores: how they are made, without a softcap.
        dtype: of the values, bf16 or fp16.
        config: None: the one to pick.
    """
    _, heads, _, dim = quantised.q_values.shape
    device = quantised.q_values.device
    config = config or pick("gluon_attention_fp8", f"head_dim={dim}", lambda: CONFIGS[dim], device)
    out = torch.empty((documents.tokens, heads, dim), dtype=dtype, device=device)
    lse = torch.empty((heads, documents.tokens), dtype=torch.float32, device=device)
    table, num_tiles = longest_first(documents, ROWS.value * config.blocks["CONSUMERS"], scores.causal)
    launch_kernel(
        _forward_kernel,
        (min(num_tiles * heads, processors(device)),),
        *_arguments(quantised, out, lse, (table, num_tiles), scores),
        **options(dim, scores, config),
    )
    return out, lse


def _dense(values: torch.Tensor, rows: int) -> TensorDescriptor:
    """Return a descriptor of blocks of so many rows, the last dim of the tensor; see `kept`."""
    width = values.shape[-1]
    return _rows(values, values.numel() // width, width, rows)


@kept
def _rows(base: Address, count: int, width: int, rows: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([rows, width], gl.float8e4nv)
    return TensorDescriptor(base, [count, width], [width, 1], [rows, width], layout)


def _arguments(
    quantised: Quantised, out: torch.Tensor, lse: torch.Tensor, tiles: tuple[torch.Tensor, int], scores: Scores
) -> tuple[Any, ...]:
    (tokens, heads, dim), (table, num_tiles) = out.shape, tiles
    kv_heads = quantised.k_values.shape[1]
    group = heads // kv_heads
    together = heads_together(kv_heads, 2 * dim * tokens, CACHED_BYTES) * group
    descriptors = (
        _dense(quantised.q_values, ROWS.value),
        _dense(quantised.k_values, TILE),
        _dense(quantised.v_values, dim),
        ragged(out, ROWS.value),
    )
    sizes = (num_tiles, quantised.q_scales.shape[1], tokens, heads, group, together, scores.window or 0)
    return *descriptors, *quantised[3:], lse, table, *sizes, math.log2(math.e) * scores.scale


@aggregate
class _Tiles:
    """Where tiles lie, and their scales, see `Quantised`."""

    firsts: gl.tensor
    q_scales: gl.tensor
    k_scales: gl.tensor
    v_scales: gl.tensor
    num: gl.tensor


@gluon.jit
def _load_rows(desc, bars, slot, buffer, row):
    mbarrier.expect(bars.index(slot), desc.block_type.nbytes)
    load(desc, [row, 0], bars.index(slot), buffer.index(slot))


@gluon.jit
def _produce(shared, work, tiles, q_desc, k_desc, v_desc):
    """Load queries, keys and values of one unit after the other, as soon as there is room."""
    STAGES: gl.constexpr = work.STAGES
    slot = 0
    phase = 0
    number = 0
    heads = work.queue.heads
    kv_heads = heads // work.group
    unit = take(work.queue)
    post(shared.posts, 0, unit)
    while unit.begin < unit.end:
        head, begin, start, end = unit.head, unit.begin, unit.start, unit.end
        first = gl.load(tiles.firsts + start)
        last, count, _, _ = blocks_of(work, begin, start, end)
        kv = (first + last) * kv_heads + head // work.group
        for i in gl.static_range(work.CONSUMERS):
            mbarrier.wait(shared.q_empty.index(i), number & 1 ^ 1)
            ahead = begin - start + i * ROWS
            row = ((first + ahead // KEYS) * heads + head) * KEYS + ahead % KEYS
            _load_rows(q_desc, shared.q_full, i, shared.q, row)
        await_room(work, slot, 0)
        _load_rows(k_desc, shared.k_full, slot, shared.k, kv * KEYS)
        for _ in range(1, count):
            next_slot, next_phase = advance(slot, phase, STAGES)
            await_room(work, next_slot, 0)
            _load_rows(k_desc, shared.k_full, next_slot, shared.k, (kv - kv_heads) * KEYS)
            await_room(work, slot, 1)
            _load_rows(v_desc, shared.v_full, slot, shared.v, kv * work.DIM)
            slot, phase = next_slot, next_phase
            kv -= kv_heads
        unit = take(work.queue)
        await_room(work, slot, 1)
        _load_rows(v_desc, shared.v_full, slot, shared.v, kv * work.DIM)
        slot, phase = advance(slot, phase, STAGES)
        number += 1
        post(shared.posts, number, unit)
    await_all_room(work)


@gluon.jit
def _by_rows(acc, rows):
    """Return sums, each row multiplied by a number."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    return acc * gl.expand_dims(gl.convert_layout(rows, LAYOUT, assert_trivial=True), 1)


@gluon.jit
def _first_scales(work, tiles, unit, first, CONSUMER: gl.constexpr):
    """Return where the scales of a unit's last block lie, those of queries, of its keys and values, and of keys before.

    `first` is the number of the first tile of the document.
    """
    exists = unit.begin < unit.end
    last, count, _, _ = blocks_of(work, unit.begin, unit.start, unit.end)
    # Rows after the last tile of the document are of no query; any scale will do.
    q_tile = first + (gl.minimum(unit.begin + CONSUMER * ROWS, unit.end - 1) - unit.start) // KEYS
    spot = unit.head // work.group * tiles.num + first + last
    q_scale = gl.load(tiles.q_scales + unit.head * tiles.num + q_tile, mask=exists, other=1.0)
    k_scale = gl.load(tiles.k_scales + spot, mask=exists, other=1.0)
    v_scale = gl.load(tiles.v_scales + spot, mask=exists, other=1.0)
    return spot, q_scale, k_scale, v_scale, gl.load(tiles.k_scales + spot - 1, mask=exists & (count > 1), other=1.0)


@gluon.jit
def _consume(shared, work, tiles, out_desc, lse, tokens, factor, CONSUMER: gl.constexpr):  # noqa: PLR0915
    """Attend from 64 queries of each unit: its `CONSUMER`-th.

    Sums are in units of the scale of the values that were added last.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 32])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, work.DIM, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    EDGES: gl.constexpr = work.WINDOWED or (work.CAUSAL and work.CONSUMERS * ROWS != KEYS)
    GROUPS: gl.constexpr = [ROWS, KEYS // 8, 8]
    q = shared.q.index(CONSUMER)
    nothing = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    slot = 0
    phase = 0
    number = 0
    release_all(work)
    unit = receive(shared.posts, 0, 4)
    first = gl.load(tiles.firsts + unit.start)
    spot, q_scale, k_scale, v_scale, next_k_scale = _first_scales(work, tiles, unit, first, CONSUMER)
    while unit.begin < unit.end:
        head, begin, start, end = unit.head, unit.begin, unit.start, unit.end
        block, count, bare_first, bare_last = blocks_of(work, begin, start, end)
        row = begin + CONSUMER * ROWS
        ahead = (row if work.CAUSAL else end) - start - block * KEYS
        mbarrier.wait(shared.q_full.index(CONSUMER), number & 1)
        mbarrier.wait(shared.k_full.index(slot), phase)
        scores = warpgroup_mma(q, shared.k.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        release(work, slot, 0)
        q_factor = q_scale * factor
        scores = mask_scores(scores.reshape(GROUPS), work, ahead)
        top = gl.maximum(highest(scores, q_factor * k_scale), LOWEST)
        weights, total = exponentiate(scores, top, q_factor * k_scale)
        weights = pack(weights)
        acc = gl.zeros([ROWS, work.DIM], gl.float32, SUMS)
        for i in range(1, count):
            ahead += KEYS
            spot -= 1
            block_factor = q_factor * next_k_scale
            next_k_scale = gl.load(tiles.k_scales + spot - 1, mask=i + 1 < count, other=1.0)
            next_v_scale = gl.load(tiles.v_scales + spot)
            k_slot, k_phase = advance(slot, phase, work.STAGES)
            v = shared.v.index(slot).permute((1, 0))
            p = operand(weights, OPERAND)
            mbarrier.wait(shared.k_full.index(k_slot), k_phase)
            scores = warpgroup_mma(q, shared.k.index(k_slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(shared.v_full.index(slot), phase)
            acc = warpgroup_mma(p, v, acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            release(work, k_slot, 0)
            scores = scores.reshape(GROUPS)
            if EDGES:  # noqa: SIM102 (one is of the compiler, the other of the GPU)
                if is_edge(work, i, bare_first, bare_last):
                    scores = mask_scores(scores, work, ahead)
            higher = gl.maximum(top, highest(scores, block_factor))
            fresh, sums = exponentiate(scores, higher, block_factor)
            fading = gl.exp2(top - higher)
            total = total * gl.expand_dims(fading, 1) + sums
            top = higher
            acc = warpgroup_mma_wait(0, deps=[acc])
            release(work, slot, 1)
            acc = _by_rows(acc, fading * (v_scale / next_v_scale))
            v_scale = next_v_scale
            weights = pack(fresh)
            slot, phase = k_slot, k_phase
        mbarrier.arrive(shared.q_empty.index(CONSUMER), count=1)
        mbarrier.wait(shared.v_full.index(slot), phase)
        p = operand(weights, OPERAND)
        acc = warpgroup_mma(p, shared.v.index(slot).permute((1, 0)), acc, is_async=True)
        number += 1
        unit = receive(shared.posts, number, 4)
        first = gl.load(tiles.firsts + unit.start)
        old_v_scale = v_scale
        spot, q_scale, k_scale, v_scale, next_k_scale = _first_scales(work, tiles, unit, first, CONSUMER)
        sums = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, SUMS), assert_trivial=True)
        top = gl.convert_layout(top, gl.SliceLayout(1, SUMS), assert_trivial=True)
        store_lse(lse + head.to(gl.int64) * tokens, (top + gl.log2(sums)) * LN2, row, end)
        acc = warpgroup_mma_wait(0, deps=[acc])
        release(work, slot, 1)
        slot, phase = advance(slot, phase, work.STAGES)
        store_out(out_desc, _by_rows(acc, old_v_scale / sums), shared.out.index(CONSUMER), row, end, head)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tiles", "num_blocks", "tokens", "heads", "group", "together", "window"])
def _forward_kernel(  # noqa: PLR0913
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    q_scales,
    k_scales,
    v_scales,
    firsts,
    lse,
    table,
    num_tiles,
    num_blocks,
    tokens,
    heads,
    group,
    together,
    window,
    factor,
    DIM: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOWED: gl.constexpr,
    BLOCK_N: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """Attend from all units that fall to this program."""
    dtype: gl.constexpr = q_desc.dtype
    shared = Shared(
        gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, DIM], q_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], k_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, DIM, BLOCK_N], v_desc.layout),
        gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, 1, 1, ROWS, DIM], out_desc.layout),
        barriers(CONSUMERS, 1),
        barriers(CONSUMERS, 1),
        barriers(STAGES, 1),
        barriers(STAGES, 1),
        no_posts(),
    )
    queue = Queue(table, table + HEADER, num_tiles, heads, together)
    work = Work(queue, group, window, DIM, BLOCK_N, CONSUMERS, STAGES, False, CAUSAL, WINDOWED)
    blocks = _Tiles(firsts, q_scales, k_scales, v_scales, num_blocks)
    fence_async_shared()
    gdc_wait()
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (shared, work, blocks, out_desc, lse, tokens, factor, 0)),
                (_consume, (shared, work, blocks, out_desc, lse, tokens, factor, 1)),
                (_produce, (shared, work, blocks, q_desc, k_desc, v_desc)),
            ],
            [4, 1],
            [REGISTERS[0], REGISTERS[1]],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (shared, work, blocks, out_desc, lse, tokens, factor, 0)),
                (_consume, (shared, work, blocks, out_desc, lse, tokens, factor, 1)),
                (_consume, (shared, work, blocks, out_desc, lse, tokens, factor, 2)),
                (_produce, (shared, work, blocks, q_desc, k_desc, v_desc)),
            ],
            [4, 4, 1],
            [REGISTERS[0], REGISTERS[0], REGISTERS[1]],
        )


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield label, kernel, arguments and keyword arguments of everything that a compiler should be tried on."""
    tiles = torch.empty((16, 3), dtype=torch.int32)
    for name, scores, dtype in VARIANTS:
        for dim, configs in CONFIGS.items():
            values, scales = torch.empty((16, 4, TILE, dim), dtype=torch.float8_e4m3fn), torch.empty((4, 16))
            quantised = Quantised(values, values, values.transpose(2, 3), *[scales] * 3, tiles.flatten())
            out, lse = torch.empty((256, 4, dim), dtype=dtype), torch.empty((4, 256))
            for config in configs if name == "causal" and dtype == torch.bfloat16 else configs[:1]:
                blocks = " ".join(f"{key.lower()}={value}" for key, value in config.blocks.items())
                label = f"gluon attention fp8 {name} {str(dtype)[6:]} head_dim={dim} {blocks}"
                arguments = _arguments(quantised, out, lse, (tiles, 14), scores)
                yield label, _forward_kernel, arguments, options(dim, scores, config)
