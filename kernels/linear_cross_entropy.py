"""Output projection and cross entropy as one op, so that an implementation need not keep the logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from shardwright.kernels.op import Candidate, Op, lacks_triton

IGNORED = -100  # label of a token that is not predicted: the last of a document


def reference(hidden_BTC: torch.Tensor, weight_VC: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Return the summed negative log-likelihood (nats) of the labels; softmax in float32.

    The sum is a float64 scalar: there, adding up float32 losses of tokens is exact, so that their order, and with it
    the layout, leaves no trace.

    Args:
        hidden_BTC: final hidden states.
        weight_VC: output projection.
        labels_BT: int64 token ids; `IGNORED` ones add nothing.
    """
    logits = (hidden_BTC @ weight_VC.T).flatten(0, 1).float()
    losses = F.cross_entropy(logits, labels_BT.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.sum(dtype=torch.float64)


def fused(hidden_BTC: torch.Tensor, weight_VC: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """As `reference`, chunk by chunk of tokens, so that the logits never exist whole."""
    from shardwright.kernels.triton.linear_cross_entropy import linear_cross_entropy  # needs Triton, which CPUs lack

    return linear_cross_entropy(hidden_BTC, weight_VC, labels_BT)


OP = Op(
    name="linear_cross_entropy",
    reference=reference,
    candidates=(Candidate(name="triton", function=fused, unsupported=lacks_triton),),
)
