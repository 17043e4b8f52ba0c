"""Sharded data parallelism over FSDP2: all state split over `shard` and `context`, copied over `replicate`.

ZeRO-3 form: each block's weights are gathered before its forward and again before its backward, and freed in between.
ZeRO-2 form: they are gathered before the step's first forward and freed after its last backward. Either way the next
block's weights are fetched while one computes, and gradients are reduced once per step, in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from shardwright.parallel.mesh import Mesh


def shard(
    model: nn.Module, blocks: Sequence[nn.Module], mesh: Mesh, compute_dtype: torch.dtype, *, free_after_forward: bool
) -> None:
    """Shard every block and then the rest (collective; mutates the model).

    Gradients are summed, not averaged: the loss is already divided by the step's global token count.

    Args:
        model: or one stage of it.
        blocks: modules of it that are gathered as one, in the order in which they run.
        mesh: live.
        compute_dtype: of weights and activations; the sharded weights stay as they are.
        free_after_forward: ZeRO-3 form.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    sharded = [
        fully_shard(module, mesh=mesh.get_weights(), mp_policy=policy, reshard_after_forward=free_after_forward)
        for module in (*blocks, model)
    ]
    for module in sharded:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for earlier, later in itertools.pairwise(sharded[:-1]):
        earlier.set_modules_to_forward_prefetch([later])
        later.set_modules_to_backward_prefetch([earlier])


def expect_backward(model: nn.Module, *, last: bool, free: bool) -> None:
    """Prepare for the next backward.

    Args:
        model: what `shard` was given.
        last: the step's last one for this model, which reduces the gradients; others only accumulate them.
        free: free the weights after it (ZeRO-3 form; after the last one they are freed in any form).
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last or free)
        model.set_is_last_backward(last or free)


def reduce_gradients(model: nn.Module) -> None:
    """Reduce gradients that were accumulated outside of a backward, and free the weights (collective)."""
    if not isinstance(model, FSDPModule):
        return
    expect_backward(model, last=True, free=True)
    root = _state(model)
    for group in _groups(root):
        group.post_backward()
    root._root_post_backward_final_callback()


def accumulate_gradients(model: nn.Module) -> None:
    """Move gradients in the compute dtype, left outside of a backward, to the float32 accumulators."""
    if isinstance(model, FSDPModule):
        for group in _groups(_state(model)):
            for parameter in group.fsdp_params:
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()


def free_weights(model: nn.Module) -> None:
    """Free gathered weights, for example after an evaluation in ZeRO-2 form."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _state(model: FSDPModule) -> Any:
    return fully_shard.state(model)  # type: ignore[attr-defined]  # the contract of composable APIs


def _groups(root: Any) -> list[Any]:
    """Return the parameter groups of a root and all below it: of each module a list, before torch 2.13 one or none."""
    groups = []
    for state in root._state_ctx.all_states:
        several = getattr(state, "_fsdp_param_groups", None)
        groups += [state._fsdp_param_group] if several is None else several
    return [group for group in groups if group is not None]
