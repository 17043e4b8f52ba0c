"""Data files: safetensors files as a stream of chunks that are filled from tensors, and read back block by block."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shardwright.checkpoint.box import Box, decompose
from shardwright.checkpoint.errors import DamagedError
from shardwright.checkpoint.manifest import BLOCK_BYTES, DTYPES, Manifest, TensorInfo, digest_blocks, num_blocks
from shardwright.checkpoint.storage import CHUNK_BYTES, Storage

_ALIGNMENT = 4096  # where the data of a file begins: a page
_SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
assert _SAFETENSORS_NAMES.keys() == set(DTYPES.values())


@dataclass(frozen=True)
class Entry:
    """A box of a tensor, as a data file holds it."""

    name: str
    info: TensorInfo
    box: Box

    @property
    def key(self) -> str:
        """Its name in the file: that of the tensor where it is whole, else with the ranges that it covers."""
        if self.box.sizes == self.info.shape:
            return self.name
        ranges = (f"{first}:{first + size}" for first, size in zip(self.box.offsets, self.box.sizes, strict=True))
        return f"{self.name}[{','.join(ranges)}]"

    @property
    def num_bytes(self) -> int:
        """Bytes of the box."""
        return self.box.numel * self.info.dtype.itemsize


class FileLayout:
    """Where every entry lies in a safetensors file, known before there is any data.

    Args:
        entries: what the file holds; widest dtypes come first, so that all are aligned.

    Attributes:
        entries: in the order in which they lie in the file.
        starts: first byte of each.
        size: of the file, in bytes.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = sorted(entries, key=lambda entry: -entry.info.dtype.itemsize)
        ends = np.cumsum([0, *(entry.num_bytes for entry in self.entries)]).tolist()
        header = {
            entry.key: {
                "dtype": _SAFETENSORS_NAMES[entry.info.dtype],
                "shape": list(entry.box.sizes),
                "data_offsets": [first, last],
            }
            for entry, first, last in zip(self.entries, ends[:-1], ends[1:], strict=True)
        }
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self._head = np.frombuffer(len(text).to_bytes(8, "little") + text, dtype=np.uint8)
        self.starts = [len(self._head) + end for end in ends[:-1]]
        self.size = len(self._head) + ends[-1]
        self._bounds = np.array([*self.starts, self.size])

    @property
    def num_chunks(self) -> int:
        """How many chunks of `CHUNK_BYTES` the file has; the last may be shorter."""
        return -(-self.size // CHUNK_BYTES)

    def fill(self, index: int, chunk: torch.Tensor, tensors: Sequence[torch.Tensor]) -> int:
        """Copy a chunk of the file to the begin of a uint8 buffer, without waiting for copies from a device.

        Args:
            index: of the chunk.
            chunk: [CHUNK_BYTES] uint8.
            tensors: the data of `entries`, in that order.

        Returns:
            Bytes that were filled.
        """
        first = index * CHUNK_BYTES
        last = min(first + CHUNK_BYTES, self.size)
        if first < len(self._head):
            head = torch.from_numpy(self._head[first:last].copy())
            chunk[: len(head)].copy_(head)
        row = max(int(np.searchsorted(self._bounds, first, side="right")) - 1, 0)
        while row < len(tensors) and self.starts[row] < last:
            start, end = self.starts[row], int(self._bounds[row + 1])
            a, b = max(start, first), min(end, last)
            if a < b:
                data = tensors[row].contiguous().view(-1).view(torch.uint8)
                chunk[a - first : b - first].copy_(data[a - start : b - start], non_blocking=True)
            row += 1
        return last - first


def make_buffer(size_bytes: int, *, pinned: bool) -> torch.Tensor:
    """Return page-aligned host memory, uint8; page-locked for copies from and to a GPU."""
    if pinned:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    return torch.from_numpy(np.frombuffer(mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE), dtype=np.uint8))


def view(buffer: torch.Tensor, num_bytes: int) -> memoryview:
    """Return the first bytes of a buffer, without a copy."""
    return memoryview(buffer.numpy())[:num_bytes]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Run:
    """Some consecutive elements of a stored box.

    Attributes:
        row: of the box in the manifest.
        info: of its tensor.
        first, end: elements [first, end) of the box in row-major order.
        start: first byte in the file.
    """

    row: int
    info: TensorInfo
    first: int
    end: int
    start: int

    @property
    def stop(self) -> int:
        """Byte after the last one in the file."""
        return self.start + (self.end - self.first) * self.info.dtype.itemsize


@dataclass(frozen=True)
class Span:
    """Bytes [start, stop) of a file that are read and verified at once: whole blocks."""

    file: str
    start: int
    stop: int
    runs: tuple[Run, ...]


def plan_runs(manifest: Manifest, row: int, info: TensorInfo, commons: Sequence[Box], max_bytes: int) -> Iterator[Run]:
    """Yield the runs of a stored box that hold some boxes within it: from first element to last, in order.

    Each touches at most `max_bytes` of whole blocks.
    """
    box, itemsize = manifest.boxes.box(row, len(info.shape)), info.dtype.itemsize
    strides = [math.prod(box.sizes[dim + 1 :]) for dim in range(len(box.sizes))]
    local = [common.within(box) for common in commons]
    first = min(sum(part.start * stride for part, stride in zip(parts, strides, strict=True)) for parts in local)
    end = max(sum((part.stop - 1) * stride for part, stride in zip(parts, strides, strict=True)) for parts in local) + 1
    base = int(manifest.boxes.start[row])
    while first < end:
        start = base + first * itemsize
        room = start // BLOCK_BYTES * BLOCK_BYTES + max_bytes - start
        last = min(first + room // itemsize, end)
        yield Run(row, info, first, last, start)
        first = last


def plan_spans(manifest: Manifest, runs: Iterable[Run], max_bytes: int) -> list[Span]:
    """Join runs that lie side by side in a file to spans of at most `max_bytes`."""
    spans: list[Span] = []
    for run in sorted(runs, key=lambda run: (manifest.boxes.file[run.row], run.start, run.stop)):
        file = manifest.file_of(run.row)
        start = run.start // BLOCK_BYTES * BLOCK_BYTES
        stop = min(num_blocks(run.stop) * BLOCK_BYTES, manifest.files[file])
        if spans:
            last = spans[-1]
            stop = max(stop, last.stop) if last.file == file else stop
            if last.file == file and start <= last.stop and stop - last.start <= max_bytes:
                spans[-1] = Span(file, last.start, stop, (*last.runs, run))
                continue
        spans.append(Span(file, start, stop, (run,)))
    return spans


def read_span(storage: Storage, manifest: Manifest, span: Span, *into: memoryview) -> None:
    """Fill buffers with a span, one after the other, and verify every block.

    Raises:
        DamagedError: the bytes are missing, cannot be read, or are not what was written.
    """
    storage.read(span.file, span.start, *into)
    first = span.start // BLOCK_BYTES
    written = manifest.digests_of(span.file)[first : num_blocks(span.stop)].tolist()
    for block, (digest, expected) in enumerate(zip(digest_blocks(*into), written, strict=True), first):
        if digest != expected:
            raise DamagedError(
                f"{storage.path}/{span.file} is damaged: its bytes from {block * BLOCK_BYTES} on do not match their "
                "checksum; use another checkpoint"
            )


def boxes_of(manifest: Manifest, run: Run) -> Iterator[Box]:
    """Yield the boxes of the global tensor that make up a run, in the order of its elements."""
    stored = manifest.boxes.box(run.row, len(run.info.shape))
    for part in decompose(stored.sizes, run.first, run.end):
        yield Box(tuple(a + b for a, b in zip(stored.offsets, part.offsets, strict=True)), part.sizes)


def unpack(manifest: Manifest, run: Run, span: Span, buffer: torch.Tensor) -> Iterator[tuple[Box, torch.Tensor]]:
    """Yield the boxes of a run with their data in the buffer of its span."""
    content = buffer[run.start - span.start : run.stop - span.start]
    if run.start % run.info.dtype.itemsize:
        content = content.clone()  # torch does not view unaligned bytes
    elements, done = content.view(run.info.dtype), 0
    for box in boxes_of(manifest, run):
        yield box, elements[done : done + box.numel].view(box.sizes)
        done += box.numel


def copy_common(box: Box, data: torch.Tensor, target_box: Box, target: torch.Tensor) -> int:
    """Copy what a box and a target box have in common, with a cast if need be; return its bytes in the target."""
    common = box.intersect(target_box)
    if common is None:
        return 0
    part = target[common.within(target_box)]
    part.copy_(data[common.within(box)], non_blocking=True)
    return part.numel() * part.element_size()
