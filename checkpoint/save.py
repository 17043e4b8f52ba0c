"""Saves of one run: what is kept from one to the next, and how each begins."""

from __future__ import annotations

import atexit
import hashlib
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from shardwright.checkpoint.box import Piece, pieces_of
from shardwright.checkpoint.errors import CheckpointError
from shardwright.checkpoint.exchange import Absent, Tree
from shardwright.checkpoint.files import Entry, FileLayout
from shardwright.checkpoint.job import Buffers, File, Pending, SaveJob
from shardwright.checkpoint.manifest import Manifest, TensorInfo
from shardwright.checkpoint.planner import Part, plan
from shardwright.checkpoint.state import State
from shardwright.checkpoint.storage import CHUNK_BYTES, Storage

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
        pipeline: write while copies go on; `auto`: unless the state is the CPU's, whose copies would have to share the
            cores with that. Done anyway where the memory does not hold the state. Not to (False) takes that memory in
            mode `sync` too.
    """

    memory_gib: float = 16.0
    timeout_seconds: float = 1800.0
    unfinished: Literal["wait", "supersede"] = "wait"
    cache: bool = True
    balance: bool = True
    pipeline: bool | Literal["auto"] = "auto"


@dataclass(frozen=True, eq=False)
class Plan:
    """What this process writes, save after save."""

    key: bytes
    max_file_bytes: int
    parts: list[list[Part]]
    layouts: list[FileLayout]


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
        self._layouts_sent = False
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
        self.end_last()
        pieces = _pieces(state)
        reused = self._make_plan([entry for entry, _ in pieces], storage.max_file_bytes)
        assert self._plan is not None
        token = uuid.uuid4().hex[:12]
        files = []
        for number, (parts, layout) in enumerate(zip(self._plan.parts, self._plan.layouts, strict=True)):
            name = f"{self.tree.rank:05d}-{number:05d}-{token}.safetensors"
            files.append(File(layout, name, [_cut(part, pieces[part.piece][1]) for part in parts]))
        pending = Pending(storage.path, sum(layout.size for layout in self._plan.layouts), reused, started)
        pinned = any(tensor.is_cuda for file in files for tensor in file.tensors)
        pipeline = pinned if self.options.pipeline == "auto" else self.options.pipeline
        job = SaveJob(self.tree, storage, files, state.values, self._skeleton, pipeline=pipeline)
        job.start(pending, self._buffers_for(pinned, bounded), send_layouts=not self._layouts_sent)
        self._layouts_sent = True
        self._last = pending
        _under_way.add(pending)
        return pending

    def prepare(self, storage: Storage, state: State) -> None:
        """Make the plan of a first save (collective), and its buffers in a thread."""
        pieces = _pieces(state)
        self._make_plan([entry for entry, _ in pieces], storage.max_file_bytes)
        assert self._plan is not None
        layouts = self._plan.layouts
        sizes = [
            min(layout.size - start, CHUNK_BYTES) for layout in layouts for start in range(0, layout.size, CHUNK_BYTES)
        ]
        buffers = self._buffers_for(any(piece.tensor.is_cuda for _, piece in pieces), bounded=False)
        threading.Thread(target=buffers.make_ahead, args=(sizes,), name="checkpoint-buffers").start()

    def _buffers_for(self, pinned: bool, bounded: bool) -> Buffers:
        if (pinned, bounded) not in self._buffers:
            gib = min(_BOUNDED_GIB, self.options.memory_gib) if bounded else self.options.memory_gib
            self._buffers[pinned, bounded] = Buffers(gib, pinned=pinned)
        return self._buffers[pinned, bounded]

    def end_last(self) -> None:
        """Wait for the save before, or end it, and make a new tree if a process was late in it (collective)."""
        if self._last is not None:
            if self.options.unfinished == "supersede":
                self._last.supersede()
            self._last._finished.wait()
            if self._last._error is not None:
                self._plan = None
            self._last = None
        if self.tree.broken:
            self.tree, self._plan = Tree(self.options.timeout_seconds), None

    def _make_plan(self, entries: list[Entry], max_file_bytes: int) -> bool:
        """Make sure that the plan is for these entries (collective); return whether it already was."""
        key = hashlib.sha256(repr([(e.name, e.info, e.box) for e in entries]).encode()).digest()
        old = self._plan
        hit = self.options.cache and old is not None and (old.key, old.max_file_bytes) == (key, max_file_bytes)
        answers = self.tree.agree(hit)
        late = [answer.reason for answer in answers if isinstance(answer, Absent)]
        if late:
            raise CheckpointError(f"nothing is saved: {'; '.join(dict.fromkeys(late))}; see what that rank does")
        if all(answers):
            return True
        limit = max_file_bytes // 2
        self._plan = None
        try:
            parts = list(_group(plan(self.tree, entries, limit, balance=self.options.balance), limit))
        except CheckpointError:
            self.tree.broken = True  # for some it may be, and all must make the next one
            raise
        layouts = [FileLayout([part.entry for part in group]) for group in parts]
        ordered = []
        for group, layout in zip(parts, layouts, strict=True):
            by_entry = {id(part.entry): part for part in group}
            ordered.append([by_entry[id(entry)] for entry in layout.entries])
        self._plan, self._layouts_sent = Plan(key, max_file_bytes, ordered, layouts), False
        return False


def _pieces(state: State) -> list[tuple[Entry, Piece]]:
    return [
        (Entry(name, TensorInfo(piece.tensor.dtype, piece.shape), piece.box), piece)
        for name, tensor in state.tensors.items()
        for piece in pieces_of(tensor)
        if piece.box.numel or 0 in piece.shape
    ]


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
