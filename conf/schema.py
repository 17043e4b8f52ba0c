"""The schema of a run: frozen dataclasses, decoded by pydantic from the YAML that Hydra composes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    TypeAdapter,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from shardwright.conf.checks import find_conflicts, find_llama_conflicts

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
class ModelConfig:
    """What the config of every model family has. A family derives its own from it and adds fields."""

    kind: str
    name: Name
    vocab_size: PositiveInt

    @property
    def kernel_sizes(self) -> dict[str, int | None]:
        """Sizes that kernels are chosen by; `head_dim` is that of a family that attends."""
        return {"head_dim": None, "hidden_size": None, "intermediate_size": None}

    def find_conflicts(self, config: TrainConfig) -> Iterator[str]:
        """Yield a message (value, rule, remedy) for every pair of settings that this family cannot run."""
        yield from ()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RopeScalingConfig:
    """Llama 3.1's stretching of the rotary wavelengths beyond the original context."""

    factor: PositiveFloat
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_context_tokens: PositiveInt


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LlamaConfig(ModelConfig):
    """Llama 3 family; `parallel_block` and `sliding_window` are MegaScale's options (arXiv 2402.15627, section 3.1)."""

    kind: Literal["llama"]
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

    @property
    def kernel_sizes(self) -> dict[str, int | None]:
        """See `ModelConfig`."""
        return {
            "head_dim": self.head_dim,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
        }

    def find_conflicts(self, config: TrainConfig) -> Iterator[str]:
        """See `ModelConfig`."""
        return find_llama_conflicts(self, config.parallel)  # pyright: ignore[reportArgumentType]


MODEL_CONFIGS: dict[str, type[ModelConfig]] = {"llama": LlamaConfig}  # models.registry.register adds to it


def _decode_model(raw: Any) -> ModelConfig:
    """Decode a model config as the class that is registered for its kind."""
    if isinstance(raw, ModelConfig):
        return raw
    if not isinstance(raw, dict):
        raise PydanticCustomError("dataclass_type", "must be a group of settings")
    known = ", ".join(MODEL_CONFIGS)
    if "kind" not in raw:
        raise ValueError(f"model.kind is not set; it is required; add model.kind=VALUE, known: {known}")
    if raw["kind"] not in MODEL_CONFIGS:
        raise ValueError(
            f"model.kind={raw['kind']} is not registered; known: {known}; add the module that registers it to plugins"
        )
    return TypeAdapter(MODEL_CONFIGS[raw["kind"]]).validate_json(json.dumps(raw))  # as conf.load does, and why


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ParallelConfig:
    """Degrees of the mesh axes, and how each axis works.

    The product of the degrees is the number of processes; `shard: auto` takes what the others leave.
    `pipeline_schedule` is a name or the path of a YAML table; `pipeline_chunks: auto` gives each process as many stages
    as the schedule needs. `zero: auto` is 3, but 2 with a pipeline or with one shard.
    """

    pipeline: PositiveInt
    replicate: PositiveInt
    shard: PositiveInt | Literal["auto"]
    context: PositiveInt
    tensor: PositiveInt
    pipeline_schedule: str
    pipeline_chunks: PositiveInt | Literal["auto"]
    context_mode: Literal["ring", "ulysses"]
    tensor_overlap: Literal["none", "chunked"]
    zero: Literal["auto", 2, 3]

    @property
    def num_chunks(self) -> int:
        """Stages per process along the pipeline, for the schedules that have names."""
        if self.pipeline_chunks == "auto":
            return 2 if self.pipeline_schedule in ("interleaved_1f1b", "zbv") else 1
        return self.pipeline_chunks


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NoRecomputeConfig:
    """Every activation that backward needs is kept."""

    kind: Literal["none"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FullRecomputeConfig:
    """Each block keeps its input only (arXiv 1604.06174)."""

    kind: Literal["full"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SelectiveRecomputeConfig:
    """The outputs of the named ops are made again in backward, all else is kept (arXiv 2205.05198)."""

    kind: Literal["selective"]
    ops: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BudgetRecomputeConfig:
    """As little recomputation as lets the saved activations of a process fit into `gib`."""

    kind: Literal["budget"]
    gib: PositiveFloat


RecomputeConfig = Annotated[
    NoRecomputeConfig | FullRecomputeConfig | SelectiveRecomputeConfig | BudgetRecomputeConfig,
    Field(discriminator="kind"),
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimConfig:
    """What the optimizers have in common; norms and biases are not decayed."""

    peak_lr: PositiveFloat
    beta1: Fraction
    beta2: Fraction
    eps: PositiveFloat
    weight_decay: NonNegativeFloat
    max_grad_norm: PositiveFloat | None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdamWConfig(OptimConfig):
    """AdamW (arXiv 1711.05101)."""

    kind: Literal["adamw"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LambConfig(OptimConfig):
    """LAMB (arXiv 1904.00962), for large batches; norms and biases are not scaled by a trust ratio either."""

    kind: Literal["lamb"]


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

    embedding: str
    attention: str
    linear: str
    rms_norm: str
    rope: str
    swiglu: str
    linear_cross_entropy: str
    vocabulary_statistics: str
    optimizer: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """Where, how and how often the state is saved, how many are kept, and what a start resumes from.

    `folder`: a local path, or a URL that fsspec knows, such as s3://bucket/run. `keep`: the newest so many stay, and
    those of every `keep_every_steps`-th step.

    `mode`: `overlap` copies the state to host memory behind the next step's forward and backward and writes it behind
    training, `async` trains on when it is copied, `sync` when it is written. `memory_gib`: host memory for such copies,
    per process. `unfinished`: whether a save waits for an unfinished one or drops it. `timeout_seconds`: how long
    processes wait for each other in a save.

    `memory_every_steps`: so often the state is also kept in the memory of the hosts, in `memory_folder` on each, every
    part on two hosts if there are two; a start goes on from there if it is newer, after a process has failed.

    `resume`: `auto` continues from the newest complete checkpoint of `folder` if there is one, `none` starts afresh (in
    a folder without checkpoints), anything else is the path of a checkpoint to begin from, and to go on from one's own
    once there are any.
    """

    folder: str
    every_steps: PositiveInt | None
    keep: PositiveInt
    keep_every_steps: PositiveInt | None
    mode: Literal["sync", "async", "overlap"]
    memory_gib: PositiveFloat
    unfinished: Literal["wait", "supersede"]
    timeout_seconds: PositiveFloat
    memory_every_steps: PositiveInt | None
    memory_folder: str
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
    """One run, complete. Built by `load_config` only, saved in every checkpoint, never changed.

    `plugins` are modules or .py files that are imported at start on every process, such as one that registers a model
    family (see `models.registry`).
    """

    plugins: tuple[str, ...]
    run: RunConfig
    train: LoopConfig
    evaluate: EvaluateConfig
    model: Annotated[SerializeAsAny[ModelConfig], PlainValidator(_decode_model)]
    parallel: ParallelConfig
    recompute: RecomputeConfig
    optim: Annotated[AdamWConfig | LambConfig, Field(discriminator="kind")]
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
