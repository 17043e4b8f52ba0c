"""Saving: copies to host memory, which is all that training waits for; then checksums, files and the commit behind it."""

from __future__ import annotations

import atexit
import hashlib
import logging
import queue
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from shardwright.checkpoint import manifest as manifests
from shardwright.checkpoint.archive import check_files, make_manifest
from shardwright.checkpoint.box import Piece, pieces_of
from shardwright.checkpoint.errors import CheckpointError
from shardwright.checkpoint.exchange import Absent, Tree
from shardwright.checkpoint.files import Entry, FileLayout, make_buffer, view
from shardwright.checkpoint.manifest import Manifest, TensorInfo, digest_blocks
from shardwright.checkpoint.planner import Part, plan
from shardwright.checkpoint.state import State
from shardwright.checkpoint.storage import CHUNK_BYTES, Storage

logger = logging.getLogger(__name__)
_NUM_WRITERS = 4
_BOUNDED_GIB = 0.25
_under_way: weakref.WeakSet[Pending] = weakref.WeakSet()


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """How saves work.

    Attributes:
        memory_gib: host memory for copies, per process; a state that is larger is copied as the storage takes it.
        timeout_seconds: how long processes wait for each other's part of a save.
        unfinished: what a new save does with one that is not finished: `wait` for it, or `supersede` (drop) it.
        cache: keep the plan while nobody's tensors change.
        balance: deal out by bytes what several processes hold.
        pipeline: write while copies go on.
    """

    memory_gib: float = 16.0
    timeout_seconds: float = 1800.0
    unfinished: Literal["wait", "supersede"] = "wait"
    cache: bool = True
    balance: bool = True
    pipeline: bool = True


class Superseded(CheckpointError):
    """A save that was dropped because a newer one began."""


class Pending:
    """A save under way. All methods are local: they wait for what this process's own threads do.

    Attributes:
        path: of the checkpoint.
        num_bytes: that this process writes.
        plan_reused: whether the plan of the save before could be used again.
        staged_seconds: from the call until the state had been copied.
        total_seconds: from the call until the checkpoint was complete.
    """

    def __init__(self, path: str, num_bytes: int, plan_reused: bool, started: float) -> None:
        self.path, self.num_bytes, self.plan_reused = path, num_bytes, plan_reused
        self.staged_seconds = self.total_seconds = 0.0
        self._started = started
        self._staged, self._finished = threading.Event(), threading.Event()
        self._error: CheckpointError | None = None
        self._superseded = threading.Event()

    def wait_staged(self) -> None:
        """Wait until the state may change again. What went wrong before shows in `wait`."""
        self._staged.wait()

    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return self._finished.is_set()

    def wait(self) -> None:
        """Wait until the checkpoint is complete on the storage.

        Raises:
            CheckpointError: it is not; a process could not write its part, was late, or the save was superseded.
        """
        self._finished.wait()
        if self._error is not None:
            raise self._error

    def supersede(self) -> None:
        """Ask this process's part to stop; the save fails as `Superseded` unless it is complete before that."""
        self._superseded.set()

    def _mark_staged(self) -> None:
        self.staged_seconds = time.monotonic() - self._started
        self._staged.set()

    def _finish(self, error: CheckpointError | None) -> None:
        self._error = error
        self.total_seconds = time.monotonic() - self._started
        self._staged.set()
        self._finished.set()


class Buffers:
    """Host buffers of `CHUNK_BYTES`, allocated when first needed and then kept; at most so many."""

    def __init__(self, memory_gib: float, *, pinned: bool) -> None:
        self._limit, self._pinned = max(int(memory_gib * 2**30) // CHUNK_BYTES, 2), pinned
        self._num_made = 0
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()

    def take(self, stop: threading.Event) -> torch.Tensor:
        """Return a buffer, waiting for one if all are in use."""
        if self._free.empty() and self._num_made < self._limit:
            self._num_made += 1
            return make_buffer(CHUNK_BYTES, pinned=self._pinned)
        while True:
            try:
                return self._free.get(timeout=0.1)
            except queue.Empty:
                if stop.is_set():
                    raise CheckpointError("stopped") from None

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back."""
        self._free.put(buffer)


@dataclass(frozen=True, eq=False)
class Plan:
    """What this process writes, save after save."""

    key: bytes
    max_file_bytes: int
    parts: list[list[Part]]
    layouts: list[FileLayout]


@dataclass
class _File:
    layout: FileLayout
    name: str
    tensors: list[torch.Tensor]
    chunks: queue.SimpleQueue[tuple[torch.Tensor, int, torch.cuda.Event | None]] = field(
        default_factory=queue.SimpleQueue
    )
    digests: list[int] = field(default_factory=list)


class Saver:
    """Saves of one run: keeps buffers, plan and connections between them (collective to make).

    Args:
        options: how.
    """

    def __init__(self, options: SaveOptions) -> None:
        self.options = options
        self.tree = Tree(options.timeout_seconds)
        self._plan: Plan | None = None
        self._skeleton: list[Manifest] = []  # rank 0's manifest of the last save, whose boxes stay while plans do
        self._buffers: dict[tuple[bool, bool], Buffers] = {}
        self._last: Pending | None = None

    def save(self, storage: Storage, state: State, *, bounded: bool) -> Pending:
        """Begin to save (collective). The state must not change before `Pending.wait_staged`.

        Args:
            storage: where to.
            state: what.
            bounded: copy through a few buffers only, as fast as the storage takes them.

        Raises:
            CheckpointError: the processes could not agree on a plan.
        """
        started = time.monotonic()
        self._end_last()
        if self.tree.broken:
            self.tree, self._plan = Tree(self.options.timeout_seconds), None
        pieces = [
            (Entry(name, TensorInfo(piece.tensor.dtype, piece.shape), piece.box), piece)
            for name, tensor in state.tensors.items()
            for piece in pieces_of(tensor)
            if piece.box.numel or 0 in piece.shape
        ]
        reused = self._make_plan([entry for entry, _ in pieces], storage.max_file_bytes)
        assert self._plan is not None
        token = uuid.uuid4().hex[:12]
        files = []
        for number, (parts, layout) in enumerate(zip(self._plan.parts, self._plan.layouts, strict=True)):
            name = f"{self.tree.rank:05d}-{number:05d}-{token}.safetensors"
            files.append(_File(layout, name, [_cut(part, pieces[part.piece][1]) for part in parts]))
        pending = Pending(storage.path, sum(layout.size for layout in self._plan.layouts), reused, started)
        job = _Job(self.tree, storage, files, state.values, self._skeleton, self.options)
        pinned = any(tensor.is_cuda for file in files for tensor in file.tensors)
        if (pinned, bounded) not in self._buffers:
            gib = min(_BOUNDED_GIB, self.options.memory_gib) if bounded else self.options.memory_gib
            self._buffers[pinned, bounded] = Buffers(gib, pinned=pinned)
        job.start(pending, self._buffers[pinned, bounded], send_layouts=not reused)
        self._last = pending
        _under_way.add(pending)
        return pending

    def _end_last(self) -> None:
        if self._last is None:
            return
        if self.options.unfinished == "supersede":
            self._last.supersede()
        self._last._finished.wait()
        if self._last._error is not None:
            self._plan = None
        self._last = None

    def _make_plan(self, entries: list[Entry], max_file_bytes: int) -> bool:
        """Make sure that the plan is for these entries (collective); return whether it already was."""
        key = hashlib.sha256(repr([(e.name, e.info, e.box) for e in entries]).encode()).digest()
        old = self._plan
        hit = self.options.cache and old is not None and (old.key, old.max_file_bytes) == (key, max_file_bytes)
        answers = self.tree.agree(hit)
        late = [answer.reason for answer in answers if isinstance(answer, Absent)]
        if late:
            raise CheckpointError(f"nothing is saved: {'; '.join(late)}; see what that rank does")
        if all(answers):
            return True
        limit = max_file_bytes // 2
        self._plan = None
        parts = list(_group(plan(self.tree, entries, limit, balance=self.options.balance), limit))
        layouts = [FileLayout([part.entry for part in group]) for group in parts]
        ordered = []
        for group, layout in zip(parts, layouts, strict=True):
            by_entry = {id(part.entry): part for part in group}
            ordered.append([by_entry[id(entry)] for entry in layout.entries])
        self._plan = Plan(key, max_file_bytes, ordered, layouts)
        return False


class _Job:
    """One save on this process: a thread that copies, some that write, and one that commits."""

    def __init__(
        self,
        tree: Tree,
        storage: Storage,
        files: list[_File],
        values: dict[str, Any],
        skeleton: list[Manifest],
        options: SaveOptions,
    ) -> None:
        self._tree, self._storage, self._files, self._values = tree, storage, files, values
        self._skeleton, self._options = skeleton, options
        self._stop = threading.Event()
        self._failure: BaseException | None = None

    def start(self, pending: Pending, buffers: Buffers, *, send_layouts: bool) -> None:
        ready = None
        if any(tensor.is_cuda for file in self._files for tensor in file.tensors):
            ready = torch.cuda.Event()
            ready.record()
        self._pending, self._buffers = pending, buffers
        stage = threading.Thread(target=self._stage, args=(ready,), name="checkpoint-stage", daemon=True)
        work = threading.Thread(target=self._work, args=(stage, send_layouts), name="checkpoint", daemon=True)
        stage.start()
        work.start()

    def _stage(self, ready: torch.cuda.Event | None) -> None:
        """Copy the state, chunk by chunk, into host buffers."""
        try:
            stream = torch.cuda.Stream() if ready is not None else None
            with torch.cuda.stream(stream), torch.no_grad():
                if stream is not None and ready is not None:
                    stream.wait_event(ready)
                event = None
                for file in self._files:
                    for index in range(file.layout.num_chunks):
                        self._check_superseded()
                        buffer = self._buffers.take(self._stop)
                        size = file.layout.fill(index, buffer, file.tensors)
                        event = stream.record_event() if stream is not None else None
                        file.chunks.put((buffer, size, event))
                if event is not None:
                    event.synchronize()
        except BaseException as error:
            self._fail(error)
        self._pending._mark_staged()

    def _work(self, stage: threading.Thread, send_layouts: bool) -> None:
        try:
            self._storage.make()
            if not self._options.pipeline:
                stage.join()
            with ThreadPoolExecutor(_NUM_WRITERS, thread_name_prefix="checkpoint-write") as pool:
                for future in [pool.submit(self._write, file) for file in self._files]:
                    future.result()
        except BaseException as error:
            self._fail(error)
        stage.join()
        for file in self._files:
            while not file.chunks.empty():
                self._buffers.give(file.chunks.get()[0])
        error = None
        try:
            self._conclude(send_layouts)
        except CheckpointError as failure:
            error = failure
        except BaseException as failure:
            error = CheckpointError(f"{self._storage.path} is not saved: {failure!r}; this is a bug, please report it")
        if error is not None:
            self._remove_own()
        self._pending._finish(error)

    def _write(self, file: _File) -> None:
        try:
            self._storage.write(file.name, file.layout.size, self._chunks(file))
        except BaseException as error:
            self._fail(error)
            raise

    def _chunks(self, file: _File) -> Iterator[memoryview]:
        for _ in range(file.layout.num_chunks):
            buffer, size, event = self._next_chunk(file)
            try:
                if event is not None:
                    event.synchronize()
                chunk = view(buffer, size)
                file.digests += digest_blocks(chunk)
                yield chunk
            finally:
                self._buffers.give(buffer)

    def _next_chunk(self, file: _File) -> tuple[torch.Tensor, int, torch.cuda.Event | None]:
        while True:
            self._check_superseded()
            try:
                return file.chunks.get(timeout=0.1)
            except queue.Empty:
                if self._stop.is_set():
                    raise CheckpointError("stopped") from None

    def _check_superseded(self) -> None:
        if self._pending._superseded.is_set():
            raise Superseded(f"{self._storage.path} is not saved: a newer save began")

    def _fail(self, error: BaseException) -> None:
        if not self._stop.is_set():
            self._failure = error
            self._stop.set()

    def _conclude(self, send_layouts: bool) -> None:
        """Tell rank 0 what was written; it commits if all is there, and tells all (collective)."""
        message: Any = (None, None, [])
        if self._failure is None:
            layouts = [file.layout for file in self._files] if send_layouts else None
            message = (None, layouts, [(file.name, file.digests) for file in self._files])
        else:
            kind = Superseded if isinstance(self._failure, Superseded) else CheckpointError
            message = ((kind, f"[rank {self._tree.rank}] {self._failure}"), None, [])
        answers = self._tree.gather(message)
        outcome = None if answers is None else self._commit(answers)
        outcome = self._tree.broadcast(outcome)
        if outcome is not None:
            kind, text, late = outcome
            self._tree.broken = self._tree.broken or late
            raise kind(text)

    def _commit(self, answers: list[Any]) -> tuple[type[CheckpointError], str, bool] | None:
        late = [answer.reason for answer in answers if isinstance(answer, Absent)]
        errors = [answer[0] for answer in answers if not isinstance(answer, Absent) and answer[0] is not None]
        if late or errors:
            kind = errors[0][0] if errors and not late else CheckpointError
            return kind, "; ".join([*late, *dict.fromkeys(text for _, text in errors)]), bool(late)
        try:
            manifest = self._assemble(answers)
            path = f"{self._storage.path}/{manifests.NAME}"
            data = manifests.encode(manifest)
            manifests.decode(data, path)
            check_files(self._storage.path, manifest, before := self._storage.sizes())
            old = manifests.decode(self._storage.read_all(manifests.NAME), path) if manifests.NAME in before else None
            self._storage.commit(manifests.NAME, data)
            if old is not None:
                self._storage.remove(old.files.keys() - manifest.files.keys())
        except (CheckpointError, OSError) as error:
            return CheckpointError, f"{self._storage.path} is not saved: {error}", False
        return None

    def _assemble(self, answers: list[Any]) -> Manifest:
        if answers[0][1] is not None:
            written = [
                (name, layout, digests)
                for _, layouts, files in answers
                for layout, (name, digests) in zip(layouts, files, strict=True)
            ]
            infos = {entry.name: entry.info for _, layout, _ in written for entry in layout.entries}
            manifest = make_manifest(infos, self._values, written)
        else:
            (old,) = self._skeleton
            names = [name for _, _, files in answers for name, _ in files]
            digests = np.array([d for _, _, files in answers for _, own in files for d in own], dtype=np.uint64)
            sizes = dict(zip(names, old.files.values(), strict=True))
            manifest = Manifest(old.tensors, self._values, sizes, old.boxes, digests)
        self._skeleton[:] = [manifest]
        return manifest

    def _remove_own(self) -> None:
        try:
            self._storage.remove([file.name for file in self._files])
        except (CheckpointError, OSError) as error:
            logger.warning(f"files of the failed save remain in {self._storage.path}: {error}")


@atexit.register
def _finish_before_exit() -> None:
    """Let a program that ends well end its saves; one that failed must not wait for peers that may be gone."""
    if not hasattr(sys, "last_value"):
        for pending in list(_under_way):
            pending._finished.wait()


def _group(parts: list[Part], max_bytes: int) -> Iterator[list[Part]]:
    """Fill files one after the other."""
    group: list[Part] = []
    size = 0
    for part in parts:
        if group and size + part.entry.num_bytes > max_bytes:
            yield group
            group, size = [], 0
        group.append(part)
        size += part.entry.num_bytes
    if group:
        yield group


def _cut(part: Part, piece: Piece) -> torch.Tensor:
    return piece.tensor[part.entry.box.within(piece.box)]
