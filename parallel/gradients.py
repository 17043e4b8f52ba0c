"""Norms and sums of tensors that live on different meshes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from shardwright.parallel.mesh import COPIES, TENSOR


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class LocalPart(torch.autograd.Function):
    """This process's part of a parameter, for autograd: `DTensor.to_local` at a fraction of its time on the host."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor) -> torch.Tensor:
        """Return a view of the local part."""
        ctx.parameter = parameter
        return local(parameter).view_as(local(parameter))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradient as a DTensor like the parameter."""
        return like(ctx.parameter, gradient)


def like(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return a local part as a tensor that is sharded as a parameter is."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor(part, parameter._spec, requires_grad=False)  # pyright: ignore


def accumulate(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    """Add a local gradient to a parameter's, as autograd would. Call without gradients of one's own."""
    if not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = like(parameter, gradient)
    else:
        local(parameter.grad).add_(gradient)


def sharded_over(tensor: torch.Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Return the groups of the mesh axes along which a tensor is sharded."""
    if not isinstance(tensor, DTensor):
        return ()
    sharded = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    return tuple(tensor.device_mesh.get_group(dim) for dim in sharded)


def square_norms(parts: Sequence[torch.Tensor], groups: Sequence[tuple[dist.ProcessGroup, ...]]) -> torch.Tensor:
    """Return the squared L2 norm of each whole tensor, float32 [len(parts)] (collective: one reduction per group set).

    Args:
        parts: this process's part of each tensor.
        groups: for each tensor, the groups over which its parts are spread: see `sharded_over`.
    """
    return sum_over_shards(torch.stack(torch._foreach_norm(list(parts), 2, dtype=torch.float32)).square(), groups)


def sum_over_shards(sums: torch.Tensor, groups: Sequence[tuple[dist.ProcessGroup, ...]]) -> torch.Tensor:
    """Return sums over whole tensors (collective: one reduction per group set).

    Args:
        sums: over this process's part of each tensor [number of tensors, ...].
        groups: for each tensor, the groups over which its parts are spread: see `sharded_over`.
    """
    alike: dict[tuple[dist.ProcessGroup, ...], list[int]] = defaultdict(list)
    for index, key in enumerate(groups):
        alike[key].append(index)
    rows = list(sums.unbind())
    for key, indices in alike.items():
        summed = torch.stack([rows[index] for index in indices])
        for group in key:
            dist.all_reduce(summed, group=group)
        for index, row in zip(indices, summed.unbind(), strict=True):
            rows[index] = row
    return torch.stack(rows)


def global_norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the L2 norm over all gradients as a float32 device scalar (collective over their sharded axes).

    Squares are summed over the mesh axes along which a gradient is sharded, and over no others.
    """
    gradients = list(gradients)
    squares = square_norms([local(g) for g in gradients], [sharded_over(g) for g in gradients])
    return squares.sum().sqrt()


def sum_over_tensor(parameters: Iterable[torch.Tensor]) -> None:
    """Add up, over the tensor axis, the gradients of parameters that are whole there (collective; mutates them).

    Each process has seen its own tokens, or its own query heads, so each has a summand. One message per group.
    """
    parts: dict[dist.ProcessGroup, list[torch.Tensor]] = defaultdict(list)
    for parameter in parameters:
        if isinstance(parameter, DTensor) and parameter.grad is not None:
            mesh = parameter.device_mesh
            for dim, (name, placement) in enumerate(zip(mesh.mesh_dim_names or (), parameter.placements, strict=True)):
                if name in (TENSOR, COPIES) and placement.is_replicate():
                    parts[mesh.get_group(dim)].append(local(parameter.grad))
    for group, tensors in parts.items():
        whole = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(whole, group=group)
        for tensor, summed in zip(tensors, whole.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))
