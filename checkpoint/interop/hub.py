"""Model folders as the Hugging Face hub has them: safetensors in shards with an index, and JSON files. Knows no model.

Both ways stream: writing holds the tensors of one shard at a time, reading one tensor.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from shardwright.checkpoint.errors import CheckpointError, DamagedError

MAX_SHARD_BYTES = 5_000_000_000  # what the hub's own libraries write
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_FILE_NAME = re.compile(r"[A-Za-z0-9_.-]+\.safetensors")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class HubTensor:
    """What a tensor of the hub holds of the plain model.

    Attributes:
        parts: plain parameters, joined along their first dim if there are several.
        transposed: the hub has the (joined) matrix transposed.
        copy: the parts are those of another tensor too (tied embeddings): not written, and in a folder that has it
            nevertheless, it must be the same.
    """

    parts: tuple[str, ...]
    transposed: bool = False
    copy: bool = False

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Return the shape on the hub, given those of the plain parameters."""
        first, *rest = shapes[self.parts[0]]
        joined = (sum(shapes[part][0] for part in self.parts), *rest) if len(self.parts) > 1 else (first, *rest)
        return joined[::-1] if self.transposed else joined

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Make the hub's tensor of the plain ones."""
        joined = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        return (joined.T if self.transposed else joined).contiguous()

    def split(self, tensor: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """Make the plain tensors of the hub's, by name."""
        if self.transposed:
            tensor = tensor.T
        pieces = (tensor,) if len(self.parts) == 1 else tensor.split([shapes[part][0] for part in self.parts])
        return {part: piece.contiguous() for part, piece in zip(self.parts, pieces, strict=True)}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not in memory: its dtype and shape, and what loads it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(
    target: str | Path,
    tensors: Mapping[str, LazyTensor],
    files: Mapping[str, dict[str, Any] | Path],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that appears complete or not at all.

    Args:
        target: the folder, which must not exist.
        tensors: by name; loaded shard by shard, and dropped again.
        files: name -> content of a JSON file, or the path of a file to copy.
        max_shard_bytes: a file has no more tensor data, unless one tensor alone has.

    Raises:
        CheckpointError: the target exists, or cannot be written; nothing is left behind then.
    """
    target = Path(target)
    if target.exists():
        raise CheckpointError(f"{target} exists; a folder for the hub is written anew; choose another, or remove it")
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:12]}.part")
    try:
        temporary.mkdir(parents=True)
        _write_tensors(temporary, tensors, max_shard_bytes)
        for name, content in files.items():
            _write_file(temporary / name, content)
        _sync(temporary)
        temporary.rename(target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target} cannot be written: {error}; free or repair the disk") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a folder of the hub has one; give another folder") from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read: {error}; get the folder again") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{path} holds no JSON object; get the folder again")
    return content


def read_tensors(folder: str | Path) -> dict[str, LazyTensor]:
    """Return the tensors of a folder by name, each loaded when asked for.

    Files are checked here: an index may name only files of this folder, each must be there in its full length, and
    hold what the index says.

    Raises:
        CheckpointError: there are no safetensors, or what is there is damaged or cannot be trusted.
    """
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        return _list_tensors(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor {INDEX}; only safetensors are read; "
            "give a folder with these (save_pretrained of transformers writes them)"
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise DamagedError(f"{folder / INDEX} has no weight_map of names to files; get the folder again")
    found: dict[str, LazyTensor] = {}
    for file in sorted(set(weight_map.values())):
        if not _FILE_NAME.fullmatch(file):
            raise DamagedError(f"{folder / INDEX} names a file {file!r} outside the folder; do not use it")
        held = _list_tensors(folder / file)
        wanted = [name for name, other in weight_map.items() if other == file]
        missing = [name for name in wanted if name not in held]
        if missing:
            raise DamagedError(f"{folder / file} lacks {missing[0]}, which {INDEX} places there; get the folder again")
        found |= {name: held[name] for name in wanted}
    return found


def _write_tensors(folder: Path, tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory

    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name].load() for name in names}, folder / file, metadata={"format": "pt"})
        _sync(folder / file)
    if plan.is_sharded:
        _write_file(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def _write_file(path: Path, content: dict[str, Any] | Path) -> None:
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    _sync(path)


def _list_tensors(path: Path) -> dict[str, LazyTensor]:
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                view = file.get_slice(name)
                found[name] = view.get_dtype(), tuple(view.get_shape())
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing; get the folder again") from None
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{path} is damaged: {error}; get the folder again") from error
    for name, (dtype, _) in found.items():
        if dtype not in _DTYPES:
            raise CheckpointError(f"{path} has {name} as {dtype}, which is not read; use {', '.join(_DTYPES)}")
    return {
        name: LazyTensor(_DTYPES[dtype], shape, partial(_load, path, name)) for name, (dtype, shape) in found.items()
    }


def _load(path: Path, name: str) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{path}: {name} cannot be read: {error}; get the folder again") from error


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
