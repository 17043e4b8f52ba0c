"""Combinations that cannot run, found without torch and without processes. Each message is value, rule, remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardwright.conf.schema import LlamaConfig, ParallelConfig, TrainConfig

CHUNKS = {  # schedule -> least and greatest number of stages per process
    "gpipe": (1, 1),
    "1f1b": (1, 1),
    "interleaved_1f1b": (2, 1 << 10),
    "zb_h1": (1, 1),
    "zbv": (2, 2),
}


def find_conflicts(config: TrainConfig) -> list[str]:
    """Return a message for every pair of settings that contradict each other."""
    return [
        *config.model.find_conflicts(config),
        *_layout(config.parallel, config.train.sequence_length),
        *_batch(config),
        *_linear(config.kernels.linear, config.parallel.tensor),
        *_attention(config.kernels.attention, config.parallel),
    ]


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def choices(numbers: list[int]) -> str:
    """Format numbers for a remedy: `1, 2, 4 or 8`."""
    if len(numbers) == 1:
        return str(numbers[0])
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"


def find_llama_conflicts(model: LlamaConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Yield what contradicts itself in a Llama, and what of the layout it cannot be split into."""
    if model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads={model.num_heads}; "
            f"use {choices(divisors(model.num_heads))}"
        )
    if model.head_dim % 2:
        yield f"model.head_dim={model.head_dim} is odd, and rotary embeddings turn pairs; use {model.head_dim + 1}"
    scaling = model.rope_scaling
    if scaling and scaling.low_freq_factor >= scaling.high_freq_factor:
        yield (
            f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor} must be below "
            f"high_freq_factor={scaling.high_freq_factor}; Llama 3.1 uses 1 and 4"
        )
    heads, kv_heads, tensor = model.num_heads, model.num_kv_heads, parallel.tensor
    fitting = [t for t in divisors(heads) if kv_heads % t == 0 or t % kv_heads == 0]
    if tensor not in fitting:
        divided = f"num_kv_heads={kv_heads}" if heads % tensor == 0 else f"num_heads={heads}"
        yield f"parallel.tensor={tensor} does not divide model.{divided}; use {choices(fitting)}"
    elif parallel.context_mode == "ulysses" and heads // tensor % parallel.context:
        yield (
            f"parallel.context={parallel.context} with context_mode=ulysses does not divide the {heads // tensor} "
            f"query heads of a tensor process; use {choices(divisors(heads // tensor))}, or context_mode=ring"
        )
    num_stages = parallel.pipeline * parallel.num_chunks if parallel.pipeline > 1 else 1
    if num_stages > model.num_layers:
        yield (
            f"parallel.pipeline={parallel.pipeline} x {parallel.num_chunks} chunks exceeds "
            f"model.num_layers={model.num_layers}; every stage needs a layer; use fewer"
        )


def _layout(parallel: ParallelConfig, sequence_length: int) -> Iterator[str]:
    chunks = parallel.context * (2 if parallel.context_mode == "ring" and parallel.context > 1 else 1)
    if sequence_length % chunks or sequence_length // parallel.context % parallel.tensor:
        unit = math.lcm(chunks, parallel.context * parallel.tensor)
        yield (
            f"train.sequence_length={sequence_length} cannot be split over parallel.context={parallel.context} "
            f"({parallel.context_mode}) and parallel.tensor={parallel.tensor}; it must be a multiple of {unit}; "
            f"use {-(-sequence_length // unit) * unit}"
        )
    if parallel.pipeline > 1:
        yield from _pipeline(parallel)
    without_effect = {
        "pipeline_schedule": parallel.pipeline == 1 and parallel.pipeline_schedule != "1f1b",
        "pipeline_chunks": parallel.pipeline == 1 and parallel.pipeline_chunks != "auto",
        "context_mode": parallel.context == 1 and parallel.context_mode != "ring",
        "tensor_overlap": parallel.tensor == 1 and parallel.tensor_overlap != "none",
    }
    for key in (key for key, useless in without_effect.items() if useless):
        axis = key.partition("_")[0]
        yield f"parallel.{key}={getattr(parallel, key)} has no effect with parallel.{axis}=1; drop it, or raise {axis}"


def _pipeline(parallel: ParallelConfig) -> Iterator[str]:
    schedule, chunks = parallel.pipeline_schedule, parallel.pipeline_chunks
    if schedule not in CHUNKS:
        if not schedule.endswith((".yaml", ".yml")):
            yield f"parallel.pipeline_schedule={schedule} is unknown; use {', '.join(CHUNKS)}, or a .yaml table"
        elif chunks != "auto":
            yield f"parallel.pipeline_chunks={chunks} has no effect with a table, which places its stages; drop it"
    elif not CHUNKS[schedule][0] <= parallel.num_chunks <= CHUNKS[schedule][1]:
        least, most = CHUNKS[schedule]
        rule = f"needs {least}" if least == most else f"needs {least} or more"
        yield f"parallel.pipeline_chunks={chunks}: {schedule} {rule} stages per process; use auto or {least}"
    if parallel.zero == 3:
        yield (
            f"parallel.zero=3 with parallel.pipeline={parallel.pipeline} would gather every weight again for each "
            "microbatch; use zero=2, or pipeline=1"
        )


def _batch(config: TrainConfig) -> Iterator[str]:
    train = config.train
    if train.global_batch_sequences % train.microbatch_sequences:
        yield (
            f"train.microbatch_sequences={train.microbatch_sequences} does not divide "
            f"train.global_batch_sequences={train.global_batch_sequences}; "
            f"use {choices(divisors(train.global_batch_sequences))}"
        )


def _linear(linear: str, tensor: int) -> Iterator[str]:
    if tensor > 1 and linear not in ("auto", "reference"):
        yield (
            f"kernels.linear={linear} computes whole products, and parallel.tensor={tensor} splits them; "
            "use kernels.linear=auto, or parallel.tensor=1"
        )


def _attention(attention: str, parallel: ParallelConfig) -> Iterator[str]:
    if attention == "fp8" and parallel.context > 1 and parallel.context_mode == "ring":
        yield (
            f"kernels.attention=fp8 has no effect with parallel.context={parallel.context} and context_mode=ring, "
            "which attends by itself; use kernels.attention=auto, or parallel.context_mode=ulysses"
        )
