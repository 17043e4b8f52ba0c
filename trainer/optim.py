"""The optimizers, AdamW and LAMB: both are torch's fused Adam kernel on the local parts of the parameters."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

from shardwright.conf.schema import AdamWConfig, LambConfig, OptimConfig
from shardwright.parallel.gradients import like, local, sharded_over, square_norms

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Parameterised(Protocol):
    """A module, or several under one name each."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return all parameters with their names in the plain model."""
        ...


class Optimizer(abc.ABC):
    """Adam's moments, with clipping, and skipping of a step, decided on the device.

    torch's fused kernel divides the gradients by `grad_scale` and leaves everything as it is where `found_inf` is 1
    (the protocol of its gradient scaler). It takes plain tensors for both, so it is given the local parts of the
    parameters.

    Args:
        config: hyperparameters.
        model: its parameters are updated in place.
        kernel_decay: weight decay that the kernel itself applies, to all but norms and biases.
    """

    def __init__(self, config: OptimConfig, model: Parameterised, *, kernel_decay: float) -> None:
        self._parameters = dict(model.named_parameters())
        self._locals = {name: nn.Parameter(local(p.detach())) for name, p in self._parameters.items()}
        decayed = [p for name, p in self._locals.items() if self._parameters[name].ndim > 1]
        rest = [p for name, p in self._locals.items() if self._parameters[name].ndim <= 1]
        self._adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": kernel_decay}, {"params": rest, "weight_decay": 0.0}],
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
        for name, parameter in self._parameters.items():
            alias = self._locals[name]
            alias.data = local(parameter.detach())
            alias.grad = None if parameter.grad is None else local(parameter.grad)
        self._adamw.grad_scale, self._adamw.found_inf = grad_scale, skip.float()  # type: ignore[attr-defined]
        self._update(lr, skip)
        for name, parameter in self._parameters.items():
            parameter.grad = self._locals[name].grad = None

    @abc.abstractmethod
    def _update(self, lr: float, skip: torch.Tensor) -> None:
        """Update `_locals`, which share memory with the parameters and hold the gradients."""

    def _run_kernel(self, lr: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the moments by parameter name, sharded like the parameters, and the number of updates."""
        states = {name: self._adamw.state[p] for name, p in self._locals.items()}
        moments = {
            name: {moment: like(self._parameters[name], state[moment].detach()) for moment in _MOMENTS}
            for name, state in states.items()
        }
        return {"num_updates": int(next(iter(states.values()))["step"].item()), "moments": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the number of updates; the moments of `state_dict` share memory with this optimizer's."""
        for p in self._locals.values():
            self._adamw.state[p]["step"].fill_(state["num_updates"])


class AdamW(Optimizer):
    """AdamW (arXiv 1711.05101): the kernel as it is.

    Args:
        config: hyperparameters.
        model: its parameters are updated in place.
    """

    def __init__(self, config: AdamWConfig, model: Parameterised) -> None:
        super().__init__(config, model, kernel_decay=config.weight_decay)

    def _update(self, lr: float, skip: torch.Tensor) -> None:
        self._run_kernel(lr)


class Lamb(Optimizer):
    """LAMB (arXiv 1904.00962, algorithm 2): each matrix w moves by lr * |w| along Adam's direction, decay included.

    The kernel runs on zeros at a learning rate of 1, which leaves minus the direction there. The norms are those of
    whole parameters, over all their shards; where one is 0, the ratio |w| / |u| counts as 1, as it does for norms and
    biases.

    Args:
        config: hyperparameters.
        model: its parameters are updated in place.
    """

    def __init__(self, config: LambConfig, model: Parameterised) -> None:
        super().__init__(config, model, kernel_decay=0.0)
        self._weight_decay = config.weight_decay

    def _update(self, lr: float, skip: torch.Tensor) -> None:
        used = {name: alias for name, alias in self._locals.items() if alias.grad is not None}
        weights = {name: alias.data for name, alias in used.items()}
        for alias in used.values():
            alias.data = torch.zeros_like(alias)
        self._run_kernel(1.0)
        updates = {name: alias.data for name, alias in used.items()}
        for name, alias in used.items():
            alias.data = weights[name]

        matrices = [name for name in used if self._parameters[name].ndim > 1]
        rate = lr * ~skip
        rates = dict.fromkeys(used, rate)
        if matrices:
            w, u = ([parts[name] for name in matrices] for parts in (weights, updates))
            torch._foreach_add_(u, w, alpha=-self._weight_decay)
            groups = [sharded_over(self._parameters[name]) for name in matrices]
            w_norms, u_norms = square_norms([*w, *u], [*groups, *groups]).sqrt().chunk(2)
            ratios = torch.where((w_norms > 0) & (u_norms > 0), w_norms / u_norms, 1.0)
            rates |= dict(zip(matrices, (rate * ratios).unbind(), strict=True))
        torch._foreach_mul_(list(updates.values()), list(rates.values()))
        torch._foreach_add_(list(weights.values()), list(updates.values()))


def make_optimizer(config: AdamWConfig | LambConfig, model: Parameterised) -> Optimizer:
    """Return the optimizer that the config names, over the parameters of `model`."""
    return Lamb(config, model) if isinstance(config, LambConfig) else AdamW(config, model)
