"""Gated activation of the feed-forward block (arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from shardwright.kernels.op import Candidate, Op, lacks_triton


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up."""
    return F.silu(gate) * up


def triton(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As `reference`, in one kernel and rounded once; backward computes the activation again."""
    from shardwright.kernels.triton.gated import swiglu

    return swiglu(gate, up)


OP = Op(
    name="swiglu",
    reference=reference,
    candidates=(Candidate(name="triton", function=triton, unsupported=lacks_triton),),
)
