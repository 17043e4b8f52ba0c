"""A Llama as the Hugging Face hub has it: names and settings of transformers' LlamaForCausalLM.

Every tensor is the same on both sides, element by element: both turn the pairs (i, i + D / 2) of a head, so that no
row of a query or key projection moves, and neither fuses or transposes a matrix.
"""

from __future__ import annotations

from typing import Any

from shardwright.checkpoint.interop.hub import HubTensor
from shardwright.conf import ConfigError
from shardwright.conf.schema import LlamaConfig

ARCHITECTURE = "LlamaForCausalLM"
DERIVED = ("*.rotary_emb.inv_freq",)  # older folders keep the rotary frequencies, which follow from the settings

_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
_FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
}
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context_tokens": "original_max_position_embeddings",
}
_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}


def tensors(config: LlamaConfig) -> dict[str, HubTensor]:
    """Return what each tensor of the hub holds, in the hub's order."""
    names = {"model.embed_tokens": "embedding"}
    for i in range(config.num_layers):
        names |= {f"model.layers.{i}.{theirs}": f"layers.{i}.{ours}" for ours, theirs in _BLOCK.items()}
    names["model.norm"] = "norm"
    found = {f"{theirs}.weight": HubTensor((f"{ours}.weight",)) for theirs, ours in names.items()}
    head = HubTensor(("embedding.weight",), copy=True) if config.tied_embeddings else HubTensor(("head.weight",))
    return {**found, "lm_head.weight": head}


def to_hub(config: LlamaConfig, context_tokens: int) -> dict[str, Any]:
    """Return the model's settings as config.json has them.

    Rotary settings are given as transformers 5 reads them (`rope_parameters`) and as older versions and other programs
    do (`rope_theta`, `rope_scaling`).

    Args:
        config: the model.
        context_tokens: longest sequence that it is meant for.

    Raises:
        ConfigError: transformers' Llama cannot be this model.
    """
    _refuse_inexpressible(config)
    scaling, kind = config.rope_scaling, {"rope_type": "default"}
    if scaling:
        kind = {"rope_type": "llama3", **{theirs: getattr(scaling, ours) for ours, theirs in _SCALING.items()}}
    return {
        **_FIXED,
        **{theirs: getattr(config, ours) for ours, theirs in _REQUIRED.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": context_tokens,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {**kind, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": kind if scaling else None,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def from_hub(raw: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the fields of a LlamaConfig but its name, and the longest context in tokens.

    What config.json leaves out has the value that transformers' LlamaConfig gives it.

    Args:
        raw: config.json, with the rotary settings in the form of any version.

    Raises:
        ConfigError: a setting that this Llama cannot have, or a required one is missing.
    """
    _refuse_unknown(raw)
    theta, scaling = _read_rope(raw)
    num_heads, head_dim = raw["num_attention_heads"], raw.get("head_dim")
    if head_dim is None:
        head_dim = raw["hidden_size"] // num_heads
    num_kv_heads = raw.get("num_key_value_heads")
    model = {
        "kind": "llama",
        **{ours: raw[theirs] for ours, theirs in _REQUIRED.items()},
        "num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads,
        "head_dim": head_dim,
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tied_embeddings": raw.get("tie_word_embeddings", False),
        "parallel_block": False,
        "sliding_window": None,
    }
    return model, raw.get("max_position_embeddings", 2048)


def _refuse_inexpressible(config: LlamaConfig) -> None:
    if config.parallel_block:
        raise ConfigError(
            f"model.parallel_block=true: in {ARCHITECTURE} attention and feed-forward follow each other; "
            "only a model trained with parallel_block=false can be exported"
        )
    if config.sliding_window is not None:
        raise ConfigError(
            f"model.sliding_window={config.sliding_window}: {ARCHITECTURE} attends to the whole context; "
            "only a model trained with sliding_window=null can be exported"
        )
    if config.hidden_size % config.num_heads:
        raise ConfigError(
            f"model.num_heads={config.num_heads} does not divide model.hidden_size={config.hidden_size}, which "
            f"{ARCHITECTURE} requires whatever head_dim is; only a model where it does can be exported"
        )


def _refuse_unknown(raw: dict[str, Any]) -> None:
    for key, value in _FIXED.items():
        if raw.get(key, value) != value:
            raise ConfigError(
                f"config.json: {key}={raw[key]!r}; the llama family has {value!r} only; "
                "import a model with that, or register a family that has it"
            )
    if raw.get("quantization_config") is not None:
        raise ConfigError(
            "config.json: quantization_config is set; weights are trained in full; import the model before quantization"
        )
    for theirs in _REQUIRED.values():
        if not isinstance(raw.get(theirs), int) or raw[theirs] < 1:
            raise ConfigError(f"config.json: {theirs}={raw.get(theirs)!r} must be a positive integer; correct the file")


def _read_rope(raw: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return theta and the scaling; where several forms are given, the one that transformers takes."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"config.json: rotary settings are {rope!r}; they must be an object; correct the file")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1):
        raise ConfigError("config.json: partial_rotary_factor is not 1; the llama family turns whole heads only")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(
            f"config.json: rope_type={kind!r}; the llama family has 'default' and 'llama3'; "
            "import a model with one of these, or register a family that has it"
        )
    rope = {"original_max_position_embeddings": raw.get("max_position_embeddings", 2048), **rope}
    missing = [theirs for theirs in _SCALING.values() if theirs not in rope]
    if missing:
        raise ConfigError(f"config.json: rope_type='llama3' needs {', '.join(missing)}; add what is missing")
    return theta, {ours: rope[theirs] for ours, theirs in _SCALING.items()}
