"""Units of attention for Hopper, a tile of tokens of one head each, and how persistent programs come by them.

The warp of a program that loads takes the next unit from a counter in memory, and posts it for the other warps: so all
programs end at about the same time, however unlike their tiles.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# (Gluon's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

# No `from __future__ import annotations`: Triton 3.6 reads the types of an aggregate's fields as they are.

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from shardwright.kernels.gluon.hopper import aggregate, barriers, uniform
from shardwright.kernels.triton.attention_forward import Documents
from shardwright.kernels.triton.launch import cdiv, launch_kernel

HEADER = gl.constexpr(4)  # integers before the table of `longest_first`: the counter, and as many as keep it aligned
_FIELDS = gl.constexpr(5)  # of a unit


@lru_cache
def heads_together(kv_heads: int, size: int, limit: int) -> int:
    """Return how many key heads programs go through together: as many as divide them and fit the limit, or one."""
    return max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and (n == 1 or n * size <= limit))


def longest_first(documents: Documents, block: int, causal: bool) -> tuple[torch.Tensor, int]:
    """Return int32 [HEADER + 3 * M], a counter at 0, then what Documents.tiles has, in another order; and M.

    Tiles that see the most keys come first, empty ones last.
    """
    count = documents.bounds.numel() - 1
    num_tiles = min(documents.tokens // block + count, count * cdiv(documents.longest, block))
    table = torch.empty(HEADER.value + 3 * num_tiles, dtype=torch.int32, device=documents.bounds.device)
    launch_kernel(_order_kernel, (count + 1,), documents.bounds, table, count, num_tiles, BLOCK=block, CAUSAL=causal)
    return table, num_tiles


@triton.jit(do_not_specialize=["num_documents", "num_tiles"])
def _order_kernel(bounds, table, num_documents, num_tiles, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """Write the tiles of one document where they belong among all; as the last program, the counter and empty ones."""
    tiles = table + HEADER
    document = tl.program_id(0)
    lanes = tl.arange(0, 64)
    start = tl.load(bounds + document)
    end = tl.load(bounds + document + 1, mask=document < num_documents, other=0)
    count = tl.cdiv(tl.maximum(end - start, 0), BLOCK)
    for at in range(0, tl.where(document < num_documents, count, 1), 64):
        index = at + lanes
        rank = tl.zeros([64], tl.int32)
        total = 0
        for first in range(0, num_documents, 64):
            other = first + lanes
            known = other < num_documents
            begin = tl.load(bounds + other, mask=known, other=0)
            size = tl.cdiv(tl.load(bounds + other + 1, mask=known, other=0) - begin, BLOCK)
            total += tl.sum(size, 0)
            before = (other < document)[None, :]
            if CAUSAL:  # a tile sees as many blocks as there are tiles up to it
                ahead = tl.maximum(size[None, :] - index[:, None] - 1, 0)
                ahead += (before & (size[None, :] > index[:, None])).to(tl.int32)
            else:
                ahead = tl.where((size[None, :] > count) | (before & (size[None, :] == count)), size[None, :], 0)
                ahead += tl.zeros([64, 64], tl.int32)
            rank += tl.sum(ahead, 1)
        if not CAUSAL:
            rank += index
        row = tiles + rank * 3
        tl.store(row, start + index * BLOCK, mask=index < count)
        tl.store(row + 1, start, mask=index < count)
        tl.store(row + 2, end, mask=index < count)
        if document == num_documents:
            tl.store(table, 0)
            for empty in range(total * 3, num_tiles * 3, 64):
                tl.store(tiles + empty + lanes, 0, mask=empty + lanes < num_tiles * 3)


@aggregate
class Queue:
    """All units: `together` heads of the first tile, of the second and so on, then as many heads more.

    Attributes:
        counter: of units that were taken.
        tiles: first token of each, first token of its document, and the token after that; with most to do first.
        num_tiles: M.
        heads: H.
        together: divides H.
    """

    counter: gl.tensor
    tiles: gl.tensor
    num_tiles: gl.tensor
    heads: gl.tensor
    together: gl.tensor


@aggregate
class Unit:
    """A tile of one head: its number, its first token, and its document's first and end. None if `begin` is the end."""

    tile: gl.tensor
    head: gl.tensor
    begin: gl.tensor
    start: gl.tensor
    end: gl.tensor


@gluon.jit
def _reserve(queue):
    """Return the number of a unit that nobody else gets, of one after the last if there is none."""
    return uniform(gl.atomic_add(queue.counter, 1, sem="relaxed"))


@gluon.jit
def _look_up(queue, number):
    chunk = queue.num_tiles * queue.together
    tile = number % chunk // queue.together
    row = queue.tiles + tile * 3
    exists = number < queue.num_tiles * queue.heads
    begin = uniform(gl.load(row, mask=exists, other=0))
    start = uniform(gl.load(row + 1, mask=exists, other=0))
    end = uniform(gl.load(row + 2, mask=exists, other=0))
    return Unit(tile, number // chunk * queue.together + number % queue.together, begin, start, end)


@gluon.jit
def take(queue):
    """Return the next unit that nobody has taken and that is not empty."""
    number = _reserve(queue)
    unit = _look_up(queue, number)
    while (unit.begin >= unit.end) & (number < queue.num_tiles * queue.heads):
        number = _reserve(queue)
        unit = _look_up(queue, number)
    return unit


@aggregate
class Posts:
    """A program's present and next unit, in turn, and barriers that tell that they are there."""

    units: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor


@gluon.jit
def no_posts():
    """Return room for posts, in shared memory."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return Posts(gl.allocate_shared_memory(gl.int32, [2 * _FIELDS, 1], layout), barriers(2, 1))


@gluon.jit
def post(posts, count, unit):
    """Tell the other warps which unit comes after `count` others; all must have received the one before the last."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    fields = (unit.tile, unit.head, unit.begin, unit.start, unit.end)
    for i in gl.static_range(_FIELDS):
        posts.units.index((count & 1) * _FIELDS + i).store(gl.full([1], fields[i], gl.int32, LAYOUT))
    mbarrier.arrive(posts.full.index(count & 1))


@gluon.jit
def _field(posts, count, WHICH: gl.constexpr, WARPS: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return uniform(gl.max(posts.units.index((count & 1) * _FIELDS + WHICH).load(LAYOUT), 0))


@gluon.jit
def receive(posts, count, WARPS: gl.constexpr):
    """Return, to so many warps, the unit that comes after `count` others."""
    mbarrier.wait(posts.full.index(count & 1), count >> 1 & 1)
    tile, head = _field(posts, count, 0, WARPS), _field(posts, count, 1, WARPS)
    begin, start, end = _field(posts, count, 2, WARPS), _field(posts, count, 3, WARPS), _field(posts, count, 4, WARPS)
    return Unit(tile, head, begin, start, end)


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield label, kernel, arguments and keyword arguments of everything that a compiler should be tried on."""
    integers = torch.empty(48, dtype=torch.int32)
    for causal in (True, False):
        label = f"attention order {'causal' if causal else 'full'}"
        yield label, _order_kernel, (integers, integers, 15, 14), {"BLOCK": 128, "CAUSAL": causal}
