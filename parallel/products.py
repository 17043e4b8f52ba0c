"""Matrix products joined with the communication of tensor and sequence parallelism.

Each of the P processes of a tensor group holds N / P of the N = B * T tokens between products (sequence parallelism,
arXiv 2205.05198), a contiguous run of the flattened batch, and all N tokens of some features inside them.

Shapes: N tokens, n = N / P tokens of this process, C features in, D features out.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from shardwright.parallel.gradients import accumulate, local

# torch 2.13 renames both.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Overlap(abc.ABC):
    """How products and their collectives are interleaved.

    Args:
        group: the tensor group; None: one process, nothing is communicated.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self.anchor = torch.zeros((), requires_grad=True)

    def start_gather(self, x_nC: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to gather the tokens of all processes; the result waits for it and returns [N, C]."""
        if self.size == 1:
            return lambda: x_nC
        whole = x_nC.new_empty(self.size * x_nC.shape[0], *x_nC.shape[1:])
        work = _all_gather(whole, x_nC.contiguous(), group=self.group, async_op=True)
        return lambda: _wait(work, whole)

    def start_scatter(self, x_NC: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to sum over processes and keep this one's tokens; the result waits for it and returns [n, C]."""
        if self.size == 1:
            return lambda: x_NC
        own = x_NC.new_empty(x_NC.shape[0] // self.size, *x_NC.shape[1:])
        work = _reduce_scatter(own, x_NC.contiguous(), group=self.group, async_op=True)
        return lambda: _wait(work, own)

    @abc.abstractmethod
    def gather_products(
        self, x_nC: torch.Tensor, factors_CD: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the gathered tokens [N, C] and their product with every factor [N, D]."""

    @abc.abstractmethod
    def start_products_scatter(
        self, lefts_ND: Sequence[torch.Tensor], factors_DC: Sequence[torch.Tensor]
    ) -> Callable[[], torch.Tensor]:
        """Sum the products of the pairs over processes; the result waits and returns this process's tokens [n, C]."""


class Unsplit(Overlap):
    """One collective before or after whole products; it hides behind the products that do not need it."""

    def gather_products(self, x_nC, factors_CD):
        """See `Overlap`."""
        x_NC = self.start_gather(x_nC)()
        return x_NC, [x_NC @ factor for factor in factors_CD]

    def start_products_scatter(self, lefts_ND, factors_DC):
        """See `Overlap`."""
        return self.start_scatter(_sum_products(lefts_ND, factors_DC))


class Chunked(Overlap):
    """Products split by tokens into P chunks that travel round a ring, each computed while the next one travels.

    Source: MegaScale, arXiv 2402.15627, section 3.2; the ring forms are those of Wang et al., ASPLOS'23.
    """

    def gather_products(self, x_nC, factors_CD):
        """See `Overlap`."""
        n = x_nC.shape[0]
        x_NC = x_nC.new_empty(self.size * n, x_nC.shape[1])
        outs = [x_nC.new_empty(self.size * n, factor.shape[1]) for factor in factors_CD]
        chunks = x_NC.split(n)
        chunks[self.rank].copy_(x_nC)
        for hop in range(self.size):
            here, coming = (self.rank - hop) % self.size, (self.rank - hop - 1) % self.size
            works = self._exchange(chunks[here], chunks[coming]) if hop + 1 < self.size else []
            for out, factor in zip(outs, factors_CD, strict=True):
                torch.mm(chunks[here], factor, out=out.split(n)[here])
            for work in works:
                work.wait()
        return x_NC, outs

    def start_products_scatter(self, lefts_ND, factors_DC):
        """See `Overlap`. Every sum begins one process behind its owner and gains one summand per hop."""
        n = lefts_ND[0].shape[0] // self.size
        total, works = None, []
        for hop in range(self.size):
            part = slice(n * ((self.rank - hop - 1) % self.size), n * ((self.rank - hop - 1) % self.size) + n)
            product = _sum_products([left[part] for left in lefts_ND], factors_DC)
            for work in works:
                work.wait()
            total = product if total is None else total.add_(product)
            if hop + 1 < self.size:
                coming = torch.empty_like(total)
                works = self._exchange(total, coming)
                total = coming
        assert total is not None
        return lambda: total

    def _exchange(self, sent: torch.Tensor, received: torch.Tensor) -> list[dist.Work]:
        """Send to the next process of the ring while receiving from the one before."""
        ops = [
            dist.P2POp(dist.isend, sent, group=self.group, group_peer=(self.rank + 1) % self.size),
            dist.P2POp(dist.irecv, received, group=self.group, group_peer=(self.rank - 1) % self.size),
        ]
        return dist.batch_isend_irecv(ops)


OVERLAPS: dict[str, type[Overlap]] = {"none": Unsplit, "chunked": Chunked}


class WeightGradients:
    """Adds the gradients of products' weights to their parameters: at once, or with `take` while `deferring`.

    Autograd never sees these weights: leading it through DTensors would cost more time on the host than the products.
    Deferring splits backward into a part for the inputs and a part for the weights (zero-bubble pipelines, arXiv
    2401.10241).
    """

    def __init__(self) -> None:
        self.deferring = False
        self._pending: list[Callable[[], None]] = []

    def take(self) -> list[Callable[[], None]]:
        """Return, and forget, what was deferred; calling each adds to the gradients of its weights."""
        pending, self._pending = self._pending, []
        return pending

    def settle(self, owners: Sequence[Weighted], compute: Callable[[], list[torch.Tensor]]) -> None:
        """Add what `compute` returns to the gradients of the owners' weights, now or later."""

        @torch.no_grad()
        def add() -> None:
            for owner, gradient in zip(owners, compute(), strict=True):
                accumulate(owner.weight, gradient)

        if self.deferring:
            self._pending.append(add)
        else:
            add()


class Weighted(Protocol):
    """What has a weight, such as nn.Linear."""

    weight: torch.Tensor


class GatherProducts(torch.autograd.Function):
    """x [B, t, C] of this process -> gathered tokens times each owner's weight [D, C], transposed: [B, T, D] each.

    Backward sums the input's gradient over processes and scatters it, and gathers `x` again for the weights'
    gradients instead of keeping it.
    """

    @staticmethod
    def forward(ctx: Any, overlap: Overlap, gradients: WeightGradients, owners: Sequence[Weighted], x_BtC, anchor):
        """Multiply; `anchor` makes autograd come by even if `x` needs no gradient."""
        weights_DC = [local(owner.weight) for owner in owners]
        _, outs = overlap.gather_products(x_BtC.flatten(0, -2), [weight.T for weight in weights_DC])
        ctx.save_for_backward(x_BtC, *weights_DC)
        ctx.overlap, ctx.gradients, ctx.owners = overlap, gradients, owners
        return tuple(out.view(*x_BtC.shape[:-2], -1, out.shape[-1]) for out in outs)

    @staticmethod
    def backward(ctx: Any, *grads_BTD):
        """Return the gradient for x; the weights' go to `WeightGradients`."""
        x_BtC, *weights_DC = ctx.saved_tensors
        overlap, gradients = ctx.overlap, ctx.gradients
        grads_ND = [grad.flatten(0, -2) for grad in grads_BTD]
        gather = None if gradients.deferring else overlap.start_gather(x_BtC.flatten(0, -2))
        scatter = overlap.start_products_scatter(grads_ND, weights_DC)

        def weight_gradients() -> list[torch.Tensor]:
            x_NC = (gather or overlap.start_gather(x_BtC.flatten(0, -2)))()
            return [grad.T @ x_NC for grad in grads_ND]

        gradients.settle(ctx.owners, weight_gradients)
        return None, None, None, scatter().view_as(x_BtC), None


class ProductScatter(torch.autograd.Function):
    """x [B, T, D] times the owner's weight [C, D], transposed, summed over processes and scattered: [B, t, C]."""

    @staticmethod
    def forward(ctx: Any, overlap: Overlap, gradients: WeightGradients, owner: Weighted, x_BTD):
        """Multiply."""
        weight_CD = local(owner.weight)
        ctx.save_for_backward(x_BTD, weight_CD)
        ctx.overlap, ctx.gradients, ctx.owner = overlap, gradients, owner
        out_nC = overlap.start_products_scatter([x_BTD.flatten(0, -2)], [weight_CD.T])()
        return out_nC.view(*x_BTD.shape[:-2], -1, out_nC.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_BtC):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradient for x; the weight's goes to `WeightGradients`."""
        x_BTD, weight_CD = ctx.saved_tensors
        grad_NC, (dx_ND,) = ctx.overlap.gather_products(grad_BtC.flatten(0, -2), [weight_CD])
        ctx.gradients.settle([ctx.owner], lambda: [grad_NC.T @ x_BTD.flatten(0, -2)])
        return None, None, None, dx_ND.view_as(x_BTD)


class SumScatter(torch.autograd.Function):
    """x [B, T, C], a summand on each process -> this process's tokens of the sum [B, t, C]; backward gathers."""

    @staticmethod
    def forward(ctx: Any, overlap: Overlap, x_BTC):
        """Sum and scatter along the flattened tokens."""
        ctx.overlap = overlap
        return overlap.start_scatter(x_BTC.flatten(0, 1))().view(x_BTC.shape[0], -1, x_BTC.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_BtC):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gather."""
        grad_NC = ctx.overlap.start_gather(grad_BtC.flatten(0, 1))()
        return None, grad_NC.view(grad_BtC.shape[0], -1, grad_BtC.shape[-1])


def _wait(work: Any, tensor: torch.Tensor) -> torch.Tensor:
    work.wait()
    return tensor


def _sum_products(lefts: Sequence[torch.Tensor], factors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = lefts[0] @ factors[0]
    for left, factor in zip(lefts[1:], factors[1:], strict=True):
        total.addmm_(left, factor)
    return total
