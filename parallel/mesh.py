"""The mesh of processes: its arithmetic needs no process group, its groups are made by `start`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

if TYPE_CHECKING:
    from shardwright.conf.schema import ParallelConfig

AXES = ("pipeline", "replicate", "shard", "context", "tensor")
DATA_AXES = ("replicate", "shard")


class TopologyError(Exception):
    """The processes do not form the mesh that was asked for. The text is value, rule and remedy."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Degrees of the axes, outermost first, and one rank's place among them.

    Attributes:
        degrees: axis -> number of processes along it.
        rank: the global rank whose place this is.
        device_mesh: the live groups, or None before `start`.
    """

    degrees: dict[str, int]
    rank: int
    device_mesh: DeviceMesh | None = None

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
        shape = tuple(self.degrees[axis] for axis in AXES)
        return replace(self, device_mesh=init_device_mesh(device_type, shape, mesh_dim_names=AXES))

    def get(self, *axes: str) -> DeviceMesh:
        """Return the live sub-mesh of the named axes.

        Raises:
            TopologyError: an axis does not exist, or the mesh was not started.
        """
        unknown = [axis for axis in axes if axis not in AXES]
        if self.device_mesh is None or unknown:
            live = AXES if self.device_mesh is not None else ()
            raise TopologyError(f"axes {axes} are not live; live are {live}; call start() first, use those names")
        return self.device_mesh[axes]

    def __str__(self) -> str:
        """Show the axes that are in use."""
        used = " x ".join(f"{axis}={degree}" for axis, degree in self.degrees.items() if degree > 1)
        return f"{self.num_processes} process{'es' if self.num_processes > 1 else ''} ({used or 'no parallelism'})"
