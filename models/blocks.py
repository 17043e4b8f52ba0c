"""Building blocks that model families share.

Shapes: B sequences, T tokens, C hidden size, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shardwright.kernels import Kernels

if TYPE_CHECKING:
    from shardwright.conf.schema import RopeScalingConfig


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every block of one forward pass needs to know of the packed batch."""

    positions_BT: torch.Tensor
    bounds: torch.Tensor
    longest: int
    cos_BTD: torch.Tensor
    sin_BTD: torch.Tensor


class Embedding(nn.Embedding):
    """A row for each token of the vocabulary."""

    def __init__(self, vocab_size: int, hidden_size: int, kernels: Kernels) -> None:
        super().__init__(vocab_size, hidden_size)
        self.kernels = kernels

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows of token ids [B, T]: [B, T, C]."""
        return self.kernels.embedding(input, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, size: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.kernels = eps, kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dim."""
        return self.kernels.rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """Linear map without bias, of those that are computed in FP8 where `kernels.linear` says so."""

    def __init__(self, in_features: int, out_features: int, kernels: Kernels) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map the last dim."""
        return self.kernels.linear(x, self.weight)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions, inside packed documents."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None, kernels: Kernels
    ) -> None:
        super().__init__()
        self.head_dim, self.window, self.kernels = head_dim, window, kernels
        self.q = Linear(hidden_size, num_heads * head_dim, kernels)
        self.k = Linear(hidden_size, num_kv_heads * head_dim, kernels)
        self.v = Linear(hidden_size, num_kv_heads * head_dim, kernels)
        self.o = Linear(num_heads * head_dim, hidden_size, kernels)

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """Return the attended values, projected back to [B, T, C]."""
        q_BTHD, k_BTKD, v_BTKD = (p(x_BTC).unflatten(-1, (-1, self.head_dim)) for p in (self.q, self.k, self.v))
        options: dict[str, Any] = {"window": self.window}
        if self.kernels.attention_fuses_rope:
            options["angles"] = context.cos_BTD, context.sin_BTD
        else:
            q_BTHD, k_BTKD = self.kernels.rope(q_BTHD, k_BTKD, context.cos_BTD, context.sin_BTD)
        out_BTHD = self.kernels.attention(
            q_BTHD, k_BTKD, v_BTKD, context.positions_BT, context.bounds, context.longest, **options
        )
        return self.o(out_BTHD.flatten(-2))


class FeedForward(nn.Module):
    """Gated feed-forward block: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate = Linear(hidden_size, intermediate_size, kernels)
        self.up = Linear(hidden_size, intermediate_size, kernels)
        self.down = Linear(intermediate_size, hidden_size, kernels)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """Return [B, T, C]."""
        return self.down(self.kernels.swiglu(self.gate(x_BTC), self.up(x_BTC)))


def rotary_angles(
    positions_BT: torch.Tensor, head_dim: int, theta: float, scaling: RopeScalingConfig | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 cosines and sines [B, T, D] of every position, both halves of D alike.

    Source: arXiv 2104.09864, section 3.2.2; the scaling is Llama 3.1's: wavelengths above
    original_context / low_freq_factor are stretched by `factor`, those below original_context / high_freq_factor
    stay, those between are blended.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32) / head_dim
    frequencies = theta**-exponents
    if scaling is not None:
        turns = scaling.original_context_tokens * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    angles_BTD = (positions_BT[..., None].float() * frequencies).repeat(1, 1, 2)
    return angles_BTD.cos(), angles_BTD.sin()
