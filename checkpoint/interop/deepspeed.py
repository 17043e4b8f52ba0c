"""Checkpoints of DeepSpeed, ZeRO stages 1 to 3: imported without DeepSpeed, and without running what they hold.

DeepSpeed strings the parameters of a group together, cuts the string between the ranks (stages 1 and 2) or every
parameter between them (stage 3), and saves what each rank has: runs of elements, without names. A run is written here
as the boxes that it consists of; nothing is gathered.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardwright.checkpoint.archive import Writer, create
from shardwright.checkpoint.box import FlatSlice, pieces_of
from shardwright.checkpoint.errors import CheckpointError
from shardwright.checkpoint.interop.deepspeed_files import find_files
from shardwright.checkpoint.interop.deepspeed_states import (
    ModelStates,
    Partition,
    Shapes,
    read_model,
    read_partition,
    take_flat,
    take_tensor,
)
from shardwright.checkpoint.leaves import to_json

_logger = logging.getLogger(__name__)

_MAX_JSON_NODES = 100_000


@dataclass(frozen=True)
class Run:
    """Elements [first, first + numel) of a parameter: those from `at` on of a flat tensor."""

    name: str
    shape: tuple[int, ...]
    at: int
    first: int
    numel: int


def import_from_deepspeed(source: str | Path, target: str | Path) -> None:
    """Convert a checkpoint of DeepSpeed: ZeRO 1 to 3, any number of data-parallel ranks, any precision.

    The new checkpoint holds, under the names of the plain model and as precise as DeepSpeed has it:

    - `model.<name>`: master weights, frozen parameters, buffers. A parameter with several names (tied embeddings) is
      there under its first.
    - `optimizer.moments.<name>.<key>`: `exp_avg`, `exp_avg_sq`, or whatever else the optimizer keeps for every element.
    - values `optimizer.num_updates` and `optimizer.groups`: its step and its hyperparameters.
    - values `client.<key>`: what of the client's state JSON can express; a warning names the rest.
    - values `deepspeed.global_steps`, `deepspeed.global_samples` and `deepspeed.skipped_steps`.

    At stages 1 and 2, every master weight is held against the one that DeepSpeed saved beside it for the forward pass.
    Stage 0 is refused: it saves optimizer states without names.

    Args:
        source: the folder that holds `latest`, or the folder of one tag.
        target: the new checkpoint.

    Raises:
        CheckpointError: the source is incomplete, malformed, hostile, model-parallel, of stage 0 or has experts; or the
            target cannot be written. The target is no checkpoint then.
    """
    models, partitions = _read(Path(source))
    model, num_updates = models[0], _num_updates(models[0], partitions)
    groups = [_cut_group(group, shapes, partitions) for group, shapes in enumerate(model.param_shapes)]
    with create(target) as writer:
        for rank, partition in enumerate(partitions):
            for group, ranks in enumerate(groups):
                for run in ranks[rank]:
                    _write_run(writer, model, partition, group, run)
        if partitions[0].stage3:
            _write_frozen(writer, models)
        values = _write_module(writer, model, stage3=partitions[0].stage3)
        values |= {f"client.{key}": value for key, value in model.client.items()}
        left_out = {name for name, value in values.items() if not _write_value(writer, name, value)}
        writer.values["optimizer.num_updates"] = num_updates
        writer.values["optimizer.groups"] = _hyperparameters(model, partitions[0])
        for key in ("global_steps", "global_samples", "skipped_steps"):
            writer.values[f"deepspeed.{key}"] = getattr(model, key)
    left_out |= set().union(*(partition.left_out for partition in partitions))
    if left_out:
        _logger.warning("%s: left out, being neither JSON nor like a weight: %s", source, ", ".join(sorted(left_out)))


def _read(source: Path) -> tuple[list[ModelStates], list[Partition]]:
    """Read all files, and hold them against each other."""
    files = find_files(source)
    models = [read_model(path) for path in files.model]
    model = models[0]
    if not files.optimizer:
        problem = "is of ZeRO stage 0, whose optimizer states have no names; save from zero_optimization.stage=1"
        lost = f"has no *_optim_states.pt beside it; copy those of its {model.dp_world_size} ranks there"
        raise CheckpointError(f"{model.path} {lost if model.optimizer is None else problem}")
    partitions = [read_partition(path, len(files.optimizer)) for path in files.optimizer]
    first = partitions[0]
    if len(models) != (len(partitions) if first.stage3 else 1):
        raise CheckpointError(
            f"{model.path.parent} has {len(models)} files *_model_states.pt for {len(partitions)} partitions; stage 3 "
            "needs as many, stages 1 and 2 one; copy the files of all ranks there"
        )
    for other in models:
        if other.identity != model.identity or other.dp_world_size != len(partitions):
            raise CheckpointError(
                f"{other.path} (step {other.global_steps} on {other.dp_world_size} ranks) does not belong to "
                f"{model.path} and {len(partitions)} partitions; restore the files of one save"
            )
    for other in partitions:
        if other.layout != first.layout or len(other.flats) != len(model.param_shapes):
            raise CheckpointError(
                f"{other.path} has other groups or optimizer states than {first.path} or {model.path}; "
                "restore the files of one save"
            )
    return models, partitions


def _num_updates(model: ModelStates, partitions: Sequence[Partition]) -> int:
    steps = set().union(*(partition.steps for partition in partitions))
    if len(steps) > 1:
        raise CheckpointError(
            f"{model.path.parent}: optimizer states are of updates {sorted(steps)}; they must be of one; "
            "restore the files of one save"
        )
    return steps.pop() if steps else max(model.global_steps - model.skipped_steps, 0)


def _cut_group(group: int, shapes: Shapes, partitions: Sequence[Partition]) -> list[list[Run]]:
    """Return, for every rank, the runs that its flat tensor of a group holds.

    Raises:
        CheckpointError: the sizes of parameters and flat tensors do not add up.
    """
    first, numels = partitions[0], [partition.flats[group].numel() for partition in partitions]
    ranks = range(len(partitions))
    if first.stage3:
        if set(numels) == {sum(-(-math.prod(shape) // len(ranks)) for shape in shapes.values())}:
            return [list(_cut_each(shapes, len(ranks), rank)) for rank in ranks]
    else:
        gaps = first.gaps[group] if first.gaps is not None else [0] * len(shapes)
        length = sum(map(math.prod, shapes.values())) + sum(gaps)
        share = _find_share(length, numels, [partition.paddings[group] for partition in partitions])
        if share is not None and len(gaps) == len(shapes):
            return [list(_cut_string(shapes, gaps, rank * share, (rank + 1) * share)) for rank in ranks]
    raise CheckpointError(
        f"{first.path.parent}: the {len(shapes)} parameters of group {group} do not add up to partitions of {numels} "
        "elements; the files are not of one save, or of another version; save the checkpoint with DeepSpeed 0.19"
    )


def _find_share(length: int, numels: list[int], paddings: list[int]) -> int | None:
    """Return into shares of how many elements a string was cut: saved with their padding, or without."""
    for share in (numels[0], numels[0] + paddings[0]):
        held = [min(max(length - rank * share, 0), share) for rank in range(len(numels))]
        padded = [share] * len(numels)
        if sum(held) == length and numels in (held, padded) and sum(paddings) == sum(padded) - length:
            return share
    return None


def _cut_string(shapes: Shapes, gaps: Sequence[int], start: int, end: int) -> Iterator[Run]:
    """Yield the runs of parameters, strung together, within elements [start, end) of the string."""
    offset = 0
    for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
        numel = math.prod(shape)
        first, last = max(start, offset), min(end, offset + numel)
        if first < last:
            yield Run(name, shape, first - start, first - offset, last - first)
        offset += numel + gap


def _cut_each(shapes: Shapes, num_ranks: int, rank: int) -> Iterator[Run]:
    """Yield the runs of a rank where every parameter is cut into equal shares, the last ones padded."""
    at = 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        share = -(-numel // num_ranks)
        first = min(rank * share, numel)
        if first < numel:
            yield Run(name, shape, at, first, min(share, numel - first))
        at += share


def _write_run(writer: Writer, model: ModelStates, partition: Partition, group: int, run: Run) -> None:
    weights = partition.flats[group][run.at : run.at + run.numel]
    if not partition.stage3:
        _check_weights(model, partition.path, run, weights)
    _add(writer, f"model.{run.name}", run, weights)
    for key, moment in partition.moments[group].items():
        _add(writer, f"optimizer.moments.{run.name}.{key}", run, moment[run.at : run.at + run.numel])


def _check_weights(model: ModelStates, path: Path, run: Run, weights: torch.Tensor) -> None:
    """Hold master weights against what the forward pass used: did we, too, take them for the right parameter?"""
    used = take_tensor(model.module.get(run.name), run.name, model.path)
    if used.shape == run.shape:
        part = used.reshape(-1)[run.first : run.first + run.numel].nan_to_num()
        if torch.equal(weights.to(part.dtype).nan_to_num(), part):
            return
    raise CheckpointError(
        f"{path}: the master weights of {run.name} are not those in {model.path.name}; they must be the same, rounded; "
        "restore the files of one save"
    )


def _write_frozen(writer: Writer, models: Sequence[ModelStates]) -> None:
    """Write the parameters without an optimizer, of which at stage 3 every rank has a share."""
    for name, shape in models[0].frozen_param_shapes.items():
        numel = math.prod(shape)
        share = -(-numel // len(models))
        for rank, model in enumerate(models if numel else models[:1]):
            part = take_flat(model.frozen_param_fragments.get(name), name, model.path)
            if part.numel() != share:
                raise CheckpointError(
                    f"{model.path} has {part.numel()} elements of {name} {list(shape)}, a share of {len(models)} has "
                    f"{share}; restore the files of one save"
                )
            first = min(rank * share, numel)
            run = Run(name, shape, 0, first, min(share, numel - first))
            _add(writer, f"model.{name}", run, part[: run.numel])


def _write_module(writer: Writer, model: ModelStates, *, stage3: bool) -> dict[str, Any]:
    """Write the tensors that no partition has: buffers, and before stage 3 frozen parameters. Return the other values.

    Raises:
        CheckpointError: a parameter is nowhere.
    """
    written = {name for shapes in model.param_shapes for name, shape in shapes.items() if math.prod(shape)}
    written |= model.frozen_param_shapes.keys() if stage3 else set()
    written |= {alias for alias, name in model.shared_params.items() if name in written or name in model.module}
    values = {}
    for name, value in model.module.items():
        if not isinstance(value, torch.Tensor):
            values[f"model.{name}"] = value
        elif name not in written or not (stage3 or value.numel()):
            tensor = take_tensor(value, name, model.path)
            if stage3 and not tensor.numel() and name not in model.buffer_names:
                raise CheckpointError(f"{model.path} has no data of {name}; save with exclude_frozen_parameters=False")
            writer.add(f"model.{name}", tensor)
    return values


def _add(writer: Writer, name: str, run: Run, values: torch.Tensor) -> None:
    if not math.prod(run.shape):
        writer.add(name, values.view(run.shape))
    for piece in pieces_of(FlatSlice(run.shape, run.first, values)):
        writer.add(name, piece.tensor, shape=piece.shape, offsets=piece.box.offsets)


def _hyperparameters(model: ModelStates, partition: Partition) -> list[dict[str, Any]]:
    """Return what every group of parameters was trained with, as far as JSON can say it, and their names."""
    groups = []
    for group in partition.groups:
        names = [name for index in group["params"] for name in model.param_shapes[index]]
        writable = {key: value for key, value in group.items() if key != "step" and _is_json(value)}
        groups.append({**to_json("optimizer.groups", writable), "params": names})
    return groups


def _write_value(writer: Writer, name: str, value: Any) -> bool:
    """Write a value, and return true, if JSON can express it."""
    if not _is_json(value):
        return False
    writer.values[name] = to_json(name, value)
    return True


def _is_json(value: Any) -> bool:
    waiting, count = [value], 0
    while waiting:  # a pickle of a few bytes can be a tree of any size
        node = waiting.pop()
        inner = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list | tuple) else []
        waiting += inner
        count += 1
        if count + len(waiting) > _MAX_JSON_NODES:
            return False
    try:
        to_json("", value)
    except (CheckpointError, RuntimeError):  # also what a too deep tree, or a tensor without memory, provokes
        return False
    return True
