"""Sharded data parallelism over FSDP2: all state split over `shard`, copied over `replicate`."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from shardwright.parallel.mesh import Mesh
from shardwright.parallel.plan import ParallelPlan


def shard(model: nn.Module, plan: ParallelPlan, mesh: Mesh, compute_dtype: torch.dtype) -> None:
    """Shard every block and then the rest (collective; mutates the model).

    Gradients are summed in float32, not averaged: the loss is already divided by the step's global token count.
    """
    axes = ("replicate", "shard") if mesh.degrees["replicate"] > 1 else ("shard",)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    modules = dict(model.named_modules())
    for module in [*(modules[name] for name in plan.match_blocks(modules)), model]:
        sharded = fully_shard(module, mesh=mesh.get(*axes), mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Reduce gradients in the next backward, or only accumulate them."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
