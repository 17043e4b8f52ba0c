"""Combinations that cannot run, found without torch and without processes. Each message is value, rule, remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardwright.conf.schema import LlamaConfig, ParallelConfig, TrainConfig


def find_conflicts(config: TrainConfig) -> list[str]:
    """Return a message for every pair of settings that contradict each other."""
    return [*config.model.find_conflicts(config), *_batch(config)]


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
    if model.num_kv_heads % parallel.tensor:
        yield (
            f"parallel.tensor={parallel.tensor} does not divide model.num_kv_heads={model.num_kv_heads}; "
            f"use {choices(divisors(model.num_kv_heads))}"
        )
    if parallel.pipeline > model.num_layers:
        yield (
            f"parallel.pipeline={parallel.pipeline} exceeds model.num_layers={model.num_layers}; "
            f"use at most {model.num_layers}"
        )


def _batch(config: TrainConfig) -> Iterator[str]:
    train = config.train
    if train.global_batch_sequences % train.microbatch_sequences:
        yield (
            f"train.microbatch_sequences={train.microbatch_sequences} does not divide "
            f"train.global_batch_sequences={train.global_batch_sequences}; "
            f"use {choices(divisors(train.global_batch_sequences))}"
        )
