"""The mesh of processes: its arithmetic needs no process group, its groups are made by `start`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import debug

if TYPE_CHECKING:
    from shardwright.conf.schema import ParallelConfig

AXES = ("pipeline", "replicate", "shard", "context", "tensor")
DATA_AXES = ("replicate", "shard")
LOSS_AXES = ("pipeline", "replicate", "shard", "context")  # along these, each process has a part of the loss

TENSOR, HEADS, COPIES = "tensor", "tensor_heads", "tensor_copies"  # the last two: tensor, where heads are copied
_WEIGHTS = "shard_context"  # weights are sharded over both axes as one, since both see different tokens


class TopologyError(Exception):
    """The processes do not form the mesh that was asked for. The text is value, rule and remedy."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Degrees of the axes, outermost first, and one rank's place among them.

    Attributes:
        degrees: axis -> number of processes along it.
        rank: the global rank whose place this is.
        device_mesh: the live groups, with `shard` and `context` as one dim; None before `start`.
        axes_mesh: the same with one dim per axis.
    """

    degrees: dict[str, int]
    rank: int
    device_mesh: DeviceMesh | None = None
    axes_mesh: DeviceMesh | None = None

    @classmethod
    def of(cls, config: ParallelConfig, *, num_processes: int, rank: int) -> Mesh:
        """Lay `num_processes` out as the config says; `shard: auto` takes what the other axes leave.

        Raises:
            TopologyError: the degrees do not multiply to the number of processes.
        """
        asked = {axis: getattr(config, axis) for axis in AXES}
        fixed = math.prod(degree for degree in asked.values() if degree != "auto")
        shown = " x ".join(f"{axis}={degree}" for axis, degree in asked.items() if degree != 1) or "1"
        if "auto" in asked.values() and num_processes % fixed == 0:
            asked = {axis: num_processes // fixed if degree == "auto" else degree for axis, degree in asked.items()}
        elif "auto" in asked.values() or fixed != num_processes:
            rule = "a multiple of" if "auto" in asked.values() else "exactly"
            raise TopologyError(
                f"parallel: {shown} cannot be laid out on {num_processes} processes; it needs {rule} {fixed}; start "
                f"torchrun --nproc-per-node {fixed}, or set parallel.shard=auto and degrees that divide {num_processes}"
            )
        return cls(degrees=asked, rank=rank)

    @property
    def num_processes(self) -> int:
        """Number of processes in the mesh."""
        return math.prod(self.degrees.values())

    @property
    def data_degree(self) -> int:
        """Number of process groups that read different sequences."""
        return math.prod(self.degrees[axis] for axis in DATA_AXES)

    @property
    def data_rank(self) -> int:
        """This rank's place among those that read different sequences."""
        return self.coordinate("replicate") * self.degrees["shard"] + self.coordinate("shard")

    def coordinate(self, axis: str) -> int:
        """Return this rank's index along an axis."""
        inner = math.prod(self.degrees[name] for name in AXES[AXES.index(axis) + 1 :])
        return self.rank // inner % self.degrees[axis]

    def start(self, device_type: str) -> Mesh:
        """Create the groups (collective; the default process group must exist) and return the live mesh."""
        # Or DTensors get an equal mesh of an earlier start from torch's cache, and with it groups that are gone.
        getattr(debug, "_clear_sharding_prop_cache", lambda: None)()
        pipeline, replicate, shard, context, tensor = (self.degrees[axis] for axis in AXES)
        device_mesh = init_device_mesh(
            device_type,
            (pipeline, replicate, shard * context, tensor),
            mesh_dim_names=("pipeline", "replicate", _WEIGHTS, TENSOR),
        )
        axes_mesh = device_mesh._unflatten(2, (shard, context), ("shard", "context"))
        return replace(self, device_mesh=device_mesh, axes_mesh=axes_mesh)

    def get(self, axis: str) -> DeviceMesh:
        """Return the live one-dimensional mesh of an axis.

        Raises:
            TopologyError: the axis does not exist, or the mesh was not started.
        """
        if self.axes_mesh is None or axis not in AXES:
            live = AXES if self.axes_mesh is not None else ()
            raise TopologyError(f"axis {axis} is not live; live are {live}; call start() first, use those names")
        return self.axes_mesh[axis]

    def get_weights(self) -> DeviceMesh:
        """Return the live mesh that FSDP2 shards weights over: (replicate, shard x context), or the latter alone."""
        assert self.device_mesh is not None
        return self.device_mesh["replicate", _WEIGHTS] if self.degrees["replicate"] > 1 else self.device_mesh[_WEIGHTS]

    def get_group(self, axis: str) -> dist.ProcessGroup:
        """Return the live process group of an axis; raises as `get`."""
        return self.get(axis).get_group()

    def sum(self, tensor: torch.Tensor, axes: Sequence[str]) -> torch.Tensor:
        """Add up a small tensor over some axes (collective; mutates and returns it)."""
        for axis in axes:
            if self.degrees[axis] > 1:
                dist.all_reduce(tensor, group=self.get_group(axis))
        return tensor

    def __str__(self) -> str:
        """Show the axes that are in use."""
        used = " x ".join(f"{axis}={degree}" for axis, degree in self.degrees.items() if degree > 1)
        return f"{self.num_processes} process{'es' if self.num_processes > 1 else ''} ({used or 'no parallelism'})"


def make_group(ranks: list[int], description: str) -> dist.ProcessGroup:
    """Make a process group of global ranks (collective among these alone)."""
    group = dist.new_group(ranks, use_local_synchronization=True, group_desc=description)
    assert isinstance(group, dist.ProcessGroup)
    return group
