"""Gated activation of the feed-forward block (arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from shardwright.kernels.op import Op


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up."""
    return F.silu(gate) * up


OP = Op(name="swiglu", reference=reference)
