"""Embedding and cross entropy with the vocabulary split over the tensor group; logits are never gathered.

Shapes: B sequences, T tokens, t = T / P tokens of this process, N = B * T, C hidden size, v vocabulary of this process.
Source: Megatron-LM, arXiv 1909.08053, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from shardwright.kernels.linear_cross_entropy import IGNORED
from shardwright.kernels.vocabulary_statistics import localise
from shardwright.parallel.products import Overlap, SumScatter


def embed(ids_BT: torch.Tensor, weight_vC: torch.Tensor, overlap: Overlap) -> torch.Tensor:
    """Look ids up in this process's rows, and sum and scatter what all found: [B, t, C]."""
    local_BT, elsewhere_BT = localise(ids_BT, overlap.rank * weight_vC.shape[0], weight_vC.shape[0])
    found_BTC = F.embedding(local_BT, weight_vC).masked_fill(elsewhere_BT[..., None], 0)
    return SumScatter.apply(overlap, found_BTC)  # pyright: ignore[reportReturnType]


class VocabularyCrossEntropy(torch.autograd.Function):
    """`vocabulary_statistics` [N] of this process, labels [N] -> the summed negative log-likelihood, alike on all."""

    @staticmethod
    def forward(ctx: Any, lse_N, wanted_N, labels_N, overlap: Overlap):
        """Exchange three numbers per token: greatest log-sum-exp, sum of exponentials, the label's logit."""
        greatest_N = lse_N.clone()
        dist.all_reduce(greatest_N, dist.ReduceOp.MAX, group=overlap.group)
        both_2N = torch.stack(((lse_N - greatest_N).exp(), wanted_N))
        dist.all_reduce(both_2N, group=overlap.group)
        normaliser_N = both_2N[0].log() + greatest_N
        ignored_N = labels_N == IGNORED
        ctx.save_for_backward((lse_N - normaliser_N).exp().masked_fill(ignored_N, 0), ignored_N)
        return (normaliser_N - both_2N[1]).masked_fill(ignored_N, 0).sum(dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of both statistics: this process's share of the probability, and minus one."""
        share_N, ignored_N = ctx.saved_tensors
        factor = grad.float()
        return share_N * factor, (-factor).expand_as(share_N).masked_fill(ignored_N, 0), None, None
