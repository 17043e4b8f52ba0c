"""Llama 3 as one plain module on one device.

Shapes: B sequences, T tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from shardwright.kernels import Kernels
from shardwright.models.blocks import Attention, Context, Embedding, FeedForward, RMSNorm, rotary_angles

if TYPE_CHECKING:
    from shardwright.conf.schema import LlamaConfig


class Layer(nn.Module):
    """Attention and feed-forward with residuals: one after the other, or side by side on one norm.

    Source of the parallel form `x + MLP(LN(x)) + Attn(LN(x))`: MegaScale, arXiv 2402.15627, section 3.1.
    """

    def __init__(self, config: LlamaConfig, kernels: Kernels) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, kernels)
        self.attention = Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.sliding_window,
            kernels,
        )
        self.feed_forward_norm = (
            None if config.parallel_block else RMSNorm(config.hidden_size, config.norm_eps, kernels)
        )
        self.feed_forward = FeedForward(config.hidden_size, config.intermediate_size, kernels)

    def forward(self, x_BTC: torch.Tensor, context: Context) -> torch.Tensor:
        """Return the next residual stream [B, T, C]."""
        normed = self.attention_norm(x_BTC)
        if self.feed_forward_norm is None:
            return x_BTC + self.attention(normed, context) + self.feed_forward(normed)
        x_BTC = x_BTC + self.attention(normed, context)
        return x_BTC + self.feed_forward(self.feed_forward_norm(x_BTC))


class Llama(nn.Module):
    """Token ids to logits, or to a summed loss where labels are given.

    A pipeline stage is a Llama that lacks its embedding, its final norm and head, or some layers: it takes hidden
    states instead of ids, or returns them.
    """

    def __init__(self, config: LlamaConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.embedding = Embedding(config.vocab_size, config.hidden_size, kernels)
        self.layers = nn.ModuleDict({str(i): Layer(config, kernels) for i in range(config.num_layers)})
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, kernels)
        self.head = None if config.tied_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        ids_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        bounds: torch.Tensor,
        longest: int,
        labels_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the model on packed sequences.

        Args:
            ids_BT: int64 token ids, or hidden states [B, T, C] for a stage that is not the first.
            positions_BT: int64 positions inside each document; 0 starts a document.
            bounds: int32 first token of each document in the flattened batch, and B * T.
            longest: tokens of the longest document.
            labels_BT: int64 next tokens, -100 where none is predicted.

        Returns:
            Logits [B, T, V], or with labels the summed negative log-likelihood in nats (float64 scalar); hidden states
            [B, T, C] from a stage that is not the last.
        """
        config = self.config
        cos_BTD, sin_BTD = rotary_angles(positions_BT, config.head_dim, config.rope_theta, config.rope_scaling)
        context = Context(positions_BT=positions_BT, bounds=bounds, longest=longest, cos_BTD=cos_BTD, sin_BTD=sin_BTD)
        x_BTC = ids_BT if ids_BT.is_floating_point() else self.embedding(ids_BT)
        for layer in self.layers.values():
            x_BTC = layer(x_BTC, context)
        if self.norm is None:
            return x_BTC
        x_BTC = self.norm(x_BTC)
        weight_VC = self.embedding.weight if self.head is None else self.head.weight
        if labels_BT is None:
            return x_BTC @ weight_VC.T
        return self.kernels.linear_cross_entropy(x_BTC, weight_VC, labels_BT)
