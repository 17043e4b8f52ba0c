"""Linear maps without bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from shardwright.kernels.op import Candidate, Op, Situation, lacks_triton


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x [..., K] times weight [N, K], transposed, in their dtype."""
    return F.linear(x, weight)


def fp8_rowwise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `reference`, with all products in FP8 through the vendor's: one scale for a token, and for a feature."""
    from shardwright.kernels.triton.fp8 import linear

    return linear(x, weight, "rowwise")


def fp8_blockwise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `reference`, with all products in FP8: scales of 128 values, and of 128 x 128 weights (arXiv 2412.19437)."""
    from shardwright.kernels.triton.fp8 import linear

    return linear(x, weight, "blockwise")


def _unsupported(situation: Situation) -> str | None:
    if refusal := lacks_triton(situation):
        return refusal
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        return "needs a GPU of compute capability 9.0, such as an H100"
    return None


def _rowwise_unsupported(situation: Situation) -> str | None:
    odd = [f"{name}={size}" for name, size in situation.sizes.items() if size is not None and size % 16]
    return _unsupported(situation) or (f"needs sizes that 16 divides, not {', '.join(odd)}" if odd else None)


OP = Op(
    name="linear",
    reference=reference,
    candidates=(
        Candidate(name="fp8_rowwise", function=fp8_rowwise, unsupported=_rowwise_unsupported, lossy=True),
        Candidate(name="fp8_blockwise", function=fp8_blockwise, unsupported=_unsupported, lossy=True),
    ),
)
