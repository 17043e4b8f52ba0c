"""What keeps a run safe from outside: an agreed stop on a signal, and one run per folder."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import IO

import torch
import torch.distributed as dist

from shardwright.conf import ConfigError


class GracefulStop:
    """A stop that all processes make after the same step, when any of them has received SIGTERM or SIGINT.

    Each poll starts a small reduction on the CPU and reads that of the poll before, so that none waits for it. A second
    Ctrl-C interrupts at once; not under torchrun, which repeats the signal.
    """

    def __init__(self) -> None:
        self._received = False
        self._insists = "TORCHELASTIC_RUN_ID" not in os.environ
        self._flag: torch.Tensor | None = None
        self._pending: dist.Work | None = None
        self._before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}

    def poll(self) -> bool:
        """Return whether to stop now (collective; call once per step)."""
        stop = self._collect()
        self._flag = torch.tensor([int(self._received)])
        self._pending = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, async_op=True)
        return stop

    def close(self) -> None:
        """Finish the pending reduction and give the signals back (collective)."""
        self._collect()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _collect(self) -> bool:
        if self._pending is None or self._flag is None:
            return False
        self._pending.wait()
        self._pending = None
        return bool(self._flag.item())

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._received and self._insists and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True


def lock_folder(folder: Path) -> IO[str]:
    """Create a run's folder and claim it until the returned file is closed or the process ends.

    Raises:
        ConfigError: the folder cannot be written, or another process holds it.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"run.folder={folder} cannot be written ({error.strerror}); choose another run.folder"
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise ConfigError(
            f"run.folder={folder} is in use by {file.read().strip() or 'another process'}; "
            "two runs cannot share a folder; choose another run.name, or stop that run"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
