"""FlashAttention forward over packed documents, for Hopper: loads, products and softmax overlap.

A program is one warp that loads tiles and two or three warpgroups that attend from 64 queries each. A warpgroup starts
the scores of its next block of keys before it multiplies the weights of this one, so that the tensor cores work while
it exponentiates. Blocks go from the last key to the first: only those at the edges of what a tile sees are masked.
A persistent program goes through many tiles, and loads the next while it stores the last.

Shapes: P packed tokens, H query heads, K key/value heads, G = H / K, D head size, N documents, M tiles.

Source: arXiv 2407.08608.
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
    await_turn,
    blocks_of,
    is_edge,
    mask_scores,
    options,
    pass_turn,
    release,
    release_all,
    store_lse,
    store_out,
)
from shardwright.kernels.gluon.hopper import (
    VARIANTS,
    advance,
    barriers,
    describable,
    load,
    place,
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
from shardwright.kernels.triton.attention_forward import Documents, Scores
from shardwright.kernels.triton.config import Config, pick
from shardwright.kernels.triton.launch import launch_kernel


def _config(consumers: int, stages: int, turns: int) -> Config:
    """Return a configuration: warpgroups, blocks of keys in flight, and whether warpgroups take turns."""
    blocks = {"BLOCK_N": 128, "CONSUMERS": consumers, "STAGES": stages, "TURNS": turns}
    return Config(blocks=blocks, num_warps=4, num_stages=1)


CONFIGS = {128: (_config(2, 2, 0),), 64: (_config(3, 3, 1),)}


def forward(
    q_PHD: torch.Tensor,
    k_PKD: torch.Tensor,
    v_PKD: torch.Tensor,
    documents: Documents,
    scores: Scores,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attended values [P, H, D], and float32 [H, P], the natural logarithm of the sum of exp(scores).

    Args:
        q_PHD: queries; any stride between tokens.
        k_PKD: keys.
        v_PKD: values.
        documents: where they lie.
        scores: how they are made, without a softcap.
        config: None: the one to pick.
    """
    tokens, heads, dim = q_PHD.shape
    config = config or pick("gluon_attention_forward", f"head_dim={dim}", lambda: CONFIGS[dim], q_PHD.device)
    q, k, v = (describable(x) for x in (q_PHD, k_PKD, v_PKD))
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    block = ROWS.value * config.blocks["CONSUMERS"]
    table, num_tiles = longest_first(documents, block, scores.causal)
    launch_kernel(
        _forward_kernel,
        (min(num_tiles * heads, processors(q.device)),),
        *_arguments((q, k, v), out, lse, (table, num_tiles), scores, config),
        **options(dim, scores, config),
    )
    return out, lse


def _arguments(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    tiles: tuple[torch.Tensor, int],
    scores: Scores,
    config: Config,
) -> tuple[Any, ...]:
    (q, k, v), (tokens, heads, dim) = inputs, inputs[0].shape
    (kv_heads, keys), (table, num_tiles) = (k.shape[1], config.blocks["BLOCK_N"]), tiles
    group = heads // kv_heads
    together = heads_together(kv_heads, 2 * k.element_size() * dim * tokens, CACHED_BYTES) * group
    descriptors = (ragged(q, ROWS.value), ragged(k, keys), ragged(v, keys), ragged(out, ROWS.value))
    sizes = (num_tiles, tokens, heads, group, together, scores.window or 0)
    return *descriptors, lse, table, *sizes, math.log2(math.e) * scores.scale


@gluon.jit
def _load_tile(desc, bars, slot, buffer, row, end, column):
    mbarrier.expect(bars.index(slot), desc.block_type.nbytes)
    load(desc, place(row, end, column), bars.index(slot), buffer.index(slot))


@gluon.jit
def _produce(shared, work, q_desc, k_desc, v_desc):
    """Load queries, keys and values of one unit after the other, as soon as there is room."""
    STAGES: gl.constexpr = work.STAGES
    slot = 0
    phase = 0
    number = 0
    unit = take(work.queue)
    post(shared.posts, 0, unit)
    while unit.begin < unit.end:
        head, begin, start, end = unit.head, unit.begin, unit.start, unit.end
        last, count, _, _ = blocks_of(work, begin, start, end)
        column = head // work.group * work.DIM
        row = start + last * work.BLOCK_N
        for i in gl.static_range(work.CONSUMERS):
            mbarrier.wait(shared.q_empty.index(i), number & 1 ^ 1)
            _load_tile(q_desc, shared.q_full, i, shared.q, begin + i * ROWS, end, head * work.DIM)
        await_room(work, slot, 0)
        _load_tile(k_desc, shared.k_full, slot, shared.k, row, end, column)
        for _ in range(1, count):
            next_slot, next_phase = advance(slot, phase, STAGES)
            await_room(work, next_slot, 0)
            _load_tile(k_desc, shared.k_full, next_slot, shared.k, row - work.BLOCK_N, end, column)
            await_room(work, slot, 1)
            _load_tile(v_desc, shared.v_full, slot, shared.v, row, end, column)
            slot, phase = next_slot, next_phase
            row -= work.BLOCK_N
        unit = take(work.queue)  # no earlier: all might wait at the end for one taken early
        await_room(work, slot, 1)
        _load_tile(v_desc, shared.v_full, slot, shared.v, row, end, column)
        slot, phase = advance(slot, phase, STAGES)
        number += 1
        # The queries of the unit before this one have been read: so it has been received, and may give way.
        post(shared.posts, number, unit)
    await_all_room(work)


@gluon.jit
def _exponentiate(scores, top, factor):
    """Return the weights of scores that are at most `top`, scaled by the factor, and parts of their sums [ROWS, 8]."""
    weights = gl.exp2(scores * factor - gl.expand_dims(gl.expand_dims(top, 1), 1))
    return weights, gl.sum(weights, 1)


@gluon.jit
def _operand(weights, work, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """Return weights as the tensor cores take them, from registers that they already are in."""
    return gl.convert_layout(weights.reshape([ROWS, work.BLOCK_N]).to(dtype), LAYOUT, assert_trivial=True)


@gluon.jit
def _consume(shared, work, out_desc, lse, tokens, factor, CONSUMER: gl.constexpr):  # noqa: PLR0915
    """Attend from 64 queries of each unit: its `CONSUMER`-th.

    Scores are looked at as groups of 8 keys. Every thread has two of each, for two rows: the numbers of the groups are
    numbers in the code, and sums over groups stay within the thread.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, work.BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, work.DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    # Blocks need a mask after the first only where a window ends, or where a tile sees its last keys in two blocks.
    EDGES: gl.constexpr = work.WINDOWED or (work.CAUSAL and work.CONSUMERS * ROWS != work.BLOCK_N)
    GROUPS: gl.constexpr = [ROWS, work.BLOCK_N // 8, 8]
    dtype: gl.constexpr = out_desc.dtype
    q = shared.q.index(CONSUMER).reshape([ROWS, work.DIM])
    slot = 0
    phase = 0
    number = 0
    release_all(work)
    if CONSUMER == work.CONSUMERS - 1:
        pass_turn(work, CONSUMER)
    unit = receive(shared.posts, 0, 4)
    while unit.begin < unit.end:
        head, begin, start, end = unit.head, unit.begin, unit.start, unit.end
        block, count, bare_first, bare_last = blocks_of(work, begin, start, end)
        row = begin + CONSUMER * ROWS
        ahead = (row if work.CAUSAL else end) - start - block * work.BLOCK_N
        mbarrier.wait(shared.q_full.index(CONSUMER), number & 1)
        mbarrier.wait(shared.k_full.index(slot), phase)
        k = shared.k.index(slot).reshape([work.BLOCK_N, work.DIM])
        nothing = gl.zeros([ROWS, work.BLOCK_N], gl.float32, SCORES)
        scores = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        release(work, slot, 0)
        scores = mask_scores(scores.reshape(GROUPS), work, ahead)
        top = gl.maximum(gl.max(gl.max(scores, 1), 1) * factor, LOWEST)
        weights, total = _exponentiate(scores, top, factor)
        weights = _operand(weights, work, dtype, OPERAND)
        acc = gl.zeros([ROWS, work.DIM], gl.float32, SUMS)
        for i in range(1, count):
            ahead += work.BLOCK_N
            k_slot, k_phase = advance(slot, phase, work.STAGES)
            k = shared.k.index(k_slot).reshape([work.BLOCK_N, work.DIM])
            v = shared.v.index(slot).reshape([work.BLOCK_N, work.DIM])
            mbarrier.wait(shared.k_full.index(k_slot), k_phase)
            await_turn(work, CONSUMER)
            scores = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(shared.v_full.index(slot), phase)
            acc = warpgroup_mma(weights, v, acc, is_async=True)
            pass_turn(work, CONSUMER)
            scores = warpgroup_mma_wait(1, deps=[scores])
            release(work, k_slot, 0)
            scores = scores.reshape(GROUPS)
            if EDGES:  # noqa: SIM102 (one is of the compiler, the other of the GPU)
                if is_edge(work, i, bare_first, bare_last):
                    scores = mask_scores(scores, work, ahead)
            higher = gl.maximum(top, gl.max(gl.max(scores, 1), 1) * factor)
            fresh, part = _exponentiate(scores, higher, factor)
            decay = gl.exp2(top - higher)
            total = total * gl.expand_dims(decay, 1) + part
            top = higher
            acc = warpgroup_mma_wait(0, deps=[acc])
            release(work, slot, 1)
            acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, SUMS), assert_trivial=True), 1)
            weights = _operand(fresh, work, dtype, OPERAND)
            slot, phase = k_slot, k_phase
        mbarrier.arrive(shared.q_empty.index(CONSUMER), count=1)
        mbarrier.wait(shared.v_full.index(slot), phase)
        v = shared.v.index(slot).reshape([work.BLOCK_N, work.DIM])
        acc = warpgroup_mma(weights, v, acc, is_async=True)
        number += 1
        unit = receive(shared.posts, number, 4)
        sums = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, SUMS), assert_trivial=True)
        top = gl.convert_layout(top, gl.SliceLayout(1, SUMS), assert_trivial=True)
        store_lse(lse + head.to(gl.int64) * tokens, (top + gl.log2(sums)) * LN2, row, end)
        acc = warpgroup_mma_wait(0, deps=[acc])
        release(work, slot, 1)
        slot, phase = advance(slot, phase, work.STAGES)
        store_out(out_desc, acc * gl.expand_dims(1 / sums, 1), shared.out.index(CONSUMER), row, end, head)
    if CONSUMER == 0:  # no arrival is left over
        await_turn(work, CONSUMER)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tiles", "tokens", "heads", "group", "together", "window"])
def _forward_kernel(  # noqa: PLR0913
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    lse,
    table,
    num_tiles,
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
    TURNS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """Attend from all units that fall to this program."""
    dtype: gl.constexpr = q_desc.dtype
    shared = Shared(
        gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, DIM], q_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, DIM], k_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, DIM], v_desc.layout),
        gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, DIM], out_desc.layout),
        barriers(CONSUMERS, 1),
        barriers(CONSUMERS, 1),
        barriers(STAGES, 1),
        barriers(STAGES, 1),
        no_posts(),
    )
    queue = Queue(table, table + HEADER, num_tiles, heads, together)
    work = Work(queue, group, window, DIM, BLOCK_N, CONSUMERS, STAGES, TURNS, CAUSAL, WINDOWED)
    fence_async_shared()
    gdc_wait()
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (shared, work, out_desc, lse, tokens, factor, 0)),
                (_consume, (shared, work, out_desc, lse, tokens, factor, 1)),
                (_produce, (shared, work, q_desc, k_desc, v_desc)),
            ],
            [4, 1],
            [REGISTERS[0], REGISTERS[1]],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (shared, work, out_desc, lse, tokens, factor, 0)),
                (_consume, (shared, work, out_desc, lse, tokens, factor, 1)),
                (_consume, (shared, work, out_desc, lse, tokens, factor, 2)),
                (_produce, (shared, work, q_desc, k_desc, v_desc)),
            ],
            [4, 4, 1],
            [REGISTERS[0], REGISTERS[0], REGISTERS[1]],
        )


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield label, kernel, arguments and keyword arguments of everything that a compiler should be tried on."""
    integers = torch.empty(48, dtype=torch.int32)
    for name, scores, dtype in VARIANTS:
        for dim, configs in CONFIGS.items():
            x, lse = torch.empty((256, 4, dim), dtype=dtype), torch.empty((4, 256))
            for config in configs if name == "causal" and dtype == torch.bfloat16 else configs[:1]:
                blocks = " ".join(f"{key.lower()}={value}" for key, value in config.blocks.items())
                label = f"gluon attention forward {name} {str(dtype)[6:]} head_dim={dim} {blocks}"
                arguments = _arguments((x, x, x), x, lse, (integers, 14), scores, config)
                yield label, _forward_kernel, arguments, options(dim, scores, config)
