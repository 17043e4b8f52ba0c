"""One save on one process: threads that copy, write and commit, while training goes on."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from shardwright.checkpoint import manifest as manifests
from shardwright.checkpoint.archive import check_files, has_appeared, make_manifest
from shardwright.checkpoint.errors import CheckpointError
from shardwright.checkpoint.exchange import Absent, Tree
from shardwright.checkpoint.files import FileLayout, make_buffer, view
from shardwright.checkpoint.manifest import Manifest, digest_blocks
from shardwright.checkpoint.memory import HostMemory, mirror
from shardwright.checkpoint.storage import CHUNK_BYTES, Storage

logger = logging.getLogger(__name__)
_NUM_WRITERS = 4


class SupersededError(CheckpointError):
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
        """Ask this process's part to stop; the save fails as `SupersededError` unless it is complete before that."""
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
    """Host buffers of `CHUNK_BYTES`, allocated when first needed, or ahead, and then kept.

    Attributes:
        limit: how many there may be.
    """

    def __init__(self, memory_gib: float, *, pinned: bool) -> None:
        self.limit, self._pinned = max(int(memory_gib * 2**30) // CHUNK_BYTES, 2), pinned
        self._num_made, self._lock = 0, threading.Lock()
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()

    def has_free(self) -> bool:
        """Whether `take` would neither wait nor allocate."""
        return not self._free.empty()

    def take(self, stop: threading.Event) -> torch.Tensor:
        """Return a buffer, waiting for one if all are in use."""
        if self._free.empty() and (buffer := self._make()) is not None:
            return buffer
        while True:
            try:
                return self._free.get(timeout=0.1)
            except queue.Empty:
                if stop.is_set():
                    raise CheckpointError("stopped") from None

    def make_ahead(self, sizes: Iterable[int]) -> None:
        """Make a buffer for each of some sizes, as far as the limit goes, and touch what will be used of it."""
        try:
            for size in sizes:
                if (buffer := self._make()) is None:
                    return
                buffer[:size].zero_()
                self.give(buffer)
        except (RuntimeError, OSError) as error:
            logger.warning(f"no host memory for the next checkpoint: {error}; lower memory_gib, or free some")

    def _make(self) -> torch.Tensor | None:
        with self._lock:
            if self._num_made >= self.limit:
                return None
            self._num_made += 1
        return make_buffer(CHUNK_BYTES, pinned=self._pinned)

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back."""
        self._free.put(buffer)


@dataclass
class File:
    """A file of a save: its tensors, the chunks that were copied and wait to be written, the checksums so far."""

    layout: FileLayout
    name: str
    tensors: list[torch.Tensor]
    chunks: queue.SimpleQueue[tuple[torch.Tensor, int, torch.Event | None]] = field(default_factory=queue.SimpleQueue)
    digests: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Outcome:
    """What rank 0 makes of all answers: a manifest to commit, or an error.

    Attributes:
        late: whether a process was.
        visible: whether a manifest may have appeared, whatever the error. Its files must stay.
    """

    manifest: bytes | None = None
    error: CheckpointError | None = None
    late: bool = False
    visible: bool = False


class SaveJob:
    """One save on this process: a thread that copies, some that write, and one that commits."""

    def __init__(
        self,
        tree: Tree,
        storage: Storage,
        files: list[File],
        values: dict[str, Any],
        skeleton: list[Manifest],
        *,
        pipeline: bool,
    ) -> None:
        self._tree, self._storage, self._files, self._values = tree, storage, files, values
        self._skeleton, self._pipeline = skeleton, pipeline
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._may_be_complete = False  # nobody has told this process what became of its files

    def start(self, pending: Pending, buffers: Buffers, *, send_layouts: bool) -> None:
        """Begin; rank 0 needs the layouts of all whenever there is a new plan."""
        self._pending, self._buffers = pending, buffers
        device = next((tensor.device for file in self._files for tensor in file.tensors if tensor.is_cuda), None)
        stream = None
        if device is not None:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
        copies = self._copy(stream)
        if stream is not None:
            self._queue_what_fits(copies)
        stage = threading.Thread(target=self._stage, args=(copies, stream), name="checkpoint-stage", daemon=True)
        work = threading.Thread(target=self._work, args=(stage, send_layouts), name="checkpoint", daemon=True)
        stage.start()
        work.start()

    def _copy(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """Copy the state into host buffers, or queue the copies on a stream: a chunk for every `next`."""
        for file in self._files:
            for index in range(file.layout.num_chunks):
                self._check_superseded()
                buffer = self._buffers.take(self._stop)
                with torch.cuda.stream(stream), torch.no_grad():
                    size = file.layout.fill(index, buffer, file.tensors)
                file.chunks.put((buffer, size, None if stream is None else stream.record_event()))
                yield

    def _queue_what_fits(self, copies: Iterator[None]) -> None:
        """Queue copies for which there are buffers: at once, as a thread would compete with training for Python."""
        try:
            while self._buffers.has_free() and next(copies, self) is None:
                pass
        except BaseException as error:
            self._fail(error)

    def _stage(self, copies: Iterator[None], stream: torch.cuda.Stream | None) -> None:
        """Do the copies that are left, and wait for all."""
        try:
            if stream is not None:
                torch.cuda.set_device(stream.device)
            for _ in copies:
                pass
            if stream is not None:
                stream.synchronize()
        except BaseException as error:
            self._fail(error)
        self._pending._mark_staged()

    def _work(self, stage: threading.Thread, send_layouts: bool) -> None:
        try:
            self._storage.make()
            if not self._pipeline and sum(file.layout.num_chunks for file in self._files) <= self._buffers.limit:
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
        if isinstance(self._storage, HostMemory):
            self._mirror(self._storage)
        error = None
        try:
            self._conclude(send_layouts)
        except CheckpointError as failure:
            error = failure
        except BaseException as failure:
            error = CheckpointError(f"{self._storage.path} is not saved: {failure!r}; this is a bug, please report it")
        if error is not None and not self._may_be_complete:
            self._remove([file.name for file in self._files])
        self._pending._finish(error)

    def _mirror(self, memory: HostMemory) -> None:
        try:
            mirror(self._tree, memory, [] if self._stop.is_set() else [file.name for file in self._files])
        except (CheckpointError, RuntimeError) as error:
            self._fail(error)

    def _write(self, file: File) -> None:
        try:
            self._storage.write(file.name, file.layout.size, self._chunks(file))
        except BaseException as error:
            self._fail(error)
            raise

    def _chunks(self, file: File) -> Iterator[memoryview]:
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

    def _next_chunk(self, file: File) -> tuple[torch.Tensor, int, torch.Event | None]:
        while True:
            self._check_superseded()
            try:
                return file.chunks.get(timeout=0.1)
            except queue.Empty:
                if self._stop.is_set():
                    raise CheckpointError("stopped") from None

    def _check_superseded(self) -> None:
        if self._pending._superseded.is_set():
            raise SupersededError(f"{self._storage.path} is not saved: a newer save began")

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
            kind = SupersededError if isinstance(self._failure, SupersededError) else CheckpointError
            message = ((kind, f"[rank {self._tree.rank}] {self._failure}"), None, [])
        self._may_be_complete = self._failure is None
        answers = self._tree.gather(message)
        outcome = _Outcome() if answers is None else self._decide(answers)
        if isinstance(self._storage, HostMemory):
            outcome = self._commit_everywhere(self._tree.broadcast(outcome), self._storage)
        elif outcome.manifest is not None:
            outcome = self._commit(outcome.manifest)
        outcome = self._tree.broadcast(outcome)
        self._tree.broken = self._tree.broken or outcome.late
        if outcome.error is not None:
            self._may_be_complete = outcome.visible
            raise outcome.error

    def _decide(self, answers: list[Any]) -> _Outcome:
        """Return the manifest to commit, or what keeps from it."""
        late = [answer.reason for answer in answers if isinstance(answer, Absent)]
        errors = [answer[0] for answer in answers if not isinstance(answer, Absent) and answer[0] is not None]
        if late or errors:
            kind = errors[0][0] if errors and not late else CheckpointError
            text = "; ".join(dict.fromkeys([*late, *(text for _, text in errors)]))
            return _Outcome(error=kind(text), late=bool(late))
        try:
            data = manifests.encode(self._assemble(answers))
            manifests.decode(data, f"{self._storage.path}/{manifests.NAME}")  # or a hole would show at load only
        except (CheckpointError, ValueError) as error:
            return _Outcome(error=CheckpointError(f"{self._storage.path} is not saved: {error}"))
        return _Outcome(manifest=data)

    def _commit(self, data: bytes) -> _Outcome:
        """Make the checkpoint complete, after a last look at what it names; then drop what it replaces."""
        storage, visible = self._storage, False
        try:
            manifest = manifests.decode(data, f"{storage.path}/{manifests.NAME}")
            check_files(storage.path, manifest, before := storage.sizes())
            replaced = self._files_of_old() if manifests.NAME in before else set()
            try:
                storage.commit(manifests.NAME, data)
            except CheckpointError:
                visible = has_appeared(storage, data)
                raise
        except CheckpointError as error:
            return _Outcome(error=CheckpointError(f"{storage.path} is not saved: {error}"), visible=visible)
        self._remove(replaced - manifest.files.keys())
        return _Outcome()

    def _files_of_old(self) -> set[str]:
        """Return the files of the checkpoint that is replaced, if its manifest can be read."""
        try:
            return set(manifests.decode(self._storage.read_all(manifests.NAME), self._storage.path).files)
        except CheckpointError:
            return set()

    def _commit_everywhere(self, outcome: _Outcome, memory: HostMemory) -> _Outcome:
        """Commit on every host (collective)."""
        error = outcome.error
        if outcome.manifest is not None and memory.is_first(self._tree.rank):
            try:
                memory.commit(manifests.NAME, outcome.manifest)
            except CheckpointError as failure:
                error = failure
        errors = [answer for answer in self._tree.agree(error) if isinstance(answer, CheckpointError)]
        error = errors[0] if errors else None
        return _Outcome(error=error, late=outcome.late, visible=outcome.manifest is not None)

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

    def _remove(self, names: Iterable[str]) -> None:
        try:
            self._storage.remove(names)
        except CheckpointError as error:
            logger.warning(f"files that no checkpoint needs remain in {self._storage.path}: {error}")
