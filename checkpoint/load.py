"""Loading: only the bytes that are needed, each verified; read by one process where several need them."""

from __future__ import annotations

import socket
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from shardwright.checkpoint import manifest as manifests
from shardwright.checkpoint.archive import read_manifest
from shardwright.checkpoint.box import Box, Piece, pieces_of
from shardwright.checkpoint.errors import CheckpointError, DamagedError
from shardwright.checkpoint.exchange import Absent, Tree, raise_first
from shardwright.checkpoint.files import (
    Run,
    Span,
    boxes_of,
    copy_common,
    make_buffer,
    plan_runs,
    plan_spans,
    read_span,
    unpack,
    view,
)
from shardwright.checkpoint.manifest import Manifest
from shardwright.checkpoint.state import State
from shardwright.checkpoint.storage import Storage

_WINDOW = 4  # messages under way


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How loads work.

    Attributes:
        exchange: let one process read what several need, and send it to them; `auto`: if the storage is remote or the
            processes are on several hosts. On one host with a local disk the page cache does the same.
        timeout_seconds: how long processes wait for each other.
    """

    exchange: bool | Literal["auto"] = "auto"
    timeout_seconds: float = 1800.0


@dataclass(frozen=True)
class Unit:
    """A span of a file, who reads it, and who else needs some of it: rank -> tensor -> boxes. In order of `index`."""

    index: int
    span: Span
    reader: int
    others: dict[int, dict[str, list[Box]]] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadReport:
    """What a load did on this process, in bytes: read from the storage, received from others, needed."""

    read_bytes: int
    received_bytes: int
    needed_bytes: int


class Loader:
    """One load: fills the tensors of a state in place, and replaces its values (collective).

    Args:
        tree: of the processes.
        storage: of the checkpoint.
        state: what to fill.
        options: how.
        own_files: the files that this process can read, where not all can read all.
    """

    def __init__(
        self, tree: Tree, storage: Storage, state: State, options: LoadOptions, own_files: set[str] | None = None
    ) -> None:
        self._tree, self._storage, self._state, self._options = tree, storage, state, options
        self._own_files = own_files
        self._targets: dict[str, list[Piece]] = {}
        self._buffers = threading.local()
        tensors = [t if isinstance(t, torch.Tensor) else t.tensor for t in state.tensors.values()]
        self._gpu = next((t.device for t in tensors if t.is_cuda), None)
        self._read_bytes = self._received_bytes = self._copied_bytes = 0
        self._lock = threading.Lock()

    def run(self, manifest: Manifest) -> LoadReport:
        """Load.

        Raises:
            CheckpointError: the checkpoint lacks or mismatches something that the state has.
            DamagedError: its bytes are not what was written. Either on all processes; the state may be partly filled.
        """
        self._manifest = manifest
        self._tree.run(self._match)
        units = self._plan()
        self._tree.run(lambda: self._execute(units))
        return LoadReport(self._read_bytes, self._received_bytes, self._needed_bytes)

    def _match(self) -> None:
        """Hold the state against the manifest."""
        path = self._storage.path
        for name, tensor in self._state.tensors.items():
            info = self._manifest.tensors.get(name)
            if info is None:
                raise CheckpointError(f"{path} has no tensor {name}; it is of another model; load what it holds")
            pieces = pieces_of(tensor)
            shape, dtype = tuple(tensor.shape), pieces[0].tensor.dtype if pieces else info.dtype
            floats = info.dtype.is_floating_point and dtype.is_floating_point
            if info.shape != shape or (info.dtype != dtype and not floats):
                raise CheckpointError(
                    f"{path} has {name} as {manifests.dtype_name(info.dtype)} {list(info.shape)}, this program as "
                    f"{manifests.dtype_name(dtype)} {list(shape)}; they must agree, but for the width of floats; use "
                    "the config that it was saved with"
                )
            self._targets[name] = [piece for piece in pieces if piece.box.numel]
        self._state.values = dict(self._manifest.values)
        self._needed_bytes = sum(
            piece.box.numel * piece.tensor.element_size() for pieces in self._targets.values() for piece in pieces
        )

    def _plan(self) -> list[Unit]:
        rank, exchange = self._tree.rank, self._options.exchange
        wanted = {name: [piece.box for piece in pieces] for name, pieces in self._targets.items()}
        if exchange == "auto":
            hosts = set(self._tree.agree(socket.gethostname())) if self._tree.size > 1 else set()
            exchange = self._tree.size > 1 and (not self._storage.is_local or len(hosts) > 1)
        if not exchange and self._own_files is None:
            runs = needed_runs(self._manifest, wanted, self._storage.read_bytes)
            spans = plan_spans(self._manifest, runs, self._storage.read_bytes)
            return [Unit(index, span, rank) for index, span in enumerate(spans)]
        gathered = self._tree.gather((wanted, self._own_files))
        shares: list[Any] | None = None
        if gathered is not None:
            late = [CheckpointError(answer.reason) for answer in gathered if isinstance(answer, Absent)]
            try:
                raise_first(late)
                wanted_by_rank, files_by_rank = zip(*gathered, strict=True)
                shares = share_out(self._manifest, wanted_by_rank, files_by_rank, self._storage.read_bytes)
            except CheckpointError as error:
                shares = [error] * self._tree.size
        share = self._tree.scatter(shares)
        if isinstance(share, CheckpointError):
            self._tree.broken = True  # for some it may be, and all must make the next one
            raise share
        return share

    def _execute(self, units: Sequence[Unit]) -> None:
        rank = self._tree.rank
        alone = [unit for unit in units if unit.reader == rank and not unit.others]
        shared = [unit for unit in units if unit.reader != rank or unit.others]
        use_device = None if self._gpu is None else partial(torch.cuda.set_device, self._gpu)
        with ThreadPoolExecutor(self._storage.num_readers, "checkpoint-read", use_device) as pool:
            error = self._exchange(shared, pool)
            futures = [pool.submit(self._read, unit) for unit in alone]
            for future in futures:
                try:
                    future.result()
                except CheckpointError as failure:
                    error = error or failure
                    for other in futures:
                        other.cancel()
                    break
        if error is not None:
            raise error
        if self._copied_bytes != self._needed_bytes:
            raise DamagedError(
                f"{self._storage.path} is damaged: its boxes overlap, {self._copied_bytes} bytes were found for "
                f"{self._needed_bytes}; use another checkpoint"
            )

    def _read(self, unit: Unit) -> dict[int, torch.Tensor]:
        """Read a unit, take what this process needs of it, and return what others do, by rank."""
        size, buffer = unit.span.stop - unit.span.start, self._buffer()
        in_place = None if unit.others else self._in_place(unit.span, buffer)
        if in_place is not None:
            parts, copied = in_place
            read_span(self._storage, self._manifest, unit.span, *parts)
            self._count_read(size, copied)
            return {}
        read_span(self._storage, self._manifest, unit.span, view(buffer, size))
        stream = None if self._gpu is None else torch.cuda.Stream(self._gpu)
        messages: dict[int, list[torch.Tensor]] = defaultdict(list)
        copied = 0
        with torch.cuda.stream(stream), torch.no_grad():
            for run, name in self._named(unit.span.runs):
                for box, data in unpack(self._manifest, run, unit.span, buffer):
                    copied += self._take(name, box, data)
                    for other, wanted in unit.others.items():
                        for target in wanted.get(name, ()):
                            if common := box.intersect(target):
                                messages[other].append(_flat_bytes(data[common.within(box)]))
            packed = {other: torch.cat(parts) for other, parts in messages.items()}
            if stream is not None:
                stream.synchronize()
        self._count_read(size, copied)
        return packed

    def _in_place(self, span: Span, buffer: torch.Tensor) -> tuple[list[memoryview], int] | None:
        """Return where every byte of a span belongs, if all that is needed can be read to where it belongs.

        Returns:
            Memory of the tensors, and of the buffer for what lies between; bytes of the tensors. None if something has
            to be converted, rearranged, or is needed twice.
        """
        rest, done, parts, copied = view(buffer, span.stop - span.start), span.start, [], 0
        for run, name in self._named(span.runs):
            if run.start < done:
                return None
            parts.append(rest[done - span.start : run.start - span.start])
            for box in boxes_of(self._manifest, run):
                targets = [piece for piece in self._targets.get(name, ()) if box.intersect(piece.box)]
                if len(targets) != 1 or targets[0].box.intersect(box) != box:
                    return None
                tensor = targets[0].tensor[box.within(targets[0].box)]
                if tensor.is_cuda or tensor.dtype != run.info.dtype or not tensor.is_contiguous():
                    return None
                parts.append(memoryview(_flat_bytes(tensor).numpy()))  # type: ignore[arg-type]
                copied += len(parts[-1])
            done = run.stop
        return [*parts, rest[done - span.start :]], copied

    def _count_read(self, read_bytes: int, copied_bytes: int) -> None:
        with self._lock:
            self._read_bytes += read_bytes
            self._copied_bytes += copied_bytes

    def _take(self, name: str, box: Box, data: torch.Tensor) -> int:
        return sum(copy_common(box, data, piece.box, piece.tensor) for piece in self._targets.get(name, ()))

    def _exchange(self, units: Sequence[Unit], pool: ThreadPoolExecutor) -> CheckpointError | None:
        """Send and receive in the same order everywhere, a few units at a time. A reader that fails sends zeros."""
        rank, error = self._tree.rank, None
        reads: dict[int, Future[dict[int, torch.Tensor]]] = {}
        under_way: list[tuple[dist.Work, int, Unit, torch.Tensor]] = []
        ahead = iter(unit for unit in units if unit.reader == rank)
        for unit in units:
            while len(reads) < _WINDOW and (coming := next(ahead, None)) is not None:
                reads[coming.index] = pool.submit(self._read, coming)
            while len(under_way) >= _WINDOW:
                self._finish(under_way.pop(0))
            if unit.reader != rank:
                data = torch.empty(self._expected_bytes(unit), dtype=torch.uint8)
                under_way.append((self._tree.irecv(data, unit.reader, unit.index), unit.reader, unit, data))
                continue
            try:
                messages = reads.pop(unit.index).result()
            except CheckpointError as failure:
                error = error or failure
                messages = {
                    other: torch.zeros(self._count(unit, w), dtype=torch.uint8) for other, w in unit.others.items()
                }
            for other, data in messages.items():
                under_way.append((self._tree.isend(data, other, unit.index), other, unit, data))
        for work in under_way:
            self._finish(work)
        return error

    def _finish(self, message: tuple[dist.Work, int, Unit, torch.Tensor]) -> None:
        work, peer, unit, data = message
        try:
            work.wait(timedelta(seconds=self._options.timeout_seconds))
        except RuntimeError as error:
            self._tree.broken = True
            raise CheckpointError(
                f"[rank {self._tree.rank}] rank {peer} did not exchange its part of {unit.span.file}: {error}; "
                "see what that rank says"
            ) from error
        if unit.reader == self._tree.rank:
            return
        done = copied = 0
        self._received_bytes += data.numel()
        for run, name in self._named(unit.span.runs):
            for box in boxes_of(self._manifest, run):
                for piece in self._targets.get(name, ()):
                    if common := box.intersect(piece.box):
                        size = common.numel * run.info.dtype.itemsize
                        part = data[done : done + size].clone().view(run.info.dtype).view(common.sizes)
                        copied += copy_common(common, part, piece.box, piece.tensor)
                        done += size
        with self._lock:
            self._copied_bytes += copied

    def _expected_bytes(self, unit: Unit) -> int:
        return self._count(unit, {name: [piece.box for piece in pieces] for name, pieces in self._targets.items()})

    def _count(self, unit: Unit, wanted: dict[str, list[Box]]) -> int:
        return sum(
            common.numel * run.info.dtype.itemsize
            for run, name in self._named(unit.span.runs)
            for box in boxes_of(self._manifest, run)
            for target in wanted.get(name, ())
            if (common := box.intersect(target))
        )

    def _named(self, runs: Iterable[Run]) -> Iterator[tuple[Run, str]]:
        names = self._manifest.names
        return ((run, names[self._manifest.boxes.tensor[run.row]]) for run in runs)

    def _buffer(self) -> torch.Tensor:
        if not hasattr(self._buffers, "own"):
            self._buffers.own = make_buffer(self._storage.read_bytes, pinned=self._gpu is not None)
        return self._buffers.own


def open_together(tree: Tree, storage: Storage) -> Manifest:
    """Return the manifest of a checkpoint, read by rank 0 alone (collective; raises on all as `archive.open`)."""
    answer: Any = None
    if tree.rank == 0:
        try:
            manifest = read_manifest(storage)
            answer = storage.read_all(manifests.NAME) if tree.size > 1 else b""
        except CheckpointError as error:
            answer = error
    answer = tree.broadcast(answer)
    raise_first([answer])
    return manifest if tree.rank == 0 else manifests.decode(answer, f"{storage.path}/{manifests.NAME}")


def needed_runs(manifest: Manifest, wanted: dict[str, list[Box]], max_bytes: int) -> list[Run]:
    """Return the runs of stored boxes that hold everything that is wanted, each stored box once."""
    runs = []
    for name, boxes in wanted.items():
        info, rows = manifest.tensors[name], manifest.rows(name)
        ranges: dict[int, list[Box]] = defaultdict(list)
        for box in boxes:
            for row in _touching(manifest, rows, box):
                common = manifest.boxes.box(row, len(info.shape)).intersect(box)
                if common is not None:
                    ranges[row].append(common)
        for row, commons in ranges.items():
            runs += plan_runs(manifest, row, info, commons, max_bytes)
    return runs


def share_out(
    manifest: Manifest, wanted: Sequence[dict[str, list[Box]]], own_files: Sequence[set[str] | None], max_bytes: int
) -> list[list[Unit]]:
    """Choose who reads what, by bytes, among those that need it (else among those that can), and return it by rank.

    Args:
        manifest: of the checkpoint.
        wanted: by rank, tensor -> boxes.
        own_files: by rank, the files that it can read; None for all.
        max_bytes: to read at once.

    Raises:
        CheckpointError: nobody can read a file that is needed.
    """
    everything: dict[str, dict[Box, None]] = defaultdict(dict)
    for boxes_of_rank in wanted:
        for name, boxes in boxes_of_rank.items():
            everything[name] |= dict.fromkeys(boxes)
    all_wanted = {name: list(boxes) for name, boxes in everything.items()}
    spans = plan_spans(manifest, needed_runs(manifest, all_wanted, max_bytes), max_bytes)
    load = [0] * len(wanted)
    units: list[list[Unit]] = [[] for _ in wanted]
    for index, span in enumerate(spans):
        needs = _needs(manifest, span, wanted)
        able = [rank for rank, files in enumerate(own_files) if files is None or span.file in files]
        if not able:
            raise CheckpointError(f"no process that is left can read {span.file}; load another checkpoint")
        reader = min([rank for rank in able if rank in needs] or able, key=lambda rank: load[rank])
        load[reader] += span.stop - span.start
        others = {rank: boxes for rank, boxes in needs.items() if rank != reader}
        units[reader].append(Unit(index, span, reader, others))
        for rank in others:
            units[rank].append(Unit(index, span, reader))
    return units


def _needs(manifest: Manifest, span: Span, wanted: Sequence[dict[str, list[Box]]]) -> dict[int, dict[str, list[Box]]]:
    needs: dict[int, dict[str, list[Box]]] = {}
    names = {manifest.names[manifest.boxes.tensor[run.row]]: None for run in span.runs}
    for rank, boxes_of_rank in enumerate(wanted):
        own = {name: boxes_of_rank[name] for name in names if name in boxes_of_rank}
        touched = any(
            box.intersect(target)
            for run in span.runs
            for box in boxes_of(manifest, run)
            for target in own.get(manifest.names[manifest.boxes.tensor[run.row]], ())
        )
        if touched:
            needs[rank] = own
    return needs


def _touching(manifest: Manifest, rows: range, box: Box) -> list[int]:
    if not rows:
        return []
    num_dims = len(box.sizes)
    part = slice(rows.start, rows.stop)
    offsets, sizes = manifest.boxes.offsets[part, :num_dims], manifest.boxes.sizes[part, :num_dims]
    ends = np.array(box.offsets, np.int64) + np.array(box.sizes, np.int64)
    touching = (offsets < ends) & (offsets + sizes > np.array(box.offsets, np.int64))
    return (np.flatnonzero(touching.all(axis=1)) + rows.start).tolist()


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
