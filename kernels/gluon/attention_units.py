"""Units of work of attention's backward in Gluon, a tile of keys of one head each, and how programs come by them.

Programs are persistent. The warp of each that loads takes the next unit from a counter in memory, and posts its number
for the other warps.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# (Gluon's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

# No `from __future__ import annotations`: Triton 3.6 reads the types of an aggregate's fields as they are.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from shardwright.kernels.gluon.attention_sums import TILE
from shardwright.kernels.gluon.hopper import aggregate, barriers


@aggregate
class Job:
    """What all programs do together; a unit of it is one tile of keys of one head.

    Units of `together` heads come together, those with most to do, the first of a document, first.
    """

    counter: gl.tensor
    tiles: gl.tensor
    num_tiles: gl.tensor
    kv_heads: gl.tensor
    group: gl.tensor
    together: gl.tensor
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
def _place(job, unit):
    """Return the row of a unit's tile in the table of tiles, and its head."""
    first_head = unit // (job.num_tiles * job.together) * job.together
    heads = gl.minimum(job.together, job.kv_heads - first_head)
    rest = unit - first_head * job.num_tiles
    return rest // heads, first_head + rest % heads


@gluon.jit
def work_of(job, unit):
    """Return what a unit is."""
    tile, kv_head = _place(job, unit)
    row = job.tiles + tile * 3
    begin, start, end = gl.load(row), gl.load(row + 1), gl.load(row + 2)
    first, bare_first, bare_last, last = _query_range(
        begin, start, end, job.window, job.CAUSAL, job.WINDOWED, job.BLOCK_M
    )
    return Work(
        *(kv_head, job.group, begin, end, first, bare_first, bare_last, last),
        *(tile * TILE - begin, job.num_tiles * TILE, job.window),
        *(job.DIM, job.BLOCK_M, job.CAUSAL, job.WINDOWED, job.EARLY),
    )


@gluon.jit
def _is_empty(job, unit):
    """Return whether a unit exists and has nothing to do: rows of the table are left over."""
    row = job.tiles + _place(job, unit)[0] * 3
    exists = unit < job.num_tiles * job.kv_heads
    return gl.load(row, mask=exists, other=0) >= gl.load(row + 2, mask=exists, other=1)


@gluon.jit
def take(job):
    """Return the number of the next unit that nobody has taken; one after the last if there is none."""
    unit = gl.atomic_add(job.counter, 1)
    while _is_empty(job, unit):
        unit = gl.atomic_add(job.counter, 1)
    return unit


@aggregate
class Posts:
    """Numbers of the program's present and next unit, in turn, and barriers that tell that they are there."""

    units: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor


@gluon.jit
def no_posts():
    """Return room for posts, in shared memory."""
    return Posts(gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])), barriers(2, 1))


@gluon.jit
def post(posts, count, unit):
    """Tell the warpgroups which unit comes after `count` others; the one before the last must be done with."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    posts.units.index(count & 1).store(gl.full([1], unit, gl.int32, LAYOUT))
    mbarrier.arrive(posts.full.index(count & 1))


@gluon.jit
def receive(posts, count):
    """Return, to a warpgroup, which unit comes after `count` others."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(posts.full.index(count & 1), count >> 1 & 1)
    return gl.max(posts.units.index(count & 1).load(LAYOUT), 0)
