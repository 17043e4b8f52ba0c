"""Rows of a table by token id."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from shardwright.kernels.op import Candidate, Op, lacks_triton


def reference(ids_BT: torch.Tensor, weight_VC: torch.Tensor) -> torch.Tensor:
    """Return the row of each id [B, T, C]."""
    return F.embedding(ids_BT, weight_VC)


def triton(ids_BT: torch.Tensor, weight_VC: torch.Tensor) -> torch.Tensor:
    """As `reference`; backward adds up in float32, in a fixed order, and writes each row of the gradient once."""
    from shardwright.kernels.triton.embedding import embedding

    return embedding(ids_BT, weight_VC)


OP = Op(
    name="embedding",
    reference=reference,
    candidates=(Candidate(name="triton", function=triton, unsupported=lacks_triton),),
)
