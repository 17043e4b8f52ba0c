"""What both forwards of attention for Hopper share: buffers, which blocks of keys a tile sees, masks, and how they end.

Shapes: P packed tokens, H query heads, D head size.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# (Gluon's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

# No `from __future__ import annotations`: Triton 3.6 reads the types of an aggregate's fields as they are.

import math
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from shardwright.kernels.gluon.hopper import aggregate, meet, pass_by, place, store
from shardwright.kernels.gluon.units import Posts, Queue
from shardwright.kernels.triton.attention_forward import Scores
from shardwright.kernels.triton.config import Config

LN2 = gl.constexpr(math.log(2))
HIDDEN = gl.constexpr(float("-inf"))  # score of a key that a query does not see
LOWEST = gl.constexpr(-1.0e30)  # what a row's highest score is at least, as it may see no key of its first block
ROWS = gl.constexpr(64)  # queries of a warpgroup
_REGISTERS = {2: (240, 24), 3: (160, 24)}  # of a thread of a consumer after the first, and of the producer
CACHED_BYTES = 16 * 2**20  # keys and values that stay in the second-level cache together


def options(dim: int, scores: Scores, config: Config) -> dict[str, Any]:
    """Return the keyword arguments of a launch."""
    return {
        "DIM": dim,
        "CAUSAL": scores.causal,
        "WINDOWED": scores.window is not None,
        "REGISTERS": _REGISTERS[config.blocks["CONSUMERS"]],
        **config.arguments,
        "enable_fp_fusion": True,
        "launch_pdl": True,
    }


@aggregate
class Shared:
    """Buffers and their barriers: `full` when loaded, `empty` when every reader is through with them.

    That keys and values have been read is said by barriers by number, see `_by_number`: to arrive there takes no
    synchronisation of the warpgroup.
    """

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    out: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    posts: Posts


@aggregate
class Work:
    """What is to be done."""

    queue: Queue
    group: gl.tensor
    window: gl.tensor
    DIM: gl.constexpr
    BLOCK_N: gl.constexpr
    CONSUMERS: gl.constexpr
    STAGES: gl.constexpr
    TURNS: gl.constexpr  # warpgroups begin their products one after the other
    CAUSAL: gl.constexpr
    WINDOWED: gl.constexpr


@gluon.jit
def _by_number(work, slot, VALUES: gl.constexpr):
    """Return the number of the barrier that says that a slot's keys, or values, are free; the last are for turns."""
    FIRST: gl.constexpr = 16 - (work.CONSUMERS if work.TURNS else 0) - (2 - VALUES) * work.STAGES
    return slot + FIRST


@gluon.jit
def release(work, slot, VALUES: gl.constexpr):
    """Tell the producer that a warpgroup is through with the keys, or values, of a slot."""
    pass_by(_by_number(work, slot, VALUES), work.CONSUMERS * 128 + 32)


@gluon.jit
def await_room(work, slot, VALUES: gl.constexpr):
    """Wait until all warpgroups are through with the keys, or values, of a slot."""
    meet(_by_number(work, slot, VALUES), work.CONSUMERS * 128 + 32)


@gluon.jit
def release_all(work):
    """Release all slots, as nobody has used them yet."""
    for i in gl.static_range(2 * work.STAGES):
        release(work, i, 0)


@gluon.jit
def await_all_room(work):
    """Wait until all warpgroups are through with everything, so that no arrival is left over."""
    for i in gl.static_range(2 * work.STAGES):
        await_room(work, i, 0)


@gluon.jit
def await_turn(work, CONSUMER: gl.constexpr):
    """Wait, if warpgroups take turns, until it is this one's."""
    if work.TURNS:
        meet(16 - work.CONSUMERS + CONSUMER, 256)


@gluon.jit
def pass_turn(work, CONSUMER: gl.constexpr):
    """Pass the turn on to the next warpgroup."""
    if work.TURNS:
        pass_by(16 - work.CONSUMERS + (CONSUMER + 1) % work.CONSUMERS, 256)


@gluon.jit
def blocks_of(work, begin, start, end):
    """Return how many blocks of keys a tile sees, from the last to the first, and where those without a mask lie.

    Returns:
        The number of the last block in its document, how many there are, and which of them, counted from the last, is
        the first that needs no mask, and the first after it that does. The very last is always masked.
    """
    stop = gl.minimum(begin + work.CONSUMERS * ROWS, end)
    if work.CAUSAL:
        high = gl.cdiv(stop - start, work.BLOCK_N)
        bare_high = (begin - start + 1) // work.BLOCK_N
    else:
        high = gl.cdiv(end - start, work.BLOCK_N)
        bare_high = (end - start) // work.BLOCK_N
    count = high
    bare_last = count
    if work.WINDOWED:
        count = high - gl.maximum(begin - start + 1 - work.window, 0) // work.BLOCK_N
        bare_last = high - gl.cdiv(gl.maximum(stop - start - work.window, 0), work.BLOCK_N)
    bare_first = gl.minimum(gl.maximum(high - bare_high, 1), count)
    return high - 1, count, bare_first, gl.minimum(gl.maximum(bare_last, bare_first), count)


@gluon.jit
def mask_scores(scores, work, ahead):
    """Hide the keys that queries do not see; [ROWS, BLOCK_N / 8, 8].

    The first query, or if not causal the document's end, lies `ahead` of the first key.
    """
    LAYOUT: gl.constexpr = scores.type.layout
    group = 8 * gl.arange(0, work.BLOCK_N // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    group = gl.expand_dims(gl.expand_dims(group, 0), 2)
    lane = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    lane = gl.expand_dims(gl.expand_dims(lane, 0), 1)
    if work.CAUSAL:
        own = gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
        own = gl.expand_dims(gl.expand_dims(own, 1), 2) + ahead - lane
        scores = gl.where(group <= own, scores, HIDDEN)
        if work.WINDOWED:
            scores = gl.where(group > own - work.window, scores, HIDDEN)
    else:
        scores = gl.where(group < ahead - lane, scores, HIDDEN)
    return scores


@gluon.jit
def is_edge(work, i, bare_first, bare_last):
    """Return whether a block after the first needs a mask."""
    edge = i < bare_first
    if work.WINDOWED:
        edge = edge | (i >= bare_last)
    return edge


@gluon.jit
def store_lse(pointer, values, row, end):
    """Write the log-sum-exp of rows of one document."""
    rows = row + gl.arange(0, ROWS, layout=values.type.layout)
    gl.store(pointer + rows, values, mask=rows < end)


@gluon.jit
def store_out(desc, values, buffer, row, end, head):
    """Start to write values from a buffer, out of which those of the unit before may still be on their way."""
    DIM: gl.constexpr = values.shape[1]
    tma.store_wait(0)
    buffer.reshape([ROWS, DIM]).store(values.to(desc.dtype))
    fence_async_shared()
    store(desc, place(row, end, head * DIM), buffer)
