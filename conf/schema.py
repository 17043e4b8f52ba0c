"""The schema of a run: frozen dataclasses, decoded by pydantic from the YAML that Hydra composes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

from shardwright.conf.checks import find_conflicts

STRICT = ConfigDict(extra="forbid", strict=True)
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.=,-]*$")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Who this run is and where it leaves its files."""

    name: Name
    folder: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoopConfig:
    """How long, how much at a time, in which arithmetic."""

    num_steps: PositiveInt
    seed: NonNegativeInt
    sequence_length: PositiveInt
    global_batch_sequences: PositiveInt
    microbatch_sequences: PositiveInt
    precision: Literal["auto", "fp32", "bf16"]
    deterministic: bool
    device: Literal["auto", "cpu", "cuda"]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.global_batch_sequences * self.sequence_length


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """Held-out evaluation: every how many steps (null: only at the end), over how many global batches."""

    every_steps: PositiveInt | None
    num_batches: PositiveInt


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RopeScalingConfig:
    """Llama 3.1's stretching of the rotary wavelengths beyond the original context."""

    factor: PositiveFloat
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_context_tokens: PositiveInt


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LlamaConfig:
    """Llama 3 family; `parallel_block` and `sliding_window` are MegaScale's options (arXiv 2402.15627, section 3.1)."""

    kind: Literal["llama"]
    name: Name
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    norm_eps: PositiveFloat
    rope_theta: PositiveFloat
    rope_scaling: RopeScalingConfig | None
    tied_embeddings: bool
    parallel_block: bool
    sliding_window: PositiveInt | None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ParallelConfig:
    """Degrees of the mesh axes; their product is the number of processes. `shard: auto` takes what the others leave."""

    pipeline: PositiveInt
    replicate: PositiveInt
    shard: PositiveInt | Literal["auto"]
    context: PositiveInt
    tensor: PositiveInt


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdamWConfig:
    """AdamW (arXiv 1711.05101); norms and biases are not decayed."""

    kind: Literal["adamw"]
    peak_lr: PositiveFloat
    beta1: Fraction
    beta2: Fraction
    eps: PositiveFloat
    weight_decay: NonNegativeFloat
    max_grad_norm: PositiveFloat | None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WarmupStableDecayConfig:
    """Linear warm-up, constant, then linear decay over the last `decay_fraction` of the steps (arXiv 2404.06395)."""

    kind: Literal["wsd"]
    warmup_steps: NonNegativeInt
    decay_fraction: Fraction
    min_lr_ratio: Fraction


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CosineConfig:
    """Linear warm-up, then half a cosine down to `min_lr_ratio` of the peak."""

    kind: Literal["cosine"]
    warmup_steps: NonNegativeInt
    min_lr_ratio: Fraction


@dataclass(frozen=True, kw_only=True, config=STRICT)
class _DataConfig:
    tokenizer: str
    holdout_documents: PositiveInt
    prefetch_batches: PositiveInt


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StdlibDataConfig(_DataConfig):
    """The sources of Python's own standard library: real text that every machine has."""

    kind: Literal["stdlib"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FilesDataConfig(_DataConfig):
    """Local .json, .jsonl, .parquet or .txt files: one path or glob, or a list of them."""

    kind: Literal["files"]
    path: str | Annotated[tuple[str, ...], Field(min_length=1)]
    text_field: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HubDataConfig(_DataConfig):
    """A Hugging Face dataset by name (or local folder), streamed in its own order."""

    kind: Literal["hub"]
    name: str
    subset: str | None
    split: str
    text_field: str


DataConfig = Annotated[StdlibDataConfig | FilesDataConfig | HubDataConfig, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KernelsConfig:
    """One implementation per op: `auto` takes the fastest that runs here, a name takes that one or fails."""

    attention: str
    rms_norm: str
    rope: str
    swiglu: str
    linear_cross_entropy: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """Where and how often the state is saved, how many are kept, and what a start resumes from.

    `resume`: `auto` continues from the newest complete checkpoint of `folder` if there is one, `none` starts afresh
    (in a folder without checkpoints), anything else is the path of a checkpoint to begin from, and to go on from
    one's own once there are any.
    """

    folder: str
    every_steps: PositiveInt | None
    keep: PositiveInt
    resume: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ObserveConfig:
    """What is reported, and where. `wandb: auto` is online when logged in, offline otherwise, off if not installed."""

    every_steps: PositiveInt
    wandb: Literal["auto", "online", "offline", "disabled"]
    wandb_project: str
    tensorboard: bool


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """One run, complete. Built by `load_config` only, saved in every checkpoint, never changed."""

    run: RunConfig
    train: LoopConfig
    evaluate: EvaluateConfig
    model: LlamaConfig
    parallel: ParallelConfig
    optim: AdamWConfig
    schedule: Annotated[WarmupStableDecayConfig | CosineConfig, Field(discriminator="kind")]
    data: DataConfig
    kernels: KernelsConfig
    checkpoint: CheckpointConfig
    observe: ObserveConfig

    @model_validator(mode="after")
    def _reject_conflicts(self) -> Self:
        conflicts = find_conflicts(self)  # pyright: ignore[reportArgumentType]
        if conflicts:
            raise ValueError("\n".join(conflicts))
        return self
