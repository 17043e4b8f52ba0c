"""FlashAttention backward over packed documents, for Hopper: five products a block, none of them twice.

A program is one warp that loads, one that clears sums and tells what is done, and two warpgroups with 64 keys each. All
scores are transposed, keys by queries: so weights and their gradients are operands from registers where the gradients
of values and keys are summed. For the gradients of queries both warpgroups write theirs to shared memory and then
multiply all 128 keys, each for its half of the result, which the memory adds to sums in float32. The order of these
additions is not fixed: gradients of queries may differ in their last bits from run to run, those of keys and values do
not.

That product is one block of queries late. So the warpgroups need not meet in each block, but drift apart, and one
multiplies while the other exponentiates. Also, each starts the scores of its next block before this one ends.

What comes before and after is in `attention_sums`.

Shapes: P packed tokens, H query heads, K key/value heads, G = H / K, D head size, M tiles.

Source: arXiv 2407.08608, section 3 and appendix B.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# (Gluon's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shardwright.kernels.gluon.attention_sums import (
    STATES,
    TILE,
    add_to_sums,
    await_cleared,
    clear_sums,
    convert,
    prepare,
    raise_state,
)
from shardwright.kernels.gluon.attention_units import Job, work_of
from shardwright.kernels.gluon.hopper import (
    VARIANTS,
    advance,
    aggregate,
    barriers,
    describable,
    load,
    meet,
    pass_by,
    place,
    processors,
    ragged,
    store,
)
from shardwright.kernels.gluon.units import Posts, Queue, heads_together, no_posts, post, receive, take
from shardwright.kernels.triton.attention_forward import Documents, Scores
from shardwright.kernels.triton.config import Config, pick
from shardwright.kernels.triton.launch import Address, cdiv, kept, launch_kernel

ROWS = gl.constexpr(64)  # keys of a warpgroup
STAGES = gl.constexpr(3)  # blocks of queries in shared memory: worked on, next, and on its way
FIRST = gl.constexpr(9)  # number of the first of four barriers of both warpgroups; those up to 8 are Triton's
HALF = gl.constexpr(64)  # rows, and columns, of the part of the queries' gradients that a warpgroup makes


def _config(block_m: int, early: int) -> Config:
    """Return a configuration; early: products for values are started before those for weights are waited for."""
    return Config(blocks={"BLOCK_M": block_m, "EARLY": early}, num_warps=4, num_stages=1)


CONFIGS = {128: (_config(64, 1),), 64: (_config(128, 0),)}


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
    dkv = torch.empty((2 * tokens, kv_heads, dim), dtype=k.dtype, device=k.device)
    dq = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    # As few as keep all programs busy: heads that end early are converted early, and what they read stays cached.
    together = heads_together(kv_heads, cdiv(min(documents.longest, tokens), TILE.value), processors(q.device))
    group, block = heads // kv_heads, config.blocks["BLOCK_M"]
    prepared = prepare((out, outputs[1]), (dout, gradients[1]), tiles, block, together * group, group)
    launch_kernel(
        _key_kernel,
        (min(len(tiles) * kv_heads, processors(q.device)),),
        *_arguments((q, k, v), dout, dkv, prepared, tiles, together, scores, config),
        **_options(dim, scores, config),
    )
    convert(prepared[1:], tiles, dq, together * group, group, scores)
    return dq, dkv[:tokens], dkv[tokens:]


def _arguments(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    dout: torch.Tensor,
    dkv: torch.Tensor,
    prepared: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tiles: torch.Tensor,
    together: int,
    scores: Scores,
    config: Config,
) -> tuple[Any, ...]:
    (q, k, v), (rows, sums, counters), block_m = inputs, prepared, config.blocks["BLOCK_M"]
    descriptors = (
        *(ragged(q, block_m), ragged(k, ROWS.value), ragged(v, ROWS.value), ragged(dout, block_m)),
        *(ragged(dkv, ROWS.value), _stretches(rows, rows.numel(), 2 * block_m), sums, counters),
    )
    sizes = (len(tiles), len(k), k.shape[1], q.shape[1] // k.shape[1], together, scores.window or 0)
    return *descriptors, tiles, *sizes, math.log2(math.e) * scores.scale, scores.scale


@kept
def _stretches(base: Address, length: int, size: int) -> TensorDescriptor:
    return TensorDescriptor(base, [length], [1], [size], gl.NVMMASharedLayout(0, 32, 1))


def _options(dim: int, scores: Scores, config: Config) -> dict[str, Any]:
    return {
        "DIM": dim,
        **{"CAUSAL": scores.causal, "WINDOWED": scores.window is not None},
        **config.arguments,
        "enable_fp_fusion": True,
        "launch_pdl": True,
    }


@aggregate
class _Shared:
    """Buffers, and barriers that tell when they are loaded and when both warpgroups are through with them.

    `kv_empty` also waits for the warp that announces, so that this is never more than one unit behind.
    """

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    rows: gl.shared_memory_descriptor
    dscores: gl.shared_memory_descriptor
    out: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    kv_empty: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    dout_full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    posts: Posts


@gluon.jit
def _load_pair(desc, bar, buffer, row, end, column):
    """Load a tile of keys, one half for each warpgroup."""
    mbarrier.expect(bar.index(0), 2 * desc.block_type.nbytes)
    for i in gl.static_range(2):
        load(desc, place(row + i * ROWS, end, column), bar.index(0), buffer.index(i))


@gluon.jit
def _states(job, head):
    """Return where the states of a head's tiles are."""
    return job.queue.counter + STATES + head * job.queue.num_tiles


@gluon.jit
def _produce(shared, job, q_desc, k_desc, v_desc, dout_desc, rows_desc):
    """Load the keys and values of units, and one block of queries after the other, as soon as there is room."""
    number, stage, phase = 0, 0, 0
    unit = take(job.queue)
    post(shared.posts, 0, unit)
    while unit.begin < unit.end:
        work = work_of(job, unit)
        column = work.kv_head * work.DIM
        first, last = (work.padded + work.first) // TILE, (work.padded + work.last - 1) // TILE
        await_cleared(_states(job, unit.head), first, last)
        waiting = True
        for head in range(work.kv_head * work.group, (work.kv_head + 1) * work.group):
            for at in range(work.first, work.last, work.BLOCK_M):
                q_bar, dout_bar = shared.q_full.index(stage), shared.dout_full.index(stage)
                mbarrier.wait(shared.empty.index(stage), phase ^ 1)
                mbarrier.expect(q_bar, q_desc.block_type.nbytes + rows_desc.block_type.nbytes)
                load(q_desc, place(at, work.end, head * work.DIM), q_bar, shared.q.index(stage))
                load(rows_desc, [(head * work.stride + work.padded + at) * 2], q_bar, shared.rows.index(stage))
                if waiting:
                    mbarrier.wait(shared.kv_empty.index(0), number & 1 ^ 1)
                    _load_pair(k_desc, shared.k_full, shared.k, work.begin, work.end, column)
                    _load_pair(v_desc, shared.v_full, shared.v, work.begin, work.end, column)
                mbarrier.expect(dout_bar, dout_desc.block_type.nbytes)
                load(dout_desc, place(at, work.end, head * work.DIM), dout_bar, shared.dout.index(stage))
                waiting = False
                stage, phase = advance(stage, phase, STAGES)
        number += 1
        unit = take(job.queue)
        # The unit before this one is done with: so it has been received, and may give way.
        post(shared.posts, number, unit)


@gluon.jit
def _hide(weights, work, at, CONSUMER: gl.constexpr):
    """Zero the weights of keys that a query does not see; [keys, queries], looked at as groups of 8 queries."""
    LAYOUT: gl.constexpr = weights.type.layout
    grouped = weights.reshape([ROWS, work.BLOCK_M // 8, 8])
    GROUPED: gl.constexpr = grouped.type.layout
    group = 8 * gl.arange(0, work.BLOCK_M // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, GROUPED)))[None, :, None]
    lane = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, GROUPED)))[None, None, :]
    key = gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, GROUPED)))[:, None, None]
    if work.CAUSAL:
        own = key + (work.begin + CONSUMER * ROWS - at) - lane
        grouped = gl.where(group >= own, grouped, 0.0)
        if work.WINDOWED:
            grouped = gl.where(group < own + work.window, grouped, 0.0)
    else:
        grouped = gl.where(key < work.end - work.begin - CONSUMER * ROWS, grouped, 0.0)
    return gl.convert_layout(grouped.reshape([ROWS, work.BLOCK_M]), LAYOUT, assert_trivial=True)


@gluon.jit
def _columns(row, LAYOUT: gl.constexpr):
    """Return numbers of queries, from shared memory, for all keys."""
    values = row.load(gl.SliceLayout(0, LAYOUT))
    return gl.expand_dims(values, 0).broadcast_to([ROWS, row.shape[0]])


@gluon.jit
def _start_scores(shared, work, stage, phase, zero, exists, CONSUMER: gl.constexpr):
    """Start the scores of 64 keys for a block of queries, once it is loaded; of anything if it does not exist."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, work.BLOCK_M, 16])
    mbarrier.wait(shared.q_full.index(stage), phase, pred=exists)
    q = shared.q.index(stage).reshape([work.BLOCK_M, work.DIM]).permute((1, 0))
    k = shared.k.index(CONSUMER + zero).reshape([ROWS, work.DIM])
    nothing = gl.zeros([ROWS, work.BLOCK_M], gl.float32, LAYOUT)
    return warpgroup_mma(k, q, nothing, use_acc=False, is_async=True)


@gluon.jit
def _await_other(step, CONSUMER: gl.constexpr):
    """Wait until the other warpgroup has ended the step before: it has written its dscores, and read those before."""
    meet(FIRST + 3 - CONSUMER - step, 256)


@gluon.jit
def _end_step(step, CONSUMER: gl.constexpr):
    """Tell the other warpgroup that this one has ended a step."""
    pass_by(FIRST + CONSUMER + step, 256)


@gluon.jit
def _query_gradients(shared, work, turn, zero, CONSUMER: gl.constexpr):
    """Start the product of all dscores of a block with all keys, for this warpgroup's half of rows or of columns."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    total = gl.zeros([HALF, HALF], gl.float32, LAYOUT)
    for i in gl.static_range(2):
        dscores = shared.dscores.index((turn & 1) * 2 + i)
        k = shared.k.index(zero + i).reshape([ROWS, work.DIM])
        if work.BLOCK_M == HALF:
            k = k.slice(CONSUMER * HALF, HALF, dim=1)
        else:
            dscores = dscores.slice(CONSUMER * HALF, HALF, dim=1)
        total = warpgroup_mma(dscores.permute((1, 0)), k, total, use_acc=i > 0, is_async=True)
    return total


@gluon.jit
def _add(dk, dv, scores, turn, step, stage, phase, more, shared, work, sums, at, row, factor, CONSUMER: gl.constexpr):  # noqa: PLR0913
    """Add what a block of queries gives to the gradients of 64 keys and values, and what the one before it is given.

    Returns:
        The gradients of keys and values, and the scores of the next block, if there is one.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, work.BLOCK_M, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, work.DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    BLOCK_M: gl.constexpr = work.BLOCK_M
    dtype: gl.constexpr = shared.q.dtype
    zero = turn >> 30  # which a compiler does not see: else it would keep every operand's address in registers
    q = shared.q.index(stage).reshape([BLOCK_M, work.DIM])
    dout = shared.dout.index(stage).reshape([BLOCK_M, work.DIM])
    v = shared.v.index(CONSUMER + zero).reshape([ROWS, work.DIM])
    rows = shared.rows.index(stage)

    mbarrier.wait(shared.dout_full.index(stage), phase)
    less = _columns(rows.slice(BLOCK_M, BLOCK_M), SCORES)
    dweights = warpgroup_mma(v, dout.permute((1, 0)), less, is_async=True)
    weights = gl.exp2(scores * factor + _columns(rows.slice(0, BLOCK_M), SCORES))
    if (at < work.bare_first) | (at >= work.bare_last):
        weights = _hide(weights, work, at, CONSUMER)
    if work.EARLY:
        weights_operand = gl.convert_layout(weights.to(dtype), OPERAND, assert_trivial=True)
        dv = warpgroup_mma(weights_operand, dout, dv, is_async=True)
        dweights = warpgroup_mma_wait(1, deps=[dweights])
    else:
        dweights = warpgroup_mma_wait(0, deps=[dweights])
    dscores = (weights * dweights).to(dtype)
    if not work.EARLY:
        weights_operand = gl.convert_layout(weights.to(dtype), OPERAND, assert_trivial=True)
        dv = warpgroup_mma(weights_operand, dout, dv, is_async=True)
    _await_other(step, CONSUMER)
    shared.dscores.index((turn & 1) * 2 + CONSUMER).store(dscores)
    fence_async_shared()

    dq = _query_gradients(shared, work, turn + 1, zero, CONSUMER)  # of the block before: the other's are there
    dscores_operand = gl.convert_layout(dscores, OPERAND, assert_trivial=True)
    dk = warpgroup_mma(dscores_operand, q, dk, is_async=True)
    dv, weights_operand = warpgroup_mma_wait(3, deps=[dv, weights_operand])  # all but dq, two products, and dk
    stage_after, phase_after = advance(stage, phase, STAGES)
    scores = _start_scores(shared, work, stage_after, phase_after, zero, more, CONSUMER)
    dq = warpgroup_mma_wait(2, deps=[dq])
    if turn > 0:
        add_to_sums(sums + (row.to(gl.int64) * work.DIM + CONSUMER * HALF * HALF), dq)
    # None goes on into the next round: ptxas lets no products overlap if one that does reads or makes registers there.
    dk, dscores_operand, scores = warpgroup_mma_wait(0, deps=[dk, dscores_operand, scores])
    mbarrier.arrive(shared.empty.index(stage))
    _end_step(step, CONSUMER)
    return dk, dv, scores, stage_after, phase_after


@gluon.jit
def _clear_ahead(job, unit, sums):
    """Clear sums of this tile: of the heads that come when those are done that are done together with this one."""
    queue = job.queue
    head = unit.head + queue.together
    if (unit.begin < unit.end) & (head < queue.heads):
        for i in range(job.group):
            row = ((head * job.group + i) * queue.num_tiles + unit.tile) * TILE
            clear_sums(sums + row.to(gl.int64) * job.DIM, TILE * job.DIM)
        raise_state(_states(job, head) + unit.tile)


@gluon.jit
def _announce(shared, job, sums):
    """Clear sums, and tell the next kernel what both warpgroups have added; in a warp that may wait for memory."""
    number = 0
    unit = receive(shared.posts, 0, 1)
    _clear_ahead(job, unit, sums)
    while unit.begin < unit.end:
        mbarrier.arrive(shared.kv_empty.index(0))  # received: without it, the post could give way to a later one unread
        after = receive(shared.posts, number + 1, 1)
        _clear_ahead(job, after, sums)
        mbarrier.wait(shared.kv_empty.index(0), number & 1)
        raise_state(_states(job, unit.head) + unit.tile)
        number += 1
        unit = after


@gluon.jit
def _consume(shared, job, dkv_desc, sums, tokens, factor, scale, CONSUMER: gl.constexpr):
    """Write the gradients of 64 keys and values of one unit after the other, from all query heads that read them."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, job.DIM, 16])
    dtype: gl.constexpr = shared.q.dtype
    out = shared.out.index(CONSUMER)
    number, stage, phase, step = 0, 0, 0, 0
    _end_step(2, CONSUMER)
    unit = receive(shared.posts, 0, 4)
    while unit.begin < unit.end:
        work = work_of(job, unit)
        dk = gl.zeros([ROWS, work.DIM], gl.float32, SUMS)
        dv = gl.zeros([ROWS, work.DIM], gl.float32, SUMS)
        # Never 0; that the compiler sees it saves a way past the loop, for which ptxas would overlap no products.
        count = gl.maximum(gl.cdiv(work.last - work.first, work.BLOCK_M) * work.group, 1)
        at = work.first
        row = work.kv_head * work.group * work.stride + work.padded  # of the head's first token, padded
        mbarrier.wait(shared.k_full.index(0), number & 1)
        scores = _start_scores(shared, work, stage, phase, count >> 30, True, CONSUMER)
        mbarrier.wait(shared.v_full.index(0), number & 1)
        scores = warpgroup_mma_wait(0, deps=[scores])
        last = row  # of the block before
        for turn in range(count):
            dk, dv, scores, stage, phase = _add(
                *(dk, dv, scores, turn, step, stage, phase, turn + 1 < count, shared, work, sums, at, last, factor),
                CONSUMER,
            )
            last = row + at
            step ^= 2
            at += work.BLOCK_M
            done = at >= work.last
            at = gl.where(done, work.first, at)
            row += gl.where(done, work.stride, 0)
        _await_other(step, CONSUMER)
        dq = _query_gradients(shared, work, count + 1, count >> 30, CONSUMER)
        dq = warpgroup_mma_wait(0, deps=[dq])
        _end_step(step, CONSUMER)
        step ^= 2
        add_to_sums(sums + (last.to(gl.int64) * work.DIM + CONSUMER * HALF * HALF), dq)
        mbarrier.arrive(shared.kv_empty.index(0))
        begin = work.begin + CONSUMER * ROWS
        tma.store_wait(0)  # of the unit before
        out.reshape([ROWS, work.DIM]).store(dv.to(dtype))
        fence_async_shared()
        # The values' gradients lie `tokens` rows after the keys', and so does the end of the document there.
        store(dkv_desc, place(begin + tokens, work.end + tokens, work.kv_head * work.DIM), out)
        tma.store_wait(0)
        out.reshape([ROWS, work.DIM]).store((dk * scale).to(dtype))
        fence_async_shared()
        store(dkv_desc, place(begin, work.end, work.kv_head * work.DIM), out)
        number += 1
        unit = receive(shared.posts, number, 4)
    _await_other(step, CONSUMER)  # no arrival is left over
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tiles", "tokens", "kv_heads", "group", "together", "window"])
def _key_kernel(  # noqa: PLR0913
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    dkv_desc,
    rows_desc,
    sums,
    counters,
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
    """Write the gradients of tiles of keys and values, and add to the sums of queries that see them."""
    dtype: gl.constexpr = q_desc.dtype
    shared = _Shared(
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, DIM], q_desc.layout),
        gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, DIM], k_desc.layout),
        gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, DIM], v_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, DIM], dout_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 2 * BLOCK_M], rows_desc.layout),
        gl.allocate_shared_memory(dtype, [4, ROWS, BLOCK_M], gl.NVMMASharedLayout(128, 16, 2)),
        gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, DIM], dkv_desc.layout),
        *(barriers(1, 1), barriers(1, 1), barriers(1, 3)),
        *(barriers(STAGES, 1), barriers(STAGES, 1), barriers(STAGES, 2), no_posts()),
    )
    queue = Queue(counters, tiles, num_tiles, kv_heads, together)
    job = Job(queue, group, window, DIM, BLOCK_M, CAUSAL, WINDOWED, EARLY)
    fence_async_shared()
    gdc_wait()
    gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_consume, (shared, job, dkv_desc, sums, tokens, factor, scale, 0)),
            (_consume, (shared, job, dkv_desc, sums, tokens, factor, scale, 1)),
            (_produce, (shared, job, q_desc, k_desc, v_desc, dout_desc, rows_desc)),
            (_announce, (shared, job, sums)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield label, kernel, arguments and keyword arguments of everything that a compiler should be tried on."""
    tiles = torch.empty((16, 3), dtype=torch.int32)
    for name, scores, dtype in VARIANTS:
        for dim, configs in CONFIGS.items():
            x, rows = torch.empty((256, 4, dim), dtype=dtype), torch.empty(4 * 256 * dim)
            prepared = (rows, rows, torch.empty(1, dtype=torch.int32))
            for config in configs if name == "causal" and dtype == torch.bfloat16 else configs[:1]:
                blocks = " ".join(f"{key.lower()}={value}" for key, value in config.blocks.items())
                label = f"gluon attention backward {name} {str(dtype)[6:]} head_dim={dim} {blocks}"
                arguments = _arguments((x, x, x), x, x, prepared, tiles, 2, scores, config)
                yield label, _key_kernel, arguments, _options(dim, scores, config)
