"""Embedding and cross entropy with the vocabulary split over the tensor group; logits are never gathered.

Shapes: B sequences, T tokens, t = T / P tokens of this process, C hidden size, V vocabulary, v = V / P of this process.
Source: Megatron-LM, arXiv 1909.08053, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from shardwright.kernels.linear_cross_entropy import IGNORED
from shardwright.parallel.products import Overlap, SumScatter


def embed(ids_BT: torch.Tensor, weight_vC: torch.Tensor, overlap: Overlap) -> torch.Tensor:
    """Look ids up in this process's rows, and sum and scatter what all found: [B, t, C]."""
    local_BT, elsewhere_BT = _localise(ids_BT, overlap.rank * weight_vC.shape[0], weight_vC.shape[0])
    found_BTC = F.embedding(local_BT, weight_vC).masked_fill(elsewhere_BT[..., None], 0)
    return SumScatter.apply(overlap, found_BTC)  # pyright: ignore[reportReturnType]


class VocabularyCrossEntropy(torch.autograd.Function):
    """Local logits [N, v] and labels [N] -> the summed negative log-likelihood, alike on all processes of the group."""

    @staticmethod
    def forward(ctx: Any, logits_Nv, labels_N, overlap: Overlap):
        """Exchange three numbers per token: greatest logit, sum of exponentials, the label's logit."""
        wide_Nv = logits_Nv.float()
        greatest_N = wide_Nv.amax(-1)
        dist.all_reduce(greatest_N, dist.ReduceOp.MAX, group=overlap.group)
        local_N, elsewhere_N = _localise(labels_N, overlap.rank * logits_Nv.shape[-1], logits_Nv.shape[-1])
        wanted_N = wide_Nv.gather(-1, local_N[:, None])[:, 0].masked_fill(elsewhere_N, 0)
        both_2N = torch.stack(((wide_Nv - greatest_N[:, None]).exp().sum(-1), wanted_N))
        dist.all_reduce(both_2N, group=overlap.group)
        normaliser_N = both_2N[0].log() + greatest_N
        ctx.save_for_backward(logits_Nv, normaliser_N, local_N, elsewhere_N, labels_N)
        losses_N = (normaliser_N - both_2N[1]).masked_fill(labels_N == IGNORED, 0)
        return losses_N.sum(dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return softmax minus one-hot, local, in the dtype of the logits."""
        logits_Nv, normaliser_N, local_N, elsewhere_N, labels_N = ctx.saved_tensors
        grad_Nv = (logits_Nv.float() - normaliser_N[:, None]).exp()
        grad_Nv.scatter_add_(-1, local_N[:, None], elsewhere_N.float()[:, None] - 1)
        counted_N = (labels_N != IGNORED).float() * grad.float()
        return grad_Nv.mul_(counted_N[:, None]).to(logits_Nv.dtype), None, None


def _localise(ids: torch.Tensor, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return indices into rows first .. first + count, 0 where an id lies elsewhere, and where that is."""
    elsewhere = (ids < first) | (ids >= first + count)
    return (ids - first).masked_fill(elsewhere, 0), elsewhere
