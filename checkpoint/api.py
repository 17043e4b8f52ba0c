"""Save and load the state of a run: safe at any moment, readable at any layout.

A checkpoint is a folder of safetensors files and one manifest. A tensor is stored under the name that it has in the
plain model, as boxes in its global index space; nothing in the folder depends on how many processes wrote it.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from shardwright.checkpoint import manifest as manifests
from shardwright.checkpoint import storage
from shardwright.checkpoint.box import Box, Piece, piece_of
from shardwright.checkpoint.errors import CheckpointError
from shardwright.checkpoint.manifest import DTYPES, Manifest, StoredTensor

_PREFIX = "step_"


class Stateful(Protocol):
    """Anything with a state: modules and optimizers of torch, and one's own."""

    def state_dict(self) -> dict[str, Any]:
        """Return nested dicts of tensors, DTensors and JSON values; tensors share memory with the owner."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take the same nested dicts back, filled."""
        ...


def save(path: str | Path, parts: Mapping[str, Stateful]) -> None:
    """Write the state of `parts` to a new checkpoint (collective over the default process group, if there is one).

    Until the last moment, when the manifest appears, the folder is no checkpoint; if it was one before, it stays that.

    Args:
        path: folder to write, created if missing.
        parts: name -> object with `state_dict()`, whose leaves are tensors, DTensors and JSON values.

    Raises:
        CheckpointError: a process could not write; raised on all processes.
    """
    folder, rank = Path(path), _rank()
    tensors, values = _flatten(parts)
    own = _choose_own({name: piece_of(tensor) for name, tensor in tensors.items()}, rank)
    file = f"{rank:05d}-{uuid.uuid4().hex[:12]}.safetensors"
    result: Any
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stored = storage.write_pieces(folder, file, own) if own else {}
        size = (folder / file).stat().st_size if own else 0
        result = {n: (_dtype_name(p.tensor), p.shape, stored[n]) for n, p in own.items()}, file, size
    except (CheckpointError, OSError) as error:
        result = f"[rank {rank}] {error}"
    gathered = _gather(result)
    failures = [r for r in gathered if isinstance(r, str)]
    if not failures and rank == 0:
        try:
            _commit(folder, gathered, values)
        except OSError as error:
            failures = [f"{folder / manifests.NAME} cannot be written: {error}; free or repair the disk"]
    failures = _gather(failures)[0]
    if failures:
        (folder / file).unlink(missing_ok=True)
        raise CheckpointError("; ".join(failures))


def load(path: str | Path, parts: Mapping[str, Stateful]) -> None:
    """Read a checkpoint into `parts`, at whatever layout these have now (each process reads what it holds).

    Every byte that is used is verified against its checksum. Tensors are filled in place and then handed, with the
    values, to `load_state_dict`.

    Raises:
        CheckpointError: no complete checkpoint there, a damaged one, or one that lacks or mismatches a tensor. The
            parts may be partly filled then, and must be loaded from elsewhere.
    """
    folder = Path(path)
    manifest = manifests.read(folder)
    for part, stateful in parts.items():
        state = stateful.state_dict()
        for name, owner, key in _walk(state, part):
            leaf = owner[key]
            if isinstance(leaf, torch.Tensor):
                _read_tensor(folder, manifest, name, leaf)
            elif name in manifest.values:
                owner[key] = manifest.values[name]
            else:
                raise CheckpointError(f"{folder} has no value {name}; it is of another kind of run; use its own config")
        stateful.load_state_dict(state)


def read_values(path: str | Path) -> dict[str, Any]:
    """Return the values (no tensors) of a checkpoint by name, after checking its manifest and file sizes.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    return manifests.read(Path(path)).values


def step_folder(folder: str | Path, step: int) -> Path:
    """Return where the checkpoint of a step belongs."""
    return Path(folder) / f"{_PREFIX}{step:08d}"


def find_complete(folder: str | Path) -> list[Path]:
    """Return the checkpoints of a run, newest first: the step folders that have a manifest, damaged or not."""
    manifest_paths = Path(folder).glob(f"{_PREFIX}*/{manifests.NAME}")
    return sorted((path.parent for path in manifest_paths), reverse=True)


def retain(folder: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what unfinished saves left behind. Call on one process.

    A manifest goes first, so that a half-deleted checkpoint is never taken for a complete one.
    """
    complete = find_complete(folder)
    for path in Path(folder).glob(f"{_PREFIX}*"):
        if path not in complete[:keep] and path.is_dir():
            (path / manifests.NAME).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def _choose_own(pieces: dict[str, Piece], rank: int) -> dict[str, Piece]:
    """Return what this process writes: of several that hold the same box of a tensor, the first (collective)."""
    held = _gather({name: piece.box for name, piece in pieces.items()})
    writers: dict[tuple[str, Box], int] = {}
    for other, boxes in enumerate(held):
        for name, box in boxes.items():
            writers.setdefault((name, box), other)
    wanted = {name: p for name, p in pieces.items() if p.box.numel or 0 in p.shape}
    return {name: p for name, p in wanted.items() if writers[name, p.box] == rank}


def _commit(folder: Path, gathered: list[Any], values: dict[str, Any]) -> None:
    tensors: dict[str, StoredTensor] = {}
    files = {}
    for boxes, file, size in gathered:
        if boxes:
            files[file] = size
        for name, (dtype, shape, stored) in boxes.items():
            others = tensors[name].boxes if name in tensors else ()
            tensors[name] = StoredTensor(dtype, shape, (*others, stored))
    manifests.write(folder, Manifest(dict(sorted(tensors.items())), values, files))
    storage.remove_others(folder, {manifests.NAME, *files})


def _read_tensor(folder: Path, manifest: Manifest, name: str, tensor: torch.Tensor) -> None:
    stored, target = manifest.tensors.get(name), piece_of(tensor)
    if stored is None:
        raise CheckpointError(f"{folder} has no tensor {name}; it is of another model; resume with its own config")
    if stored.shape != target.shape or DTYPES[stored.dtype] != tensor.dtype:
        raise CheckpointError(
            f"{folder} has {name} as {stored.dtype} {list(stored.shape)}, this run as {_dtype_name(tensor)} "
            f"{list(target.shape)}; they must agree; resume with the config of the checkpoint"
        )
    for box in stored.boxes:
        storage.read_into(folder, name, stored.dtype, box, target)


def _flatten(parts: Mapping[str, Stateful]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors, values = {}, {}
    for part, stateful in parts.items():
        for name, owner, key in _walk(stateful.state_dict(), part):
            (tensors if isinstance(owner[key], torch.Tensor) else values)[name] = owner[key]
    return tensors, values


def _walk(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield (dotted name, dict, key) of every tensor in nested dicts, and of every value that holds none."""
    for key, value in node.items():
        name = f"{prefix}.{key}"
        if isinstance(value, dict) and _holds_tensor(value):
            yield from _walk(value, name)
        else:
            yield name, node, key


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_tensor(inner) for inner in value.values())
    return isinstance(value, torch.Tensor)


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gather(value: Any) -> list[Any]:
    """Return every process's value on every process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
