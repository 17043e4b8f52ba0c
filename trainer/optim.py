"""The optimizer: torch's fused AdamW on the local parts of the parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwright.conf.schema import AdamWConfig
from shardwright.parallel.gradients import local

_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """AdamW with clipping, and skipping of a step, decided on the device.

    torch's fused kernel divides the gradients by `grad_scale` and leaves everything as it is where `found_inf` is 1
    (the protocol of its gradient scaler). It takes plain tensors for both, so it is given the local parts of the
    parameters.

    Args:
        config: hyperparameters.
        model: its parameters are updated in place.
    """

    def __init__(self, config: AdamWConfig, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())
        self._locals = {name: nn.Parameter(local(p.detach())) for name, p in self._parameters.items()}
        decayed = [p for name, p in self._locals.items() if self._parameters[name].ndim > 1]
        rest = [p for name, p in self._locals.items() if self._parameters[name].ndim <= 1]
        self._adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=config.peak_lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        for p in self._locals.values():
            moments = {moment: torch.zeros_like(p) for moment in _MOMENTS}
            self._adamw.state[p] = {"step": torch.zeros((), device=p.device), **moments}

    @torch.no_grad()
    def step(self, *, lr: float, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        """Update the parameters from their gradients, and drop these.

        Args:
            lr: learning rate.
            grad_scale: float32 device scalar that the gradients are divided by.
            skip: bool device scalar; where true, nothing changes.
        """
        for group in self._adamw.param_groups:
            group["lr"] = lr
        for name, parameter in self._parameters.items():
            alias = self._locals[name]
            alias.data = local(parameter.detach())
            alias.grad = None if parameter.grad is None else local(parameter.grad)
        self._adamw.grad_scale, self._adamw.found_inf = grad_scale, skip.float()  # type: ignore[attr-defined]
        self._adamw.step()
        for name, parameter in self._parameters.items():
            parameter.grad = self._locals[name].grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the moments by parameter name, sharded like the parameters, and the number of updates."""
        states = {name: self._adamw.state[p] for name, p in self._locals.items()}
        moments = {
            name: {moment: _like(self._parameters[name], state[moment]) for moment in _MOMENTS}
            for name, state in states.items()
        }
        return {"num_updates": int(next(iter(states.values()))["step"].item()), "moments": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the number of updates; the moments of `state_dict` share memory with this optimizer's."""
        for p in self._locals.values():
            self._adamw.state[p]["step"].fill_(state["num_updates"])


def _like(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return part.detach()
    return DTensor.from_local(
        part.detach(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
