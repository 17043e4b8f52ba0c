"""Root-mean-square layer norm (arXiv 1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from shardwright.kernels.op import Candidate, Op, Situation, lacks_triton


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last dim in float32 and scale: x / sqrt(mean(x^2) + eps) * weight, in the dtype of `x`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def native(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `reference`, through torch's own rms_norm."""
    return F.rms_norm(x, weight.shape, weight, eps)


def triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `reference`, in one kernel; backward in two, without atomics."""
    from shardwright.kernels.triton.norm import rms_norm

    return rms_norm(x, weight, eps)


def _triton_unsupported(situation: Situation) -> str | None:
    too_wide = (situation.sizes.get("hidden_size") or 0) > 16384
    return lacks_triton(situation) or ("needs a hidden size up to 16384" if too_wide else None)


OP = Op(
    name="rms_norm",
    reference=reference,
    candidates=(
        Candidate(name="triton", function=triton, unsupported=_triton_unsupported),
        Candidate(
            name="torch", function=native, unsupported=lambda s: None if s.device == "cuda" else "fused on CUDA only"
        ),
    ),
)
