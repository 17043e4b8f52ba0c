"""A checkpoint as a file that one process opens, reads and writes: for tools and for other formats."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from shardwright.checkpoint import manifest as manifests
from shardwright.checkpoint.box import Box
from shardwright.checkpoint.errors import CheckpointError, DamagedError
from shardwright.checkpoint.files import (
    Entry,
    FileLayout,
    Run,
    copy_common,
    make_buffer,
    plan_runs,
    plan_spans,
    read_span,
    unpack,
    view,
)
from shardwright.checkpoint.manifest import Boxes, Manifest, TensorInfo, digest_blocks
from shardwright.checkpoint.storage import CHUNK_BYTES, Storage, open_storage

_FILE_BYTES = 512 * 2**20  # a writer holds at most so much, or one tensor


class Archive:
    """A complete checkpoint, opened for reading. Made by `open`.

    Attributes:
        storage: where it lies.
        manifest: what it holds.
    """

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self.storage, self.manifest = storage, manifest
        self._buffer: torch.Tensor | None = None

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Dtype and shape of every tensor by name."""
        return self.manifest.tensors

    @property
    def values(self) -> dict[str, Any]:
        """JSON values by name."""
        return self.manifest.values

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """Return a tensor, or a box of it, on the CPU; every block that is touched is verified.

        Raises:
            CheckpointError: there is no such tensor or box.
            DamagedError: the bytes are not what was written.
        """
        info = self._info(name)
        whole = Box((0,) * len(info.shape), info.shape)
        box = whole if box is None else box
        if whole.intersect(box) != box and box.numel:
            raise CheckpointError(f"{self.storage.path}: {box} is not within {name} {list(info.shape)}; ask for less")
        target = torch.empty(box.sizes, dtype=info.dtype)
        rows = ((row, self.manifest.boxes.box(row, len(info.shape)).intersect(box)) for row in self.manifest.rows(name))
        runs = [r for row, common in rows if common for r in plan_runs(self.manifest, row, info, [common], CHUNK_BYTES)]
        for _, part, data in self._unpack(runs):
            copy_common(part, data, box, target)
        return target

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Box, torch.Tensor]]:
        """Yield boxes that make up tensors, with their names and data, in the order in which the files hold them.

        Every block is read and verified once. Data is contiguous, and valid only until the next is asked for.

        Raises:
            CheckpointError: there is no such tensor.
            DamagedError: the bytes are not what was written.
        """
        runs: list[Run] = []
        for name in names:
            info = self._info(name)
            for row in self.manifest.rows(name):
                box = self.manifest.boxes.box(row, len(info.shape))
                runs += plan_runs(self.manifest, row, info, [box], CHUNK_BYTES) if box.numel else []
        for run, box, data in self._unpack(runs):
            yield self.manifest.names[self.manifest.boxes.tensor[run.row]], box, data

    def verify(self, files: Iterable[str] | None = None) -> Iterator[str]:
        """Read every byte of some files, or of all, and yield what is wrong, file by file."""
        for file in self.manifest.files if files is None else files:
            size, digests = self.manifest.files[file], self.manifest.digests_of(file)
            try:
                for start in range(0, size, CHUNK_BYTES):
                    data = view(self._chunk(), min(CHUNK_BYTES, size - start))
                    self.storage.read(file, start, data)
                    first = start // manifests.BLOCK_BYTES
                    written = digests[first : first + manifests.num_blocks(len(data))].tolist()
                    if digest_blocks(data) != written:
                        yield f"{self.storage.path}/{file}: bytes from {start} on do not match their checksums"
            except CheckpointError as error:
                yield str(error)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.storage.path} has no tensor {name}; ask for one that it lists")
        return self.tensors[name]

    def _unpack(self, runs: Iterable[Run]) -> Iterator[tuple[Run, Box, torch.Tensor]]:
        for span in plan_spans(self.manifest, runs, CHUNK_BYTES):
            read_span(self.storage, self.manifest, span, view(self._chunk(), span.stop - span.start))
            for run in span.runs:
                for part, data in unpack(self.manifest, run, span, self._chunk()):
                    yield run, part, data

    def _chunk(self) -> torch.Tensor:
        if self._buffer is None:
            self._buffer = make_buffer(CHUNK_BYTES, pinned=False)
        return self._buffer


def open(path: str | Path) -> Archive:
    """Open a checkpoint: read its manifest, check it, and the size of every file.

    Raises:
        CheckpointError: there is no complete checkpoint.
        DamagedError: there is one, but a file is missing, has another size, or the manifest is damaged.
    """
    storage = open_storage(path)
    return Archive(storage, read_manifest(storage))


def read_manifest(storage: Storage) -> Manifest:
    """Read and check the manifest of a checkpoint; raises as `open`."""
    sizes = storage.sizes()
    if manifests.NAME not in sizes:
        raise CheckpointError(
            f"{storage.path} is no complete checkpoint: {manifests.NAME} is missing; give a folder that holds one"
        )
    manifest = manifests.decode(storage.read_all(manifests.NAME), f"{storage.path}/{manifests.NAME}")
    check_files(storage.path, manifest, sizes)
    return manifest


def check_files(path: str, manifest: Manifest, sizes: dict[str, int]) -> None:
    """Hold the files of a folder against a manifest.

    Raises:
        DamagedError: one is missing or has another size.
    """
    for name, size in manifest.files.items():
        if name not in sizes:
            raise DamagedError(f"{path}/{name} is missing; the checkpoint is damaged; use another one")
        if sizes[name] != size:
            raise DamagedError(
                f"{path}/{name} has {sizes[name]} bytes, its manifest says {size}; it is damaged; use another one"
            )


def has_appeared(storage: Storage, data: bytes) -> bool:
    """Whether a manifest is there, or may be, although its commit failed; its files must stay then."""
    try:
        return manifests.NAME in storage.sizes() and storage.read_all(manifests.NAME) == data
    except CheckpointError:
        return True


class Writer:
    """A checkpoint that one process writes tensor by tensor. Made by `create`, used in a `with` statement.

    Attributes:
        values: JSON values by name, to be filled.
    """

    def __init__(self, storage: Storage) -> None:
        self.values: dict[str, Any] = {}
        self._storage = storage
        self._buffer = make_buffer(CHUNK_BYTES, pinned=False)
        self._waiting: list[tuple[Entry, torch.Tensor]] = []
        self._waiting_bytes = 0
        self._infos: dict[str, TensorInfo] = {}
        self._written: list[tuple[str, FileLayout, list[int]]] = []

    def __enter__(self) -> Writer:
        self._storage.make()
        return self

    def add(
        self,
        name: str,
        tensor: torch.Tensor,
        *,
        shape: tuple[int, ...] | None = None,
        offsets: tuple[int, ...] | None = None,
    ) -> None:
        """Take a tensor, or a box of one; it may be held until the next few were added, and must not change.

        Args:
            name: of the tensor.
            tensor: on any device.
            shape: of the global tensor, if this is not all of it.
            offsets: where in it this box begins.

        Raises:
            CheckpointError: the same name with another dtype or shape; the storage refuses.
        """
        info = TensorInfo(tensor.dtype, tuple(tensor.shape) if shape is None else tuple(shape))
        self._note(name, info)
        box = Box((0,) * len(info.shape) if offsets is None else tuple(offsets), tuple(tensor.shape))
        limit = min(_FILE_BYTES, self._storage.max_file_bytes // 2)
        for part in split(box, max(limit // info.dtype.itemsize, 1)):
            self._waiting.append((Entry(name, info, part), tensor.detach()[part.within(box)]))
            self._waiting_bytes += self._waiting[-1][0].num_bytes
            if self._waiting_bytes >= limit:
                self._write()

    def add_file(self, parts: Sequence[tuple[Entry, Callable[[], torch.Tensor]]]) -> None:
        """Write a file of its own for some boxes. Each is loaded when its bytes are due: one is in memory at a time.

        Args:
            parts: boxes, and what loads the data of each, in the dtype and shape of the box.

        Raises:
            CheckpointError: the same name with another dtype or shape; the storage refuses.
        """
        for entry, _ in parts:
            self._note(entry.name, entry.info)
        layout = FileLayout([entry for entry, _ in parts])
        loads = {id(entry): load for entry, load in parts}
        tensors = _Loaded([loads[id(entry)] for entry in layout.entries])
        digests: list[int] = []

        def chunks() -> Iterator[memoryview]:
            for index in range(layout.num_chunks):
                chunk = view(self._buffer, layout.fill(index, self._buffer, tensors))
                digests.extend(digest_blocks(chunk))
                yield chunk

        name = f"{len(self._written):05d}-{uuid.uuid4().hex[:12]}.safetensors"
        self._written.append((name, layout, digests))
        self._storage.write(name, layout.size, chunks())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        data = b""
        try:
            self._write()
            data = manifests.encode(make_manifest(self._infos, self.values, self._written))
            manifests.decode(data, f"{self._storage.path}/{manifests.NAME}")  # or a missing box would show at load
            self._storage.commit(manifests.NAME, data)
        except BaseException:
            if not has_appeared(self._storage, data):
                self._discard()
            raise
        written = {manifests.NAME, *(name for name, _, _ in self._written)}
        self._storage.remove(name for name in self._storage.sizes() if name not in written)

    def _note(self, name: str, info: TensorInfo) -> None:
        if self._infos.setdefault(name, info) != info:
            raise CheckpointError(f"{name} is added as {info}, and was as {self._infos[name]}; its boxes must agree")

    def _write(self) -> None:
        if self._waiting:
            self.add_file([(entry, partial(torch.Tensor.detach, tensor)) for entry, tensor in self._waiting])
        self._waiting, self._waiting_bytes = [], 0

    def _discard(self) -> None:
        self._storage.remove([name for name, _, _ in self._written])


class _Loaded(Sequence[torch.Tensor]):
    """Tensors that are loaded when asked for; the last one is kept, since a chunk may end within it."""

    def __init__(self, loads: Sequence[Callable[[], torch.Tensor]]) -> None:
        self._loads = loads
        self._last: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self._loads)

    def __getitem__(self, index: Any) -> Any:
        if self._last is None or self._last[0] != index:
            self._last = None  # its memory goes before the next is loaded
            self._last = index, self._loads[index]()
        return self._last[1]


def create(path: str | Path) -> Writer:
    """Return a writer of a new checkpoint, which appears when its `with` statement ends without an exception."""
    return Writer(open_storage(path))


def split(box: Box, max_numel: int) -> Iterator[Box]:
    """Cut a box along its first long dim into boxes of at most `max_numel` elements, as far as single rows allow."""
    dim = next((dim for dim, size in enumerate(box.sizes) if size > 1), None)
    if box.numel <= max_numel or dim is None:
        yield box
        return
    row = box.numel // box.sizes[dim]
    step = max(max_numel // row, 1)
    for start in range(0, box.sizes[dim], step):
        size = min(step, box.sizes[dim] - start)
        offsets = (*box.offsets[:dim], box.offsets[dim] + start, *box.offsets[dim + 1 :])
        yield from split(Box(offsets, (*box.sizes[:dim], size, *box.sizes[dim + 1 :])), max_numel)


def make_manifest(
    infos: dict[str, TensorInfo], values: dict[str, Any], files: list[tuple[str, FileLayout, list[int]]]
) -> Manifest:
    """Put together what was written.

    Args:
        infos: of all tensors.
        values: JSON values by name.
        files: name, layout and the checksums of the blocks of each.
    """
    infos = dict(sorted(infos.items()))
    index = {name: i for i, name in enumerate(infos)}
    num_dims = max((len(info.shape) for info in infos.values()), default=0)
    entries = [entry for _, layout, _ in files for entry in layout.entries]
    offsets, sizes = np.zeros((len(entries), num_dims), np.int64), np.ones((len(entries), num_dims), np.int64)
    for row, entry in enumerate(entries):
        offsets[row, : len(entry.box.offsets)] = entry.box.offsets
        sizes[row, : len(entry.box.sizes)] = entry.box.sizes
    tensor = np.array([index[entry.name] for entry in entries], dtype=np.uint32)
    file = np.repeat(np.arange(len(files), dtype=np.uint32), [len(layout.entries) for _, layout, _ in files])
    start = np.array([start for _, layout, _ in files for start in layout.starts], dtype=np.int64)
    order = np.argsort(tensor, kind="stable")
    boxes = Boxes(tensor[order], file[order], start[order], offsets[order], sizes[order])
    digests = np.array([digest for _, _, digests in files for digest in digests], dtype=np.uint64)
    return Manifest(infos, values, {name: layout.size for name, layout, _ in files}, boxes, digests)
