"""How a kernel of attention visits only the blocks that lists name: in tokens counted along a list.

A place along a list is the number of listed tokens before it. Ranges of tokens become ranges along the list, tiles step
through them as they do through tokens, and only the loads of a tile ask which token a place is.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK = tl.constexpr(128)  # blocks of a list that are read at once


def list_arguments(lists: torch.Tensor | None) -> tuple[torch.Tensor | None, int | None, int | None]:
    """Return lists as a kernel takes them: with the distances from head to head, and from block to block."""
    if lists is None:
        return None, None, None
    return lists, 0 if lists.shape[0] == 1 else lists.stride(0), lists.stride(1)


@triton.jit
def list_of(lists, head_stride, block_stride, head, block):
    """Return the list of a block of one head: a count, then blocks, ascending."""
    return lists + tl.cast(head, tl.int64) * head_stride + tl.cast(block, tl.int64) * block_stride


@triton.jit
def _reached(token, first, size):
    """Return how many tokens of blocks lie before a token."""
    return tl.minimum(tl.maximum(token - first, 0), size)


@triton.jit
def along(row, start, first, last, bare_first, bare_last, LISTED: tl.constexpr, TILE: tl.constexpr):
    """Return a range of tokens of the document from `start` on, and the bare range in it, as places along a list.

    The range begins where a tile does, so that none crosses from one block to the next.
    """
    lanes = tl.arange(0, CHUNK)
    count = tl.load(row)
    firsts = tl.zeros([CHUNK], tl.int32)
    lasts = tl.zeros([CHUNK], tl.int32)
    bare_firsts = tl.zeros([CHUNK], tl.int32)
    bare_lasts = tl.zeros([CHUNK], tl.int32)
    for at in range(0, count, CHUNK):
        listed = at + lanes < count
        begin = start + tl.load(row + 1 + at + lanes, mask=listed, other=0) * LISTED
        size = tl.where(listed, LISTED, 0)
        firsts += _reached(first, begin, size)
        lasts += _reached(last, begin, size)
        bare_firsts += _reached(bare_first, begin, size)
        bare_lasts += _reached(bare_last, begin, size)
    return tl.sum(firsts, 0) // TILE * TILE, tl.sum(lasts, 0), tl.sum(bare_firsts, 0), tl.sum(bare_lasts, 0)


@triton.jit
def token_at(place, end, row, start, LISTED: tl.constexpr):
    """Return the token at a place along a list; any token from the place `end` on.

    A loop asks for the token of its next tile, as loads whose addresses wait for another load are not pipelined.
    """
    return start + tl.load(row + 1 + place // LISTED, mask=place < end, other=0) * LISTED + place % LISTED
