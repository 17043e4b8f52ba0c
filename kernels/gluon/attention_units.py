"""Units of work of attention's backward in Gluon, a tile of keys of one head each, and the queries that see it."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# (Gluon's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

# No `from __future__ import annotations`: Triton 3.6 reads the types of an aggregate's fields as they are.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from shardwright.kernels.gluon.attention_sums import TILE
from shardwright.kernels.gluon.hopper import aggregate
from shardwright.kernels.gluon.units import Queue


@aggregate
class Job:
    """What all programs do together: tiles of keys, the first of a document, with most to do, first."""

    queue: Queue
    group: gl.tensor
    window: gl.tensor
    DIM: gl.constexpr
    BLOCK_M: gl.constexpr
    CAUSAL: gl.constexpr
    WINDOWED: gl.constexpr
    EARLY: gl.constexpr


@aggregate
class Work:
    """A tile of keys of a head, and the queries that see it: from `first`, of these from `bare_first` all of it.

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
def work_of(job, unit):
    """Return what a unit is."""
    begin, end = unit.begin, unit.end
    first, bare_first, bare_last, last = _query_range(
        begin, unit.start, end, job.window, job.CAUSAL, job.WINDOWED, job.BLOCK_M
    )
    return Work(
        *(unit.head, job.group, begin, end, first, bare_first, bare_last, last),
        *(unit.tile * TILE - begin, job.queue.num_tiles * TILE, job.window),
        *(job.DIM, job.BLOCK_M, job.CAUSAL, job.WINDOWED, job.EARLY),
    )
