"""The optimizers, AdamW and LAMB: `kernels.optimizer` on the local parts of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from shardwright.conf.schema import LambConfig, OptimConfig
from shardwright.kernels import optimizer
from shardwright.kernels.optimizer import Hyper, Now, Part
from shardwright.parallel.gradients import like, local, sharded_over, sum_over_shards


class Parameterised(Protocol):
    """A module, or several under one name each."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return all parameters with their names in the plain model."""
        ...


class Optimizer:
    """AdamW or LAMB, with clipping, and skipping of a step, decided on the device.

    Norms and biases are not decayed, nor scaled by a ratio of norms; LAMB's norms are those of whole parameters, over
    all their shards.

    Args:
        config: hyperparameters; a `LambConfig` asks for LAMB.
        model: its parameters are updated in place.
        update: an implementation of `kernels.optimizer`.
    """

    def __init__(
        self, config: OptimConfig, model: Parameterised, update: Callable[..., None] = optimizer.OP.reference
    ) -> None:
        self._parameters, self._update = dict(model.named_parameters()), update
        self._is_lamb = isinstance(config, LambConfig)
        self._hyper = Hyper(beta1=config.beta1, beta2=config.beta2, eps=config.eps, weight_decay=config.weight_decay)
        self._moments = {
            name: {moment: torch.zeros_like(local(p.detach())) for moment in ("exp_avg", "exp_avg_sq")}
            for name, p in self._parameters.items()
        }
        self._num_updates = torch.zeros((), device=next(iter(self._parameters.values())).device)

    @torch.no_grad()
    def step(self, *, lr: float, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        """Update the parameters from their gradients, and drop these.

        Args:
            lr: learning rate.
            grad_scale: float32 device scalar that the gradients are divided by.
            skip: bool device scalar; where true, nothing changes.
        """
        self._num_updates += ~skip
        now = Now(lr=lr, step=self._num_updates, grad_scale=grad_scale, skip=skip)
        used = [name for name, p in self._parameters.items() if p.grad is not None]
        matrices = [name for name in used if self._parameters[name].ndim > 1]
        others = [name for name in used if self._parameters[name].ndim <= 1]
        if matrices:
            sum_squares = partial(self._sum_squares, matrices) if self._is_lamb else None
            self._update(self._parts(matrices), now, self._hyper, sum_squares)
        if others:
            self._update(self._parts(others), now, replace(self._hyper, weight_decay=0.0))
        for parameter in self._parameters.values():
            parameter.grad = None

    def _parts(self, names: Iterable[str]) -> list[Part]:
        pairs = [(self._parameters[name], self._moments[name]) for name in names]
        return [Part(param=local(p), grad=local(p.grad), **moments) for p, moments in pairs if p.grad is not None]

    def _sum_squares(self, names: Iterable[str], squares: torch.Tensor) -> torch.Tensor:
        return sum_over_shards(squares, [sharded_over(self._parameters[name]) for name in names])

    def state_dict(self) -> dict[str, Any]:
        """Return the moments by parameter name, sharded like the parameters, and the number of updates."""
        moments = {
            name: {moment: like(self._parameters[name], part) for moment, part in parts.items()}
            for name, parts in self._moments.items()
        }
        return {"num_updates": int(self._num_updates.item()), "moments": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the number of updates; the moments of `state_dict` share memory with this optimizer's."""
        self._num_updates.fill_(state["num_updates"])
