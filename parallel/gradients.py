"""One gradient norm over parameters that live on different meshes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from shardwright.parallel.mesh import DATA_AXES, Mesh


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the L2 norm over all gradients as a float32 device scalar (collective over their sharded axes).

    Squares are summed over the mesh axes along which a gradient is sharded, and over no others.
    """
    parts: dict[tuple[dist.ProcessGroup, ...], list[torch.Tensor]] = defaultdict(list)
    for gradient in gradients:
        groups: tuple[dist.ProcessGroup, ...] = ()
        if isinstance(gradient, DTensor):
            sharded = [dim for dim, placement in enumerate(gradient.placements) if isinstance(placement, Shard)]
            groups = tuple(gradient.device_mesh.get_group(dim) for dim in sharded)
        parts[groups].append(local(gradient))
    squares = []
    for groups, tensors in parts.items():
        square = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).square().sum()
        for group in groups:
            dist.all_reduce(square, group=group)
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def sum_over_data(mesh: Mesh, tensor: torch.Tensor) -> torch.Tensor:
    """Add up a small tensor over the processes that read different sequences (collective; mutates and returns it)."""
    for axis in DATA_AXES:
        if mesh.degrees[axis] > 1:
            dist.all_reduce(tensor, group=mesh.get(axis).get_group())
    return tensor
