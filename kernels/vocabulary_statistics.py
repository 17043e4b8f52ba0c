"""What a loss over a vocabulary that is split over processes needs of the logits of one of them."""

from __future__ import annotations

import torch

from shardwright.kernels.op import Candidate, Op, lacks_triton


def reference(logits_Nv: torch.Tensor, labels_N: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-sum-exp of each token's logits and the logit of its label, 0 if that is elsewhere; float32 [N].

    With both gathered, the loss is the log-sum-exp of the log-sum-exps minus the sum of the labels' logits.

    Args:
        logits_Nv: of the tokens for the part of the vocabulary that begins at `first`.
        labels_N: int64, in the whole vocabulary; any other number is elsewhere too.
        first: where this part of the vocabulary begins.
    """
    wide_Nv = logits_Nv.float()
    local_N, elsewhere_N = localise(labels_N, first, logits_Nv.shape[-1])
    wanted_N = wide_Nv.gather(-1, local_N[:, None])[:, 0].masked_fill(elsewhere_N, 0)
    return wide_Nv.logsumexp(-1), wanted_N


def fused(logits_Nv: torch.Tensor, labels_N: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference`, in one pass; backward turns the logits into their gradient in place, so that it can run once."""
    from shardwright.kernels.triton.cross_entropy import shard_statistics  # needs Triton, which CPUs lack

    return shard_statistics(logits_Nv, labels_N, first)


def localise(ids: torch.Tensor, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return indices into rows first .. first + count, 0 where an id lies elsewhere, and where that is."""
    elsewhere = (ids < first) | (ids >= first + count)
    return (ids - first).masked_fill(elsewhere, 0), elsewhere


OP = Op(
    name="vocabulary_statistics",
    reference=reference,
    candidates=(Candidate(name="triton", function=fused, unsupported=lacks_triton),),
)
