"""Boxes in global index space: which part of a tensor a process holds, and what two parts have in common."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from shardwright.checkpoint.errors import CheckpointError


@dataclass(frozen=True)
class Box:
    """An axis-aligned block: first index and extent along every dim."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def intersect(self, other: Box) -> Box | None:
        """Return what both cover, or None."""
        starts = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True))
        ends = tuple(
            min(a + m, b + n) for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        if any(end <= start for start, end in zip(starts, ends, strict=True)):
            return None
        return Box(starts, tuple(end - start for start, end in zip(starts, ends, strict=True)))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Return this box as slices of a tensor that holds `outer`."""
        return tuple(slice(o - p, o - p + n) for o, p, n in zip(self.offsets, outer.offsets, self.sizes, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


@dataclass(frozen=True)
class Piece:
    """The part of a global tensor that this process holds.

    Attributes:
        shape: shape of the global tensor.
        box: which part of it `tensor` is.
        tensor: the local data, sharing memory with its owner.
    """

    shape: tuple[int, ...]
    box: Box
    tensor: torch.Tensor


@dataclass(frozen=True)
class FlatSlice:
    """A run of a tensor's elements in row-major order, such as the shard that ZeRO gives a process of it.

    Attributes:
        shape: shape of the global tensor.
        start: index of the first element in the flattened tensor.
        tensor: the elements, one-dimensional and contiguous, sharing memory with their owner.
    """

    shape: tuple[int, ...]
    start: int
    tensor: torch.Tensor


def pieces_of(tensor: torch.Tensor | FlatSlice) -> list[Piece]:
    """Return what this process holds of a tensor: a plain one is whole, a DTensor its shard, a flat slice its boxes.

    Raises:
        CheckpointError: a DTensor whose value is a sum that is still to be made.
    """
    if isinstance(tensor, FlatSlice):
        flat, first, pieces = tensor.tensor.detach(), 0, []
        for box in decompose(tensor.shape, tensor.start, tensor.start + flat.numel()):
            pieces.append(Piece(tensor.shape, box, flat[first : first + box.numel].view(box.sizes)))
            first += box.numel
        return pieces
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return [Piece(shape, Box((0,) * len(shape), shape), tensor.detach())]
    if any(placement.is_partial() for placement in tensor.placements):
        raise CheckpointError(
            f"a tensor of shape {shape} is a pending sum ({tensor.placements}); redistribute it first"
        )
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return [Piece(shape, Box(tuple(offsets), tuple(sizes)), tensor.to_local().detach())]


def decompose(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Cut the run [start, stop) of a row-major tensor into boxes, in order: at most two per dim, and one more.

    Source: ByteCheckpoint (arXiv 2407.20143, section 3.2), which so avoids to gather irregular tensors.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield Box((start,) * len(shape), (stop - start,) * len(shape))
        return
    row = math.prod(shape[1:])
    first_whole, end_whole = -(-start // row), stop // row
    if first_whole > end_whole:  # within one row
        yield from _in_row(shape, end_whole, start - end_whole * row, stop - end_whole * row)
        return
    yield from _in_row(shape, first_whole - 1, start - (first_whole - 1) * row, row)
    if end_whole > first_whole:
        yield Box((first_whole, *(0 for _ in shape[1:])), (end_whole - first_whole, *shape[1:]))
    yield from _in_row(shape, end_whole, 0, stop - end_whole * row)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    for box in decompose(shape[1:], start, stop):
        yield Box((row, *box.offsets), (1, *box.sizes))
