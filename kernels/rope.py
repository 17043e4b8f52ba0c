"""Rotary position embedding (arXiv 2104.09864), in the half-split form of the Llama family."""

from __future__ import annotations

import torch

from shardwright.kernels.op import Candidate, Op, Situation, lacks_triton


def reference(
    q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn the pairs (i, i + D / 2) of every head by the angle of the token's position, in float32.

    Args:
        q_BTHD: queries.
        k_BTKD: keys.
        cos_BTD: float32 cosines, both halves alike; `sin_BTD` likewise.
        sin_BTD: float32 sines.

    Returns:
        Queries and keys, turned, in their dtype.
    """

    def turned(x_BTHD: torch.Tensor) -> torch.Tensor:
        low, high = x_BTHD.float().chunk(2, -1)
        across = torch.cat((-high, low), -1)
        return (x_BTHD.float() * cos_BTD[:, :, None] + across * sin_BTD[:, :, None]).to(x_BTHD.dtype)

    return turned(q_BTHD), turned(k_BTKD)


def triton(
    q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference`, in one kernel, which reads the first half of the angles; they get no gradient."""
    from shardwright.kernels.triton.rope import rope

    return rope(q_BTHD, k_BTKD, cos_BTD, sin_BTD)


def _triton_unsupported(situation: Situation) -> str | None:
    odd = (situation.sizes.get("head_dim") or 0) % 2
    return lacks_triton(situation) or ("needs an even head size" if odd else None)


OP = Op(
    name="rope",
    reference=reference,
    candidates=(Candidate(name="triton", function=triton, unsupported=_triton_unsupported),),
)
