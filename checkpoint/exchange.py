"""Messages between the processes of a run along a tree, so that none talks to thousands; and who sent none."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from shardwright.checkpoint.errors import CheckpointError, DamagedError

FAN_OUT = 16


@dataclass(frozen=True)
class Absent:
    """Stands for the message of a process that did not send one."""

    reason: str


class Tree:
    """Gather to rank 0 and spread from there, over a gloo group of its own (collective to make).

    It may be used by a thread of each process while others use other groups, but by one thread at a time. After a
    message did not arrive it is `broken`, and a new one must be made.

    Args:
        timeout_seconds: how long a process waits for each of those below it in the tree.

    Raises:
        CheckpointError: the processes cannot reach each other.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.rank, self.size, self.broken = 0, 1, False
        self.timeout_seconds = timeout_seconds
        if dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            with self._asking_store():
                group = dist.new_group(backend="gloo", timeout=timedelta(minutes=30), group_desc="checkpoint")
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
            self._store = dist.PrefixStore(f"checkpoint/{self._group.group_name}", _get_default_store())
        # The other end of a message that has begun may itself be waiting for others.
        self._patience_seconds = timeout_seconds * (3 + _height(0, self.size))
        self._children = _children(self.rank, self.size)
        self._parent = (self.rank - 1) // FAN_OUT
        self._num_gathers = 0
        self._absent: set[int] = set()

    def gather(self, value: Any) -> list[Any] | None:
        """Return every process's value by rank on rank 0, None elsewhere (collective).

        Those that could not be heard are `Absent`; a process that cannot reach rank 0 raises CheckpointError.
        """
        self._num_gathers += 1
        messages = {self.rank: pickle.dumps(value)}
        with self._asking_store():
            late = self._await_arrival()
        for child in self._children:
            try:
                reason = late.get(child)
                messages |= {} if reason else self._receive(child, self._patience_seconds)
            except RuntimeError as error:
                reason = _explain(error, self._patience_seconds)
            if reason:
                self.broken = True
                self._absent.add(child)
                absent = pickle.dumps(Absent(f"rank {child} {reason}"))
                messages |= dict.fromkeys(_subtree(child, self.size), absent)
        if self.rank:
            with self._asking_store():
                self._store.set(f"{self._num_gathers}/{self.rank}", "")
            self._send(messages, self._parent)
            return None
        return [pickle.loads(messages[rank]) for rank in range(self.size)]

    def _await_arrival(self) -> dict[int, str]:
        """Wait until the children have something to send; return what to say of those that do not.

        A receive that times out would close all connections of this process, and hide who is late.
        """
        seconds = {child: self.timeout_seconds * (1 + 0.25 * _height(child, self.size)) for child in self._children}
        start, waiting, pause = time.monotonic(), set(self._children), 0.0005
        while waiting:
            waiting = {c for c in waiting if not self._store.check([f"{self._num_gathers}/{c}"])}
            passed = time.monotonic() - start
            if any(passed > seconds[child] for child in waiting):
                break
            time.sleep(pause if waiting else 0)
            pause = min(2 * pause, 0.05)
        for child in set(self._children) - waiting:
            self._store.delete_key(f"{self._num_gathers}/{child}")
        return {child: f"did not arrive within {seconds[child]:g} seconds" for child in waiting}

    @contextmanager
    def _asking_store(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.broken = True
            raise CheckpointError(
                f"[rank {self.rank}] the store of the process group does not answer; "
                "see what the process that serves it says, torchrun or rank 0"
            ) from error

    def scatter(self, values: list[Any] | None) -> Any:
        """Return this process's own of the values by rank that rank 0 has (collective)."""
        if self.rank:
            messages = self._receive_from_parent()
        else:
            assert values is not None
            messages = {rank: pickle.dumps(value) for rank, value in enumerate(values)}
        for child in set(self._children) - self._absent:
            self._send({rank: messages[rank] for rank in _subtree(child, self.size)}, child)
        return pickle.loads(messages[self.rank])

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0 (collective)."""
        message = self._receive_from_parent()[0] if self.rank else pickle.dumps(value)
        for child in set(self._children) - self._absent:
            self._send({0: message}, child)
        return pickle.loads(message) if self.rank else value

    def agree(self, value: Any) -> list[Any]:
        """Return every process's value by rank, on every process (collective)."""
        values = self.broadcast(self.gather(value))
        self.broken = self.broken or any(isinstance(value, Absent) for value in values)
        return values

    def run(self, work: Callable[[], None]) -> None:
        """Do something on every process (collective).

        Raises:
            CheckpointError: the first process's error, on all.
        """
        error: CheckpointError | None = None
        try:
            work()
        except CheckpointError as failure:
            error = type(failure)(str(failure))
        except (OSError, RuntimeError) as failure:
            error = CheckpointError(f"[rank {self.rank}] {failure!r}")
        raise_first(self.agree(error))

    def isend(self, data: torch.Tensor, to: int, tag: int) -> dist.Work:
        """Begin to send a CPU tensor to a process that receives it under the same tag."""
        work = dist.isend(data, to, group=self._group, tag=tag)
        assert work is not None
        return work

    def irecv(self, data: torch.Tensor, source: int, tag: int) -> dist.Work:
        """Begin to receive into a CPU tensor."""
        work = dist.irecv(data, source, group=self._group, tag=tag)
        assert work is not None
        return work

    def _receive_from_parent(self) -> dict[int, bytes]:
        try:
            return self._receive(self._parent, self._patience_seconds)
        except RuntimeError as error:
            self.broken = True
            reason = f"rank {self._parent} {_explain(error, self._patience_seconds)}"
            raise CheckpointError(f"[rank {self.rank}] heard nothing: {reason}; see what that rank says") from error

    def _send(self, messages: dict[int, bytes], to: int) -> None:
        data = torch.frombuffer(bytearray(pickle.dumps(messages)), dtype=torch.uint8)
        try:
            for part in (torch.tensor([data.numel()]), data):
                work = dist.isend(part, to, group=self._group)
                assert work is not None
                work.wait(timedelta(seconds=self._patience_seconds))
        except RuntimeError as error:
            self.broken = True
            if to == self._parent and self.rank:
                raise CheckpointError(
                    f"[rank {self.rank}] rank {to} cannot be reached: {_explain(error, self._patience_seconds)}"
                ) from error

    def _receive(self, source: int, seconds: float) -> dict[int, bytes]:
        size = torch.zeros(1, dtype=torch.int64)
        self._wait(dist.irecv(size, source, group=self._group), seconds)
        data = torch.empty(int(size), dtype=torch.uint8)
        self._wait(dist.irecv(data, source, group=self._group), seconds)
        return pickle.loads(data.numpy().tobytes())

    @staticmethod
    def _wait(work: dist.Work | None, seconds: float) -> None:
        assert work is not None
        work.wait(timedelta(seconds=seconds))


def raise_first(answers: Iterable[Any]) -> None:
    """Raise the first error among answers; one that is not `DamagedError` comes before those that are."""
    errors = [CheckpointError(a.reason) if isinstance(a, Absent) else a for a in answers]
    errors = [error for error in errors if isinstance(error, CheckpointError)]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, DamagedError))


def _subtree(root: int, size: int) -> list[int]:
    ranks, level = [], [root]
    while level:
        ranks += level
        level = [child for rank in level for child in _children(rank, size)]
    return ranks


def _children(rank: int, size: int) -> range:
    return range(rank * FAN_OUT + 1, min(rank * FAN_OUT + FAN_OUT + 1, size))


def _height(rank: int, size: int) -> int:
    height = 0
    while (rank := rank * FAN_OUT + 1) < size:
        height += 1
    return height


def _explain(error: RuntimeError, seconds: float) -> str:
    if "imed out" in str(error):
        return f"did not answer within {seconds:g} seconds"
    return "is gone (its connection closed)"
