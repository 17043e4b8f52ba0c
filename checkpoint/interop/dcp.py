"""Checkpoints of torch.distributed.checkpoint (DCP), both ways.

A checkpoint from a stranger can do no more than be refused. Both ways run in one process and stream: memory does not
grow with the checkpoint.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import NoneType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from shardwright.checkpoint import archive as archives
from shardwright.checkpoint.archive import Archive, split
from shardwright.checkpoint.box import Box
from shardwright.checkpoint.errors import CheckpointError
from shardwright.checkpoint.interop.dcp_files import Index, KeyPath, dotted, read_entries, read_index
from shardwright.checkpoint.manifest import TensorInfo

_LOGGER = logging.getLogger(__name__)

_OPTIMIZERS = ("optimizer", "optim")
_MOMENTS, _NUM_UPDATES, _GROUPS = "optimizer.moments.", "optimizer.num_updates", "optimizer.param_groups"
_PREFIXES = {"model": "model.", "moment": _MOMENTS, "other": ""}
_CHUNK_BYTES = 128 * 2**20  # of a tensor, as exported
_FILE_BYTES = 512 * 2**20  # what torch's writer has in memory at once: all that goes to a file


def import_from_dcp(source_folder: str | Path, target: str | Path, *, skip: Collection[str] = ()) -> None:
    """Turn a DCP checkpoint, saved at any layout, into one of ours.

    The state may be `{"model": ..., "optimizer" (or "optim"): ...}`, also within one more dict, or have the model's
    tensors at the top (torchtitan). Of the optimizer it is what torch.distributed.checkpoint.state_dict gives, flat or
    not: the steps become the value `optimizer.num_updates`, the groups the value `optimizer.param_groups`. All else
    keeps its name. Values that JSON does not know are left out, with a warning; what only foreign code could read is
    refused.

    Args:
        source_folder: local, with a `.metadata` file.
        target: folder or URL of the new checkpoint.
        skip: patterns (fnmatch) of keys to leave out, such as `rng` or `optimizer.*`; a refusal names its key.

    Raises:
        CheckpointError: there is none, or it is damaged, not to be trusted, or of another form. No code of it has run,
            and there is no new checkpoint.
    """
    folder = Path(source_folder)
    if Path(target).resolve() == folder.resolve():
        raise CheckpointError(f"target {target} is the source folder, which would be overwritten; give another")
    index = read_index(folder, skip)
    roles = _find_roles(index)
    names = _choose_names(roles)
    values, left_out = {}, []
    with archives.create(target) as writer:
        for entry, data in read_entries(folder, index):
            if entry.box and entry.key in names:
                shape = index.tensors[entry.key].shape
                if entry.box.numel or 0 in shape:
                    writer.add(names[entry.key], data, shape=shape, offsets=entry.box.offsets)
                continue
            try:
                values[entry.key] = _to_json(data, iter(range(entry.length)))
            except (TypeError, RecursionError):
                left_out.append(entry.key)
        writer.values.update(_make_values(roles, names, values))
    if left_out:
        some = ", ".join(left_out[:20])
        _LOGGER.warning("%d values are left out of %s, as JSON does not know them: %s", len(left_out), target, some)


def export_to_dcp(source: str | Path, target_folder: str | Path) -> None:
    """Write a checkpoint of ours as a DCP checkpoint, with torch's own writer.

    `dcp.load` fills `{"model": get_model_state_dict(m), "optimizer": get_optimizer_state_dict(m, o)}` from it, at any
    layout. The groups of `o` are those of the value `optimizer.param_groups`; without one, matrices and the rest, as
    our optimizers have them, with the hyperparameters of the run, or torch's. An `o` with a single group loads those of
    the matrices. Other tensors and values keep their names.

    Args:
        source: folder or URL of a checkpoint of ours.
        target_folder: local; new or empty.

    Raises:
        CheckpointError: no checkpoint there, a damaged one, or a target that is not empty or cannot be written.
    """
    archive, target = archives.open(source), Path(target_folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"target {target} exists and is not empty; give a new folder")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.save({}, storage_writer=_FileWriter(target), planner=_Planner(archive), no_dist=True)
    except BaseException as error:
        for path in target.glob("*"):
            path.unlink()
        with suppress(OSError):
            target.rmdir()
        if not isinstance(error, CheckpointException):
            raise
        cause = error.failures[0][0]
        if isinstance(cause, CheckpointError):
            raise cause from None
        raise CheckpointError(f"{target} cannot be written: {cause}; free or repair the disk") from cause


def _find_roles(index: Index) -> dict[str, tuple[str, str]]:
    """Return what every key is ("model", "moment", "step", "group" or "other"), and its name as that."""
    heads = {"model", *_OPTIMIZERS}
    depths = (d for d in (0, 1) if any(len(path) > d + 1 and path[d] in heads for path in index.paths.values()))
    depth = next(depths, 0)
    long = {key: path for key, path in index.paths.items() if len(path) > depth + 1}
    parts = {key: (path[depth], dotted(path[depth + 1 :])) for key, path in long.items()}
    is_flat = not any(head == "model" for head, _ in parts.values())
    roles = {}
    for key, path in index.paths.items():
        head, rest = parts.get(key, ("", ""))
        section, _, name = rest.partition(".")
        if head == "model":
            roles[key] = "model", rest
        elif is_flat and len(path) == 1 and key in index.tensors:
            roles[key] = "model", key
        elif head in _OPTIMIZERS and section == "state":
            roles[key] = ("step", name.removesuffix(".step")) if name.endswith(".step") else ("moment", name)
        elif head in _OPTIMIZERS and section == "param_groups":
            roles[key] = "group", name
        else:
            roles[key] = "other", key
    return roles


def _choose_names(roles: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Return what the entries that stay by themselves are called here, after checking that they can be."""
    names = {key: _PREFIXES[role] + name for key, (role, name) in roles.items() if role in _PREFIXES}
    models = {name for role, name in roles.values() if role == "model"}
    for key, (role, name) in roles.items():
        owners = accumulate(name.split("."), "{}.{}".format)  # a, a.b, a.b.c of a.b.c
        if role in ("moment", "step") and not any(owner in models for owner in owners):
            raise CheckpointError(
                f"{key} is of no tensor of the model; save the optimizer as get_optimizer_state_dict gives it, or skip "
                "the entries of the optimizer"
            )
    known: dict[str, str] = {}
    for key, name in names.items():
        if known.setdefault(name, key) != key:
            raise CheckpointError(f"{key} and {known[name]} would both be {name}; skip one of them")
    return names


def _make_values(roles: dict[str, tuple[str, str]], names: dict[str, str], read: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the new checkpoint, from those that were read by key."""
    values: dict[str, Any] = {}
    steps: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in read.items():
        role, name = roles[key]
        if role == "step":
            steps[key] = value
        elif role == "group":
            owner, _, hyperparameter = name.rpartition(".")
            groups[owner][hyperparameter] = value
        else:
            values[names[key]] = value
    if steps:
        values[_NUM_UPDATES] = _agree(steps)
    if groups:
        values[_GROUPS] = _assemble(groups)
    return values


def _agree(steps: dict[str, Any]) -> int:
    first, count = next(iter(steps.items()))
    for key, other in steps.items():
        if type(other) not in (int, float) or not float(other).is_integer():
            raise CheckpointError(f"{key} is no whole number of updates; skip the entries of the optimizer")
        if other != count:
            raise CheckpointError(
                f"{key} is {other} and {first} is {count}; one number of updates is kept for all parameters; "
                "skip the entries of the optimizer"
            )
    return int(count)


def _assemble(groups: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a list of groups, from groups by number, or from hyperparameters by parameter."""
    if all("params" in group for group in groups.values()):
        return [groups[number] for number in sorted(groups, key=lambda number: (len(number), number))]
    merged: dict[str, dict[str, Any]] = {}
    for parameter, group in groups.items():
        alike = merged.setdefault(json.dumps(group, sort_keys=True), {**group, "params": []})
        alike["params"].append(parameter)
    return list(merged.values())


def _to_json(value: Any, nodes: Iterator[int]) -> Any:
    """Return a value as JSON has it; `nodes` counts down how many more there may be.

    Raises:
        TypeError: it has no such form, or is one that a few bytes blow up.
    """
    if next(nodes, None) is None:
        raise TypeError("more values than bytes")
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if type(value) in (bool, float, str, NoneType) or (type(value) is int and abs(value) < 2**63):
        return value
    if isinstance(value, list | tuple):
        return [_to_json(inner, nodes) for inner in value]
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: _to_json(inner, nodes) for key, inner in value.items()}
    raise TypeError(f"{type(value).__name__} is not of JSON")


# The way out.


class _Planner(DefaultSavePlanner):
    """Tells torch's writer what there is, and reads each chunk when the writer asks for it."""

    def __init__(self, archive: Archive) -> None:
        super().__init__()
        self._archive = archive
        self._names: dict[str, str] = {}  # key -> tensor of the archive
        self._values: dict[str, Any] = {}  # key -> anything else

    def create_local_plan(self) -> SavePlan:
        paths: dict[str, KeyPath] = {}
        items: list[WriteItem] = []
        for name, info in self._archive.tensors.items():
            path = _path_of(name)
            key = dotted(path)
            paths[key], self._names[key] = path, name
            whole = Box((0,) * len(info.shape), info.shape)
            items += [_write_item(key, info, box) for box in split(whole, _CHUNK_BYTES // info.dtype.itemsize)]
        for path, value in _other_entries(self._archive):
            key = dotted(path)
            paths[key], self._values[key] = path, value
            if isinstance(value, torch.Tensor):
                items.append(_write_item(key, TensorInfo(value.dtype, ()), Box((), ())))
            else:
                items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
        return SavePlan(items, planner_data=paths)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        key = write_item.index.fqn
        if key in self._names:
            assert write_item.tensor_data is not None
            chunk = write_item.tensor_data.chunk
            return self._archive.read(self._names[key], Box(tuple(chunk.offsets), tuple(chunk.sizes)))
        if isinstance(self._values[key], torch.Tensor):
            return self._values[key]
        data = io.BytesIO()
        torch.save(self._values[key], data)
        return data


class _FileWriter(dcp.FileSystemWriter):
    """torch's writer, with several files: it keeps in memory what it wrote until a file is complete."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        for number, items in enumerate(_batches(plan.items)):
            prefix = replace(plan.storage_data, prefix=f"__{number}_")
            results += super().write_data(replace(plan, items=items, storage_data=prefix), planner).wait()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _batches(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    batch, size = [], 0
    for item in items:
        num_bytes = item.tensor_storage_size() or 0
        if batch and size + num_bytes > _FILE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += num_bytes
    yield batch


def _write_item(key: str, info: TensorInfo, box: Box) -> WriteItem:
    offsets = torch.Size(box.offsets)
    chunk = ChunkStorageMetadata(offsets, torch.Size(box.sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=info.dtype), torch.Size(info.shape))
    return WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=data)


def _path_of(name: str) -> KeyPath:
    if name.startswith(_MOMENTS):
        parameter, _, moment = name.removeprefix(_MOMENTS).rpartition(".")
        return "optimizer", "state", parameter, moment
    return ("model", name.removeprefix("model.")) if name.startswith("model.") else (name,)


def _other_entries(archive: Archive) -> Iterator[tuple[KeyPath, Any]]:
    """Yield what is no tensor here: the steps and groups of the optimizer, and values."""
    moments = [_path_of(name) for name in archive.tensors if name.startswith(_MOMENTS)]
    parameters = list(dict.fromkeys(str(parameter) for _, _, parameter, _ in moments))
    if parameters:
        for index, group in enumerate(archive.values.get(_GROUPS) or _make_groups(archive, parameters)):
            for key, value in group.items():
                yield ("optimizer", "param_groups", index, key), value
    for name, value in archive.values.items():
        if name == _NUM_UPDATES:
            for parameter in parameters:
                yield ("optimizer", "state", parameter, "step"), torch.tensor(float(value))
        elif name != _GROUPS:
            yield (name,), value


def _make_groups(archive: Archive, parameters: list[str]) -> list[dict[str, Any]]:
    """Return two groups as torch's AdamW has them, the first with the parameters that weights decay for."""
    group = dict(torch.optim.AdamW([torch.zeros(1)]).param_groups[0])
    config = (archive.values.get("progress.config") or {}).get("optim")
    if config:
        group |= {"lr": config["peak_lr"], "eps": config["eps"], "weight_decay": config["weight_decay"]}
        group |= {"betas": (config["beta1"], config["beta2"])}
    else:
        _LOGGER.warning("hyperparameters of the optimizer are not known: those of torch are written; set your own")
    group["initial_lr"] = group["lr"]
    decayed = [p for p in parameters if len(archive.tensors[f"model.{p}"].shape) > 1]
    rest = [p for p in parameters if p not in set(decayed)]
    groups = [{**group, "params": decayed}, {**group, "weight_decay": 0.0, "params": rest}]
    return [group for group in groups if group["params"]]
