"""What parallelism needs to know of the Llama family, as data."""

from __future__ import annotations

from shardwright.conf.schema import LlamaConfig
from shardwright.parallel.plan import (
    Columns,
    Constant,
    Ends,
    Normal,
    ParallelPlan,
    Row,
    SequenceSharded,
    TensorStyle,
    VocabularyEmbedding,
    VocabularyHead,
)


def plan(config: LlamaConfig) -> ParallelPlan:
    """Return the family's plan.

    Projections that write into the residual stream start smaller by sqrt(2 * layers), so that the stream's variance
    does not grow with depth (GPT-2).
    """
    std = 0.02
    return ParallelPlan(
        blocks=("layers.*",),
        initial_values={
            "*norm.weight": Constant(1.0),
            "*.attention.o.weight": Normal(std / (2 * config.num_layers) ** 0.5),
            "*.feed_forward.down.weight": Normal(std / (2 * config.num_layers) ** 0.5),
            "*.weight": Normal(std),
        },
        tensor=_tensor(config),
        ends=Ends(
            first=("embedding",),
            last=("norm", "embedding" if config.tied_embeddings else "head"),
            hidden_size=config.hidden_size,
            attention_width=config.num_heads * config.head_dim,
        ),
    )


def _tensor(config: LlamaConfig) -> dict[str, TensorStyle]:
    heads = {"k": config.num_kv_heads, "v": config.num_kv_heads}
    styles: dict[str, TensorStyle] = {
        "embedding": VocabularyEmbedding(),
        "layers.*.attention_norm": SequenceSharded(),
        "layers.*.attention.o": Row(),
        "layers.*.feed_forward.down": Row(),
        "norm": SequenceSharded(),
    }
    if config.parallel_block:
        inner = ("attention.q", "attention.k", "attention.v", "feed_forward.gate", "feed_forward.up")
        styles["layers.*"] = Columns(inner, {f"attention.{name}": count for name, count in heads.items()})
    else:
        styles["layers.*.attention"] = Columns(("q", "k", "v"), heads)
        styles["layers.*.feed_forward"] = Columns(("gate", "up"))
        styles["layers.*.feed_forward_norm"] = SequenceSharded()
    if not config.tied_embeddings:
        styles["head"] = VocabularyHead()
    return styles
