"""A plain model made parallel from outside, in one visible order."""

from __future__ import annotations

import torch
from torch import nn

from shardwright.parallel.init import fill_initial_values
from shardwright.parallel.mesh import Mesh, TopologyError
from shardwright.parallel.plan import ParallelPlan
from shardwright.parallel.shard import shard

SERVED = ("replicate", "shard")


def check_served(mesh: Mesh) -> None:
    """Refuse degrees along axes that `apply` does not implement.

    Raises:
        TopologyError: such an axis has a degree above 1.
    """
    for axis, degree in mesh.degrees.items():
        if degree > 1 and axis not in SERVED:
            raise TopologyError(
                f"parallel.{axis}={degree} is not served yet; this version runs {' and '.join(SERVED)}; "
                f"set parallel.{axis}=1"
            )


def apply(
    model: nn.Module, plan: ParallelPlan, mesh: Mesh, *, device: torch.device, compute_dtype: torch.dtype, seed: int
) -> nn.Module:
    """Shard a model made on the meta device, give it memory and initial values (collective; mutates the model).

    One process computing in float32 gets the plain model, untouched: the specification of all layouts.

    Raises:
        PlanError: the plan does not fit the model.
    """
    if mesh.data_degree > 1 or compute_dtype != torch.float32:
        shard(model, plan, mesh, compute_dtype)
    model.to_empty(device=device)
    fill_initial_values(model, plan, seed)
    return model
