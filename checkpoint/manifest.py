"""The manifest: one JSON file that says where every box of every tensor lies. Its presence means: complete."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from shardwright.checkpoint.box import Box
from shardwright.checkpoint.errors import CheckpointError, DamagedError

NAME = "manifest.json"
FORMAT = 1
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
_FILE_NAME = re.compile(r"[A-Za-z0-9_-]+\.safetensors")


@checked_dataclass(frozen=True)
class StoredBox:
    """A box of a tensor: `bytes` bytes from `start` of `file`, row-major, little-endian, with their XXH3-64."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    bytes: int
    xxh3: str

    @property
    def box(self) -> Box:
        """Where it lies in the tensor."""
        return Box(self.offsets, self.sizes)


@checked_dataclass(frozen=True)
class StoredTensor:
    """A tensor: its global shape, and boxes that cover it without overlap."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[StoredBox, ...]


@dataclass(frozen=True)
class Manifest:
    """All tensors and values of a checkpoint by name, and the size of every file."""

    tensors: dict[str, StoredTensor]
    values: dict[str, Any]
    files: dict[str, int] = field(default_factory=dict)


_ADAPTER = TypeAdapter(Manifest)


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest so that it appears whole or not at all, and survives a crash from then on."""
    body = {"format": FORMAT, **_ADAPTER.dump_python(manifest, mode="json")}
    document = {**body, "xxh3": _digest(body)}
    temporary = folder / f"{NAME}.part"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / NAME)
    sync_folder(folder)
    sync_folder(folder.parent)


def read(folder: Path) -> Manifest:
    """Read a manifest and check it: form, its own checksum, names and sizes of the files.

    Raises:
        CheckpointError: there is none, or it cannot be trusted; the text names the file.
    """
    path = folder / NAME
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is no complete checkpoint: {NAME} is missing; give a folder that holds one"
        ) from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path} is damaged: {error}; use another checkpoint") from error
    if not isinstance(document, dict) or document.pop("xxh3", None) != _digest(document):
        raise DamagedError(f"{path} is damaged: its checksum does not match its content; use another checkpoint")
    if document.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} is not of format {FORMAT}; use a version of shardwright that reads it")
    try:
        manifest = _ADAPTER.validate_python(document)
    except ValidationError as error:
        raise DamagedError(f"{path} is malformed: {error}; use another checkpoint") from error
    _check(folder, manifest)
    return manifest


def sync_folder(folder: Path) -> None:
    """Make names created in a folder survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(body: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(body, sort_keys=True).encode())


def _check(folder: Path, manifest: Manifest) -> None:
    for name, size in manifest.files.items():
        path = folder / name
        if not _FILE_NAME.fullmatch(name):
            raise DamagedError(f"{folder / NAME} names a file {name!r} outside the folder; do not use it")
        if not path.is_file():
            raise DamagedError(f"{path} is missing; the checkpoint is damaged; use another one")
        if path.stat().st_size != size:
            raise DamagedError(
                f"{path} has {path.stat().st_size} bytes, its manifest says {size}; it is damaged; use another one"
            )
    for name, tensor in manifest.tensors.items():
        covered = sum(stored.box.numel for stored in tensor.boxes)
        if tensor.dtype not in DTYPES or covered != Box((), tensor.shape).numel:
            raise DamagedError(f"{folder / NAME}: the boxes of {name} do not make up its shape {tensor.shape}")
        width = DTYPES[tensor.dtype].itemsize
        for stored in tensor.boxes:
            fits = stored.start >= 0 and stored.start + stored.bytes <= manifest.files.get(stored.file, -1)
            if not fits or stored.bytes != width * stored.box.numel or len(stored.offsets) != len(tensor.shape):
                raise DamagedError(f"{folder / NAME}: a box of {name} does not fit {stored.file}; use another one")
