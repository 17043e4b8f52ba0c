"""The files of a torch.distributed.checkpoint (DCP), read as what a stranger wrote.

torch's own reader runs code that a checkpoint names, in `.metadata` as in its byte entries. Here `.metadata` is
unpickled to inert records, all that it says is held against the files before anything is read, and entries are read by
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

import re
import stat
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch

from shardwright.checkpoint.box import Box
from shardwright.checkpoint.errors import CheckpointError
from shardwright.checkpoint.interop import safe_pickle
from shardwright.checkpoint.interop.safe_pickle import Record, Slice
from shardwright.checkpoint.manifest import DTYPES, TensorInfo

KeyPath = tuple[str | int, ...]  # keys that lead to an entry in the nested dicts that were saved
_MAX_METADATA_BYTES = 4 * 2**30
_MAX_DIMS = 16
_MAX_NUMEL = 2**60


class _Metadata(Record):
    pass


class _TensorMetadata(Record):
    pass


class _BytesMetadata(Record):
    pass


class _Size(Record):
    pass


_METADATA, _FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_ALLOWED: dict[tuple[str, str], Any] = {
    (_METADATA, "Metadata"): _Metadata,
    (_METADATA, "TensorStorageMetadata"): _TensorMetadata,
    (_METADATA, "TensorProperties"): Record,
    (_METADATA, "BytesStorageMetadata"): _BytesMetadata,
    (_METADATA, "ChunkStorageMetadata"): Record,
    (_METADATA, "MetadataIndex"): Record,
    (_METADATA, "StorageMeta"): Record,
    (_METADATA, "_MEM_FORMAT_ENCODING"): Record,
    (_FILESYSTEM, "_StorageInfo"): Record,
    ("torch", "Size"): _Size,
    ("torch.serialization", "_get_layout"): Record,
    ("pathlib", "PosixPath"): Record,
    ("pathlib", "WindowsPath"): Record,
    ("pathlib._local", "PosixPath"): Record,
    ("pathlib._local", "WindowsPath"): Record,
    **{("torch", name): dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
}


@dataclass(frozen=True)
class Entry:
    """One thing that `torch.save` wrote: a box of a tensor, or a value if there is no box."""

    key: str
    file: str
    start: int
    length: int
    box: Box | None = None


@dataclass(frozen=True)
class Index:
    """What a DCP checkpoint holds; all of it was checked.

    Attributes:
        tensors: by key.
        paths: key -> keys that lead there in the dicts that were saved.
        entries: in the order in which they lie in their files; the boxes of a tensor cover it without overlap.
    """

    tensors: dict[str, TensorInfo]
    paths: dict[str, KeyPath]
    entries: list[Entry]


def read_index(folder: Path, skip: Collection[str]) -> Index:
    """Read `.metadata`, and check all that it says: names, shapes, and where each entry lies in which file.

    Args:
        folder: of the checkpoint.
        skip: patterns (fnmatch) of keys that are left out, unchecked.

    Raises:
        CheckpointError: there is none, or it cannot be trusted.
    """
    path = folder / ".metadata"
    try:
        if not path.is_file() or path.stat().st_size > _MAX_METADATA_BYTES:
            raise CheckpointError(f"{path} is no file of up to {_MAX_METADATA_BYTES} bytes; use another checkpoint")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder} is no DCP checkpoint: {error}; give a folder that holds .metadata") from error
    metadata = safe_pickle.load(data, _ALLOWED, str(path))
    try:
        index = _decode(metadata, skip)
        _check_files(folder, index.entries)
    except CheckpointError:
        raise
    except Exception as error:  # a record lacks what it should have, or has it in another form
        reason = f"{'' if type(error) is ValueError else type(error).__name__} {error}".strip()[:300]
        raise CheckpointError(f"{path} is malformed: {reason}; use another checkpoint") from error
    return index


def _decode(metadata: Any, skip: Collection[str]) -> Index:
    _require(type(metadata) is _Metadata, "it holds no metadata")
    state = metadata.state
    given_paths = state.get("planner_data") or {}
    stored = {_place(record.state): info.state for record, info in state["storage_data"].items()}
    tensors, paths, entries = {}, {}, []
    for key, record in state["state_dict_metadata"].items():
        _require(type(key) is str and key.isprintable(), f"{key!r} is no name")
        if any(fnmatchcase(key, pattern) for pattern in skip):
            continue
        paths[key] = tuple(given_paths.get(key, (key,)))
        _require(dotted(paths[key]) == key, f"the path of {key} leads elsewhere")
        if type(record) is _BytesMetadata:
            entries.append(_entry(key, None, stored))
        else:
            _require(type(record) is _TensorMetadata, f"{key} is of no known kind")
            tensors[key], boxes = _decode_tensor(key, record.state)
            for box in boxes:
                entries.append(_entry(key, box, stored))
                large = box.numel * tensors[key].dtype.itemsize > entries[-1].length
                _require(not large, f"a chunk of {key} is larger than its bytes")
    return Index(tensors, paths, sorted(entries, key=lambda entry: (entry.file, entry.start)))


def _decode_tensor(key: str, state: Any) -> tuple[TensorInfo, list[Box]]:
    dtype, shape = state["properties"].state[0], _ints(state["size"])
    _require(isinstance(dtype, torch.dtype), f"{key} has no dtype")
    if dtype not in DTYPES.values():
        raise CheckpointError(f"{key} is of dtype {dtype}, which is not stored; use skip to leave it out")
    _require(len(shape) <= _MAX_DIMS, f"{key} has too many dims")
    boxes = [Box(_ints(chunk.state["offsets"]), _ints(chunk.state["sizes"])) for chunk in state["chunks"]]
    whole = Box((0,) * len(shape), shape)
    for box in boxes:
        inside = len(box.offsets) == len(box.sizes) == len(shape) and all(
            offset + size <= extent for offset, size, extent in zip(box.offsets, box.sizes, shape, strict=True)
        )
        _require(inside, f"a chunk of {key} reaches out of it")
    _require(len(boxes) > 0, f"{key} has no chunks")
    _require(sum(box.numel for box in boxes) == whole.numel < _MAX_NUMEL, f"the chunks of {key} do not make it up")
    _require(_are_disjoint(boxes), f"chunks of {key} overlap")
    return TensorInfo(dtype, shape), boxes


def _entry(key: str, box: Box | None, stored: Mapping[Any, Any]) -> Entry:
    info = stored[key, None if box is None else box.offsets]
    start, length = _ints((info["offset"], info["length"]))
    if info.get("transform_descriptors"):
        raise CheckpointError(f"{key} is compressed by an extension of DCP; save the checkpoint without extensions")
    _require(re.fullmatch(r"\w[\w.-]*", info["relative_path"]) is not None, f"{key} lies outside of the folder")
    return Entry(key, info["relative_path"], start, length, box)


def _place(state: Any) -> tuple[str, tuple[int, ...] | None]:
    """Return the key and offset that a MetadataIndex stands for."""
    _require(type(state["fqn"]) is str, "an entry has no name")
    offset = state.get("offset")
    return state["fqn"], None if offset is None else _ints(offset)


def _ints(record: Any) -> tuple[int, ...]:
    """Return what was a `torch.Size`, or a tuple."""
    (numbers,) = record.args if type(record) is _Size else (record,)
    _require(
        all(type(number) is int and 0 <= number < _MAX_NUMEL for number in numbers),
        "a size or offset is negative, too large or no number",
    )
    return tuple(numbers)


def _are_disjoint(boxes: list[Box]) -> bool:
    """Whether no two boxes have an element in common: sweep along the dim in which they are cut into most parts."""
    boxes = [box for box in boxes if box.numel]
    if len(boxes) < 2:
        return True
    dim = max(range(len(boxes[0].sizes)), key=lambda dim: len({box.offsets[dim] for box in boxes}))
    active: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offsets[dim]):
        active = [other for other in active if other.offsets[dim] + other.sizes[dim] > box.offsets[dim]]
        if any(other.intersect(box) for other in active):
            return False
        active.append(box)
    return True


def _check_files(folder: Path, entries: list[Entry]) -> None:
    """Hold entries against the files: each within its file, none over another, so that none is read twice."""
    sizes: dict[str, int] = {}
    ends: dict[str, int] = defaultdict(int)
    for entry in entries:
        path = folder / entry.file
        if entry.file not in sizes:
            try:
                info = path.stat()
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error}; use another checkpoint") from error
            _require(stat.S_ISREG(info.st_mode), f"{entry.file} is no file")
            sizes[entry.file] = info.st_size
        if entry.start + entry.length > sizes[entry.file]:
            raise CheckpointError(
                f"{path} has {sizes[entry.file]} bytes, {entry.key} ends at {entry.start + entry.length}; "
                "the file is damaged; use another checkpoint"
            )
        _require(ends[entry.file] <= entry.start, f"{entry.key} lies over another entry of {entry.file}")
        ends[entry.file] = entry.start + entry.length


def read_entries(folder: Path, index: Index) -> Iterator[tuple[Entry, Any]]:
    """Yield every entry and what it holds: a box of a tensor, on the CPU, or a value.

    Raises:
        CheckpointError: an entry cannot be read, or is not what the index says.
    """
    for name, entries in groupby(index.entries, key=lambda entry: entry.file):
        with _open(folder / name) as file:
            for entry in entries:
                source = f"{folder / name}: {entry.key}"
                value = safe_pickle.load_torch(Slice(file, entry.start, entry.length), entry.length, source)
                if entry.box:
                    _check_tensor(value, index.tensors[entry.key].dtype, entry.box, source)
                yield entry, value


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; use another checkpoint") from error


def _check_tensor(tensor: Any, dtype: torch.dtype, box: Box, source: str) -> None:
    plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.dtype != dtype or tuple(tensor.shape) != box.sizes:
        raise CheckpointError(
            f"{source} is not the {dtype} {list(box.sizes)} that .metadata says; use another checkpoint"
        )


def dotted(path: KeyPath) -> str:
    """Return the keys of a path joined with dots, as DCP does."""
    _require(all(type(part) in (str, int) for part in path), "a path has a key that is no text")
    return ".".join(str(part) for part in path)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
