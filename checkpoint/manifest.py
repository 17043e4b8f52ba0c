"""The manifest: one file that says where every box of every tensor lies. Its presence means: complete.

It is a safetensors file itself. Names, values and files are JSON in its header; boxes and checksums, of which a large
run has millions, are columns of numbers that are read without being parsed. docs/checkpoint.md specifies it.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import torch
import xxhash
from pydantic import Field, TypeAdapter, ValidationError

from shardwright.checkpoint.box import Box
from shardwright.checkpoint.errors import CheckpointError, DamagedError

NAME = "manifest.safetensors"
FORMAT = 2
BLOCK_BYTES = 2**20  # every data file has one checksum per block of this size; the last block may be shorter
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
_FILE_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}\.safetensors")
_MAX_NUMEL = 2**60  # and of bytes: sums stay within int64
_MAX_DIMS = 16
_ROWS = 2**15  # of a column that are worked on at once, within the processor's cache
_COLUMNS = {  # name: (safetensors dtype, numpy dtype, dims)
    "box.tensor": ("U32", "<u4", 1),
    "box.file": ("U32", "<u4", 1),
    "box.start": ("I64", "<i8", 1),
    "box.offsets": ("I64", "<i8", 2),
    "box.sizes": ("I64", "<i8", 2),
    "block.xxh3": ("U64", "<u8", 1),
    "xxh3": ("U64", "<u8", 1),
}
_Size = Annotated[int, Field(ge=0, lt=_MAX_NUMEL)]
_TENSORS = TypeAdapter(list[tuple[str, str, Annotated[list[_Size], Field(max_length=_MAX_DIMS)]]])
_FILES = TypeAdapter(list[tuple[Annotated[str, Field(pattern=f"^{_FILE_NAME.pattern}$")], _Size]])


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor is, wherever its boxes lie: its dtype and global shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Boxes:
    """N stored boxes as columns, sorted by tensor.

    Attributes:
        tensor: [N] index of the tensor in the manifest's order.
        file: [N] index of the file.
        start: [N] first byte in the file; the box is row-major and contiguous from there.
        offsets: [N, D] first index along each dim, 0 for the dims that a tensor lacks.
        sizes: [N, D] extent along each dim, 1 for the dims that a tensor lacks.
    """

    tensor: np.ndarray
    file: np.ndarray
    start: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.tensor)

    def box(self, row: int, num_dims: int) -> Box:
        """Return a row as a box."""
        return Box(tuple(self.offsets[row, :num_dims].tolist()), tuple(self.sizes[row, :num_dims].tolist()))


@dataclass(frozen=True, eq=False)
class Manifest:
    """A checkpoint without its data.

    Attributes:
        tensors: by name, in the order that `boxes.tensor` counts.
        values: JSON values by name.
        files: name -> bytes, in the order that `boxes.file` counts.
        boxes: of all tensors; those of a tensor cover it without overlap.
        digests: [sum of blocks] uint64, XXH3-64 of every block of every file, in order.
    """

    tensors: dict[str, TensorInfo]
    values: dict[str, Any]
    files: dict[str, int]
    boxes: Boxes
    digests: np.ndarray

    @cached_property
    def names(self) -> list[str]:
        """The tensors' names in order."""
        return list(self.tensors)

    def rows(self, name: str) -> range:
        """Return which rows of `boxes` are those of a tensor."""
        return self._rows[name]

    def file_of(self, row: int) -> str:
        """Return the name of the file of a box."""
        return self._file_names[self.boxes.file[row]]

    def digests_of(self, file: str) -> np.ndarray:
        """Return the checksums of a file's blocks."""
        first = self._first_blocks[file]
        return self.digests[first : first + num_blocks(self.files[file])]

    @cached_property
    def _file_names(self) -> list[str]:
        return list(self.files)

    @cached_property
    def _first_blocks(self) -> dict[str, int]:
        counts = [0, *(num_blocks(size) for size in self.files.values())]
        return dict(zip(self.files, np.cumsum(counts).tolist(), strict=False))

    @cached_property
    def _rows(self) -> dict[str, range]:
        bounds = np.searchsorted(self.boxes.tensor, np.arange(len(self.tensors) + 1)).tolist()
        return {name: range(*pair) for name, pair in zip(self.tensors, itertools.pairwise(bounds), strict=True)}


def num_blocks(size_bytes: int) -> int:
    """Return the number of checksums of a file."""
    return -(-size_bytes // BLOCK_BYTES)


def digest_blocks(*parts: memoryview) -> list[int]:
    """Return the XXH3-64 of each block of a file, or of a stretch that begins with a block and may lie in parts."""
    digests, digest, left = [], xxhash.xxh3_64(), BLOCK_BYTES
    for part in parts:
        while part:
            piece, part = part[:left], part[left:]
            digest.update(piece)
            left -= len(piece)
            if left == 0:
                digests.append(digest.intdigest())
                digest.reset()
                left = BLOCK_BYTES
    return digests if left == BLOCK_BYTES else [*digests, digest.intdigest()]


def encode(manifest: Manifest) -> bytes:
    """Return the file's bytes."""
    boxes = manifest.boxes
    columns = dict(
        zip(
            _COLUMNS,
            (boxes.tensor, boxes.file, boxes.start, boxes.offsets, boxes.sizes, manifest.digests, np.zeros(1)),
            strict=True,
        )
    )
    tensors = [[name, dtype_name(t.dtype), list(t.shape)] for name, t in manifest.tensors.items()]
    parts = {"tensors": tensors, "values": manifest.values, "files": list(manifest.files.items())}
    header: dict[str, Any] = {
        "__metadata__": {"format": str(FORMAT), **{key: json.dumps(part) for key, part in parts.items()}}
    }
    arrays, end = [], 0
    for name, (dtype, numpy_dtype, _) in _COLUMNS.items():
        array = np.ascontiguousarray(columns[name], dtype=numpy_dtype)
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        arrays.append(array)
        end += array.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    body = b"".join([len(head).to_bytes(8, "little"), head, *(array.data for array in arrays[:-1])])
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


def decode(data: bytes, path: str) -> Manifest:
    """Check the bytes of a manifest, and return it; its columns share their memory.

    Args:
        data: the whole file.
        path: of the file, for messages.

    Raises:
        DamagedError: the bytes are not what was written, or describe what cannot be.
        CheckpointError: written in another format.
    """

    def require(holds: bool | np.bool_, what: str) -> None:
        if not holds:
            raise DamagedError(f"{path} is damaged: {what}; use another checkpoint")

    require(len(data) >= 16, f"it has {len(data)} bytes")
    require(xxhash.xxh3_64_intdigest(memoryview(data)[:-8]).to_bytes(8, "little") == data[-8:], "its checksum differs")
    head_bytes = int.from_bytes(data[:8], "little")
    require(8 + head_bytes <= len(data), f"a header of {head_bytes} bytes does not fit")
    try:
        header = json.loads(data[8 : 8 + head_bytes])
        metadata = header["__metadata__"]
        if metadata["format"] != str(FORMAT):
            raise CheckpointError(
                f"{path} is of format {metadata['format']}, this version reads {FORMAT}; use the version that wrote it"
            )
        tensors = _TENSORS.validate_json(metadata["tensors"])
        files = _FILES.validate_json(metadata["files"])
        values = json.loads(metadata["values"])
        columns = {name: _column(header[name], data, 8 + head_bytes, *kind) for name, kind in _COLUMNS.items()}
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path} is malformed: {error}; use another checkpoint") from error
    require(isinstance(values, dict), "its values are no table")
    require(len({name for name, _, _ in tensors}) == len(tensors), "a tensor is there twice")
    require(len(dict(files)) == len(files), "a file is there twice")
    unknown = {dtype for _, dtype, _ in tensors} - DTYPES.keys()
    require(not unknown, f"unknown dtypes {unknown}")
    infos = {name: TensorInfo(DTYPES[dtype], tuple(shape)) for name, dtype, shape in tensors}
    *of_boxes, digests, _ = columns.values()
    _check(infos, dict(files), Boxes(*of_boxes), len(digests), require)
    return Manifest(infos, values, dict(files), Boxes(*of_boxes), digests)


def dtype_name(dtype: torch.dtype) -> str:
    """Return how a dtype is named in a manifest."""
    return str(dtype).removeprefix("torch.")


def _column(entry: Mapping[str, Any], data: bytes, body: int, dtype: str, numpy_dtype: str, dims: int) -> np.ndarray:
    shape, (first, last) = entry["shape"], entry["data_offsets"]
    width = np.dtype(numpy_dtype).itemsize
    sound = all(isinstance(n, int) and n >= 0 for n in (first, last, *shape)) and len(shape) == dims
    if not sound or entry["dtype"] != dtype or last - first != math.prod(shape) * width or body + last > len(data):
        raise ValueError(f"a column {entry} does not fit")
    return np.frombuffer(data, numpy_dtype, math.prod(shape), body + first).reshape(shape)


def _check(
    tensors: dict[str, TensorInfo],
    files: dict[str, int],
    boxes: Boxes,
    num_digests: int,
    require: Callable[[bool | np.bool_, str], None],
) -> None:
    """Hold the columns against each other, all rows at once."""
    count, dims = boxes.offsets.shape
    lengths = {len(boxes.tensor), len(boxes.file), len(boxes.start), len(boxes.sizes)}
    require(lengths == {count} and boxes.sizes.shape[1] == dims, "its columns differ in length")
    require(dims == max((len(t.shape) for t in tensors.values()), default=0), "its columns lack a dim")
    require(NAME not in files, "it is one of its files")
    require(num_digests == sum(num_blocks(size) for size in files.values()), "checksums and files do not agree")
    numels = (math.prod(max(size, 1) for size in t.shape) for t in tensors.values())
    require(all(numel < _MAX_NUMEL // 8 for numel in numels), "a tensor is too large")
    require(sum(files.values()) < _MAX_NUMEL, "its files are too large")
    shapes = np.ones((len(tensors), dims), dtype=np.int64)
    for row, info in enumerate(tensors.values()):
        shapes[row, : len(info.shape)] = info.shape
    if count:
        require(bool((boxes.tensor[1:] >= boxes.tensor[:-1]).all()), "its boxes are not in order")
        require(boxes.tensor.max() < len(tensors), "a box is of no tensor")
        require(boxes.file.max() < len(files), "a box is in no file")
        outer = shapes[boxes.tensor]
        inside = (
            (boxes.offsets >= 0) & (boxes.sizes >= 0) & (boxes.sizes <= outer) & (boxes.offsets <= outer - boxes.sizes)
        )
        require(bool(inside.all()), "a box reaches out of its tensor")
    covered = _sums(_measures(boxes.offsets, boxes.sizes), boxes.tensor, len(tensors))
    require(bool((covered == _measures(np.zeros_like(shapes), shapes)).all()), "boxes do not make up their tensor")
    widths = np.array([t.dtype.itemsize for t in tensors.values()] or [1], dtype=np.int64)
    lengths_bytes = boxes.sizes.prod(axis=1, dtype=np.int64) * widths[boxes.tensor]
    sizes = np.array(list(files.values()) or [0], dtype=np.int64)
    fits = (boxes.start >= 0) & (boxes.start <= sizes[boxes.file] - lengths_bytes)
    require(bool(fits.all()), "a box reaches out of its file")
    used = _sums(lengths_bytes, boxes.file, len(files))
    require(bool((used <= sizes[: len(files)]).all()), "boxes overlap in a file")


def _measures(offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return a number for every box: those of boxes that tile another one add up to its number, and else they do not.

    It is the sum of pseudo-random weights over the elements. A weight is a product over dims; so is the sum, therefore.
    """
    measures = np.ones(len(offsets), dtype=np.uint64)
    for row in range(0, len(offsets), _ROWS):
        rows = slice(row, row + _ROWS)
        for dim in range(offsets.shape[1]):
            start, size = offsets[rows, dim], sizes[rows, dim]
            measures[rows] *= _mix(start + size, dim) - _mix(start, dim)
    return measures


def _mix(index: np.ndarray, dim: int) -> np.ndarray:
    """Hash indices along a dim to 64 bits."""
    mixed = index.astype(np.uint64)
    mixed += np.uint64(0x9E3779B97F4A7C15 * (dim + 1) % 2**64)
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        mixed *= np.uint64(factor)
        mixed ^= mixed >> np.uint64(32)
    return mixed


def _sums(amounts: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    totals = np.zeros(count, dtype=amounts.dtype)
    np.add.at(totals, keys, amounts)
    return totals
