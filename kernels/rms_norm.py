"""Root-mean-square layer norm (arXiv 1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from shardwright.kernels.op import Candidate, Op


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last dim in float32 and scale: x / sqrt(mean(x^2) + eps) * weight, in the dtype of `x`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def native(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `reference`, through torch's own rms_norm."""
    return F.rms_norm(x, weight.shape, weight, eps)


OP = Op(
    name="rms_norm",
    reference=reference,
    candidates=(
        Candidate(
            name="torch", function=native, unsupported=lambda s: None if s.device == "cuda" else "fused on CUDA only"
        ),
    ),
)
