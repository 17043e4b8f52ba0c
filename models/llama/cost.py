"""Counted work of a Llama, for model FLOP utilisation."""

from __future__ import annotations

from typing import Literal

from shardwright.conf.schema import LlamaConfig


def flops_per_token(config: LlamaConfig, sequence_length: int, attention: Literal["full", "causal"]) -> float:
    """Return the floating-point operations of forward and backward per trained token.

    Six per weight of a matrix product (the embedding look-up is none), and 12 * layers * heads * head size * sequence
    for the two attention products counted in full, half of that counted causally (PaLM, arXiv 2204.02311, appendix B).
    Recomputation, documents and windows do not count.
    """
    heads = (config.num_heads + config.num_kv_heads) * 2 * config.head_dim * config.hidden_size
    layer = heads + 3 * config.hidden_size * config.intermediate_size
    weights = config.num_layers * layer + config.vocab_size * config.hidden_size
    scores = 12 * config.num_layers * config.num_heads * config.head_dim * sequence_length
    return 6 * weights + scores * (1.0 if attention == "full" else 0.5)
