"""Many tensors in one launch: tables on the device of where they lie, and of what each program has to do."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from shardwright.kernels.triton.launch import cdiv, launch_kernel

_PER_LAUNCH = 128  # addresses that one launch writes down; the arguments of a kernel hold about 500
_NOWHERE = 1 << 62  # stands for the address of an empty tensor, which is 0: all must look like 64-bit integers
_MAX_KEPT = 64  # tables; gradients take few sets of addresses in turn, if not the same in every step


@triton.jit
def write_addresses(table, values, COUNT: tl.constexpr):
    """Write a tuple of integers; that Triton takes all for multiples of 16, if the first ones are, is no matter."""
    for i in tl.static_range(COUNT):
        tl.store(table + i, values[i])


@dataclass(frozen=True, kw_only=True, eq=False)
class Addresses:
    """Where the data of tensors lies.

    Attributes:
        table: one after the other, int64 on their device, with something behind the last.
        aligned: of each row of tensors, whether all lie at multiples of 16 bytes.
    """

    table: torch.Tensor
    aligned: tuple[bool, ...]


def addresses(tensors: Sequence[torch.Tensor], width: int) -> Addresses:
    """Return where the data of some tensors of one device lies, in rows of `width` tensors.

    The table is written by kernels that get the addresses as arguments, so no memory of the host has to outlive the
    call, and a CUDA graph holds the addresses as it holds those of any other kernel: in its own nodes. It is written
    once, and taken again on the same stream as long as no address changes; within a graph it is always written.
    """
    found = tuple([x.data_ptr() or _NOWHERE for x in tensors])  # a list first, which takes less time
    device = tensors[0].device
    if device.type != "cuda":
        return _kept(found, width, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _write(found, width, device)
    return _kept(found, width, device, torch.cuda.current_stream(device).cuda_stream)


def _write(found: tuple[int, ...], width: int, device: torch.device) -> Addresses:
    aligned = tuple([all(x % 16 == 0 for x in found[i : i + width]) for i in range(0, len(found), width)])
    padded = found + (_NOWHERE,) * (-len(found) % _PER_LAUNCH)
    table = torch.empty(len(padded), dtype=torch.int64, device=device)
    for begin in range(0, len(padded), _PER_LAUNCH):
        part = padded[begin : begin + _PER_LAUNCH]
        launch_kernel(write_addresses, (1,), table[begin:], part, COUNT=_PER_LAUNCH, num_warps=1)
    return Addresses(table=table, aligned=aligned)


@lru_cache(_MAX_KEPT)
def _kept(found: tuple[int, ...], width: int, device: torch.device, stream: int) -> Addresses:
    """Of each stream its own: another could read a table before it is written, or after its memory is taken again."""
    return _write(found, width, device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tiles:
    """Tensors cut into tiles of one program each, kind by kind.

    Attributes:
        sizes: elements of each tensor, int64 [tensors].
        first: first tile of each tensor, int32 [tensors].
        owner: tensor of each tile, int32 [tiles].
        ranges: for each kind (dtype, and whether a thread may take several elements at once) its first tile, and how
            many there are; a launch is for one kind.
    """

    sizes: torch.Tensor
    first: torch.Tensor
    owner: torch.Tensor
    ranges: dict[tuple[torch.dtype, bool], tuple[int, int]]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """In the order of the kernels."""
        return [self.sizes, self.first, self.owner]


@cache
def tiles_of(
    sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    aligned: tuple[tuple[bool, ...], ...],
    block: int,
    device: torch.device,
) -> Tiles:
    """Return the tiles of some tensors; made once, before any CUDA graph that uses them is captured, and then kept.

    Args:
        sizes: elements of each tensor.
        dtypes: of each.
        aligned: whether each lies at multiples of 16 bytes, by one or more `Addresses`.
        block: elements of a tile; the last of a tensor has what is left.
        device: of the tensors.
    """
    wide = [all(flags) and size % 16 == 0 for size, *flags in zip(sizes, *aligned, strict=True)]
    kinds = list(zip(dtypes, wide, strict=True))
    counts = [cdiv(size, block) for size in sizes]
    order, first, ranges, total = [], [0] * len(sizes), {}, 0
    for kind in dict.fromkeys(kinds):
        begin = total
        for i in (i for i, other in enumerate(kinds) if other == kind):
            order.append(i)
            first[i] = total
            total += counts[i]
        ranges[kind] = (begin, total - begin)
    owner = torch.tensor(order, dtype=torch.int32).repeat_interleave(torch.tensor([counts[i] for i in order]))
    return Tiles(
        sizes=torch.tensor(sizes, dtype=torch.int64, device=device),
        first=torch.tensor(first, dtype=torch.int32, device=device),
        owner=owner.to(device),
        ranges=ranges,
    )


@triton.jit
def tile_at(sizes, first, owner, begin, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Return tile number `begin` + program, its tensor, where it starts in it, and how many elements it has."""
    tile = begin + tl.program_id(0)
    tensor = tl.load(owner + tile)
    start = (tile - tl.load(first + tensor)).to(tl.int64) * BLOCK
    left = tl.minimum(tl.load(sizes + tensor) - start, BLOCK).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    return tile, tensor, start, left


@triton.jit
def pointer_at(entry, start, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to element `start` of the tensor in an entry of a table of addresses."""
    pointer = tl.load(entry).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield (label, kernel, arguments, keyword arguments) of everything that a GPU would compile."""
    args = (torch.empty(_PER_LAUNCH, dtype=torch.int64), (_NOWHERE,) * _PER_LAUNCH)
    yield "optimizer addresses", write_addresses, args, {"COUNT": _PER_LAUNCH, "num_warps": 1}
