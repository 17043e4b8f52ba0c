"""What the files of a DeepSpeed checkpoint hold: the module's state, and the partition of every rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from shardwright.checkpoint.errors import CheckpointError
from shardwright.checkpoint.interop.deepspeed_files import load

Shapes = dict[str, tuple[int, ...]]

_Count = Annotated[int, Field(strict=True, ge=0, lt=2**60)]
_Shapes = dict[str, Annotated[tuple[_Count, ...], Field(max_length=16)]]
_CONFIG = ConfigDict(arbitrary_types_allowed=True)
_UNNEEDED = {  # entries of a model file that are DeepSpeed's; what is neither here nor a field below is the client's
    "lr_scheduler", "data_sampler", "random_ltd", "ds_config", "ds_version", "checkpoint_parallel_dimensions",
    "universal_checkpoint_info", "num_experts", "amp", "sparse_tensor_module_names", "csr_tensor_module_names",
}  # fmt: skip


@checked_dataclass(frozen=True, config=_CONFIG)
class ModelStates:
    """A file of model states.

    Attributes:
        path: of the file.
        client: what the client put there.
        module: the state of the module; at stage 3 with placeholders for parameters.
        buffer_names: which of it are buffers.
        mp_world_size: degree of model parallelism.
        dp_world_size: number of ranks that have a partition.
        global_steps: steps that were taken.
        global_samples: samples that were seen.
        skipped_steps: steps that were not applied.
        param_shapes: names and shapes of the trained parameters, group by group in the order of the flat tensors.
        frozen_param_shapes: names and shapes of the other parameters (stages 2 and 3).
        frozen_param_fragments: this rank's part of those.
        shared_params: further name of a parameter -> its first one.
        optimizer: its state, without names (stage 0).
    """

    path: Path
    client: dict[str, Any]
    module: dict[str, Any]
    buffer_names: list[str]
    mp_world_size: _Count
    dp_world_size: _Count
    global_steps: _Count
    global_samples: _Count = 0
    skipped_steps: _Count = 0
    param_shapes: list[_Shapes] = Field(default_factory=list)
    frozen_param_shapes: _Shapes = Field(default_factory=dict)
    frozen_param_fragments: dict[str, torch.Tensor] = Field(default_factory=dict)
    shared_params: dict[str, str] = Field(default_factory=dict)
    optimizer: Any = None

    @property
    def identity(self) -> tuple[Any, ...]:
        """What the files of all ranks agree on."""
        return self.dp_world_size, self.global_steps, self.global_samples, self.param_shapes, self.frozen_param_shapes


@checked_dataclass(frozen=True, config=_CONFIG)
class _Optimizer:
    param_groups: list[dict[str, Any]]
    state: dict[_Count, dict[str, Any]]


@checked_dataclass(frozen=True, config=_CONFIG)
class _ZeroStates:
    partition_count: _Count | list[_Count]
    fp32_flat_groups: list[torch.Tensor] | None = None  # stage 3 ...
    optimizer_state_dict: _Optimizer | None = None
    single_partition_of_fp32_groups: list[torch.Tensor] | None = None  # ... and the others
    base_optimizer_state: _Optimizer | list[dict[str, Any]] | None = None
    base_optimizer_state_step: Any = None
    group_paddings: list[_Count] | None = None
    param_alignment_paddings: list[list[_Count]] | None = None


_MODEL, _ZERO = TypeAdapter(ModelStates), TypeAdapter(_ZeroStates)


@dataclass(frozen=True)
class Partition:
    """What a rank holds of weights and moments.

    Attributes:
        path: of its file.
        stage3: every parameter is cut between the ranks; else a group is, as one string.
        flats: weights of every group, one-dimensional.
        paddings: for every group, elements that `flats` has not but its partition.
        gaps: for every group, elements of padding after each of its parameters; None if there are none.
        moments: of every group, key -> tensor like the flat one.
        groups: hyperparameters; `params` says of which of these groups.
        left_out: names of further optimizer states: scalars and other objects.
        steps: all numbers of updates that the optimizer states.
    """

    path: Path
    stage3: bool
    flats: list[torch.Tensor]
    paddings: list[int]
    gaps: list[list[int]] | None
    moments: list[dict[str, torch.Tensor]]
    groups: list[dict[str, Any]]
    left_out: set[str]
    steps: set[int]

    @property
    def layout(self) -> tuple[Any, ...]:
        """What the partitions of all ranks agree on."""
        return self.stage3, self.gaps, [sorted(moments) for moments in self.moments]


def read_model(path: Path) -> ModelStates:
    """Read and check a file of model states.

    Raises:
        CheckpointError: it is refused, malformed, or of a model-parallel run.
    """
    content = load(path)
    own = _UNNEEDED | ModelStates.__dataclass_fields__.keys()
    client = {key: value for key, value in content.items() if isinstance(key, str) and key not in own}
    stated = {key: value for key, value in content.items() if value is not None}
    model: ModelStates = _validate(_MODEL, {**stated, "path": path, "client": client}, path)
    if model.mp_world_size != 1:
        raise CheckpointError(
            f"{path} is of {model.mp_world_size} model-parallel ranks; only data-parallel checkpoints are imported; "
            "save one with tensor and pipeline parallelism 1"
        )
    trained = [name for shapes in model.param_shapes for name in shapes]
    if len({*trained, *model.frozen_param_shapes}) != len(trained) + len(model.frozen_param_shapes) or (
        not model.shared_params.keys().isdisjoint(trained)
    ):
        raise CheckpointError(f"{path} has a parameter twice; save the checkpoint again")
    return model


def read_partition(path: Path, world_size: int) -> Partition:
    """Read and check the partition of a rank.

    Args:
        path: of a file of optimizer states.
        world_size: how many such files there are.

    Raises:
        CheckpointError: it is refused, malformed, or one of another number of partitions.
    """
    zero: _ZeroStates = _validate(_ZERO, load(path).get("optimizer_state_dict"), path)
    counts = zero.partition_count if isinstance(zero.partition_count, list) else [zero.partition_count]
    if set(counts) != {world_size}:
        raise CheckpointError(
            f"{path} is one of {max(counts, default=0)} partitions (partition_count={counts}), and {world_size} files "
            "*_optim_states.pt are there; copy the files of all ranks there (experts are not imported)"
        )
    stage3 = zero.fp32_flat_groups is not None
    weights = zero.fp32_flat_groups if stage3 else zero.single_partition_of_fp32_groups
    flats = [take_flat(weight, "a partition of weights", path) for weight in weights or ()]
    paddings = [0] * len(flats) if stage3 else zero.group_paddings
    states, groups = _list_states(zero.optimizer_state_dict if stage3 else zero.base_optimizer_state, path)
    if paddings is None or not len(flats) == len(paddings) == len(states):
        raise CheckpointError(
            f"{path} has {len(flats)} partitions of weights, {len(states)} optimizer states and paddings {paddings}; "
            "they must be as many; save the checkpoint with DeepSpeed 0.19"
        )
    moments = [_take_moments(*of_group, path) for of_group in zip(states, flats, paddings, strict=True)]
    left_out = {key for state, held in zip(states, moments, strict=True) for key in state.keys() - held - {"step"}}
    steps = _read_steps([zero.base_optimizer_state_step, *(owner.get("step") for owner in (*states, *groups))], path)
    return Partition(path, stage3, flats, paddings, zero.param_alignment_paddings, moments, groups, left_out, steps)


def take_tensor(value: Any, what: str, path: Path) -> torch.Tensor:
    """Return a plain tensor, sharing its memory.

    Raises:
        CheckpointError: it is none, or claims more elements than the file has bytes.
    """
    if isinstance(value, torch.Tensor):
        tensor = torch.Tensor.detach(value)  # drops what a file can attach to a tensor
        plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and tensor.device.type == "cpu"
        if plain and not tensor.is_quantized and tensor.numel() * tensor.itemsize <= path.stat().st_size:
            return tensor
    raise CheckpointError(f"{path}: {what} is no plain tensor of the size that the file has; save the checkpoint again")


def take_flat(value: Any, what: str, path: Path) -> torch.Tensor:
    """Return a one-dimensional, contiguous floating-point tensor, sharing its memory.

    Raises:
        CheckpointError: it is something else.
    """
    tensor = take_tensor(value, what, path)
    if tensor.ndim != 1 or not tensor.is_contiguous() or not tensor.is_floating_point():
        raise CheckpointError(
            f"{path}: {what} is {tensor.dtype} {list(tensor.shape)}, not a run of numbers; save the checkpoint again"
        )
    return tensor


def _validate(adapter: TypeAdapter[Any], content: Any, path: Path) -> Any:
    try:
        return adapter.validate_python(content)
    except (ValidationError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "it is too deep"}
        where = ".".join(str(part) for part in first["loc"])[:200]
        raise CheckpointError(
            f"{path} is malformed, or of another version: {where}: {first['msg']}; save it again with DeepSpeed 0.19"
        ) from error


def _list_states(
    optimizer: _Optimizer | list[dict[str, Any]] | None, path: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the state of every flat tensor, and the groups of hyperparameters."""
    if not isinstance(optimizer, _Optimizer):  # "elastic": the states alone
        return optimizer or [], []
    groups = optimizer.param_groups
    order = [index for group in groups for index in _indices(group)]
    if order != list(range(len(order))) or not optimizer.state.keys() <= set(order):
        raise CheckpointError(f"{path}: the states of the optimizer are out of order; save the checkpoint again")
    return [optimizer.state.get(index, {}) for index in order], groups


def _indices(group: dict[str, Any]) -> list[Any]:
    indices = group.get("params")
    return indices if isinstance(indices, list) else [None]


def _read_steps(values: Iterable[Any], path: Path) -> set[int]:
    steps = set()
    for value in values:
        number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if number is None:
            continue
        if not isinstance(number, (int, float)) or not 0 <= number < 2**60 or number != int(number):
            raise CheckpointError(f"{path}: step={str(number)[:80]} is no number of updates; save the checkpoint again")
        steps.add(int(number))
    return steps


def _take_moments(state: dict[str, Any], flat: torch.Tensor, padding: int, path: Path) -> dict[str, torch.Tensor]:
    """Return what the optimizer keeps for every element of a flat tensor, without padding; scalars are left out."""
    moments = {}
    for key, value in state.items():
        if key == "step" or not isinstance(value, torch.Tensor) or not value.ndim:
            continue
        moment = take_flat(value, key, path)
        if moment.numel() not in (flat.numel(), flat.numel() + padding):
            raise CheckpointError(
                f"{path} has {moment.numel()} elements of {key} for {flat.numel()} weights and {padding} of padding; "
                "an optimizer that keeps other things than one number for each weight is not imported"
            )
        moments[key] = moment[: flat.numel()]
    return moments
