"""Boxes in global index space: which part of a tensor a process holds, and what two parts have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


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
        count = 1
        for size in self.sizes:
            count *= size
        return count


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


def piece_of(tensor: torch.Tensor) -> Piece:
    """Describe a plain tensor, which is whole, or a DTensor."""
    if not isinstance(tensor, DTensor):
        shape = tuple(tensor.shape)
        return Piece(shape, Box((0,) * len(shape), shape), tensor.detach())
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Piece(tuple(tensor.shape), Box(tuple(offsets), tuple(sizes)), tensor.to_local().detach())
