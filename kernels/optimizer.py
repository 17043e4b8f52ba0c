"""One step of AdamW or LAMB on some tensors, the gradient's scale and the decision to skip read from the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from shardwright.kernels.op import Candidate, Op, lacks_triton

SumSquares = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """Adam's hyperparameters; weight decay is decoupled."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    @cached_property
    def arguments(self) -> list[float]:
        """What kernels take: differences from 1 would lose digits if they were made in float32."""
        betas = (1 - self.beta1, math.log(self.beta1), 1 - self.beta2, math.log(self.beta2))
        return [*betas, self.eps, self.weight_decay]


@dataclass(frozen=True, kw_only=True)
class Now:
    """What changes from step to step.

    Attributes:
        lr: learning rate.
        step: float32 device scalar, number of this update, 1 for the first.
        grad_scale: float32 device scalar that the gradients are divided by.
        skip: bool device scalar; where true, nothing changes.
    """

    lr: float
    step: torch.Tensor
    grad_scale: torch.Tensor
    skip: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Part:
    """This process's part of a parameter and of its state, contiguous, in float32; the gradient in any layout.

    Attributes:
        param: updated in place.
        grad: means nothing afterwards.
        exp_avg: mean of the gradient, updated in place.
        exp_avg_sq: mean of its square, updated in place.
    """

    param: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


def reference(parts: Sequence[Part], now: Now, hyper: Hyper, sum_squares: SumSquares | None = None) -> None:
    """Update parameters and moments in place by AdamW, or with `sum_squares` by LAMB.

    LAMB moves each tensor w by lr * |w| / |u| along minus its update u, which is Adam's direction with weight decay
    included; where a norm is 0, the ratio counts as 1.

    Args:
        parts: at least one.
        now: learning rate, number of the update, scale of the gradient, whether to skip.
        hyper: the rest.
        sum_squares: takes the square sums of each part's w and u, float32 [len(parts), 2], and returns those of the
            whole tensors (collective).

    Source: AdamW is algorithm 2 of arXiv 1711.05101, LAMB that of arXiv 1904.00962.
    """
    weights = [part.param for part in parts]
    if sum_squares is None:
        _adamw(weights, parts, now, now.lr, hyper, hyper.weight_decay)
        return
    updates = [torch.zeros_like(w) for w in weights]
    _adamw(updates, parts, now, 1.0, hyper, 0.0)  # leaves minus Adam's direction where zeros were
    torch._foreach_add_(updates, weights, alpha=-hyper.weight_decay)
    norms = torch._foreach_norm([*weights, *updates], 2, dtype=torch.float32)
    w_norms, u_norms = sum_squares(torch.stack(norms).square().view(2, -1).T).sqrt().unbind(1)
    ratios = torch.where((w_norms > 0) & (u_norms > 0), w_norms / u_norms, 1.0)
    torch._foreach_mul_(updates, list((now.lr * ~now.skip * ratios).unbind()))
    torch._foreach_add_(weights, updates)


def _adamw(params: list[torch.Tensor], parts: Sequence[Part], now: Now, lr: float, hyper: Hyper, decay: float) -> None:
    """Torch's fused kernel, by the protocol of its gradient scaler."""
    torch._fused_adamw_(
        params,
        [part.grad for part in parts],
        [part.exp_avg for part in parts],
        [part.exp_avg_sq for part in parts],
        [],
        [now.step] * len(parts),
        lr=lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=decay,
        eps=hyper.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=now.grad_scale,
        found_inf=now.skip.float(),
    )


def triton(parts: Sequence[Part], now: Now, hyper: Hyper, sum_squares: SumSquares | None = None) -> None:
    """As `reference`, in a few launches for all parts; each is read and written once for AdamW, and twice for LAMB."""
    from shardwright.kernels.triton.optimizer import update_

    update_(parts, now, hyper, sum_squares)  # pyright: ignore[reportArgumentType]


OP = Op(
    name="optimizer",
    reference=reference,
    candidates=(Candidate(name="triton", function=triton, unsupported=lacks_triton),),
)
