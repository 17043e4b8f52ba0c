"""The checkpoints that a run makes while it trains."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch.distributed as dist

from shardwright import checkpoint
from shardwright.checkpoint import CheckpointError, HostMemory, Pending, SaveOptions, Stateful
from shardwright.conf.schema import CheckpointConfig
from shardwright.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


class Saves:
    """Begins saves, and looks after them until they are complete.

    A save that fails is logged and training goes on, as the next may succeed; the last one's failure ends the run.

    Args:
        config: when to keep what, and how.
        parts: what to save.
        memory: of the hosts, if the state is kept there too.
        rank: of this process; rank 0 deletes old checkpoints, and the first one of a host those in its memory.

    Attributes:
        pending: the save under way.
    """

    def __init__(
        self, config: CheckpointConfig, parts: Mapping[str, Stateful], memory: HostMemory | None, rank: int
    ) -> None:
        self._config, self._parts, self._memory, self._rank = config, parts, memory, rank
        self._options = SaveOptions(
            memory_gib=config.memory_gib, timeout_seconds=config.timeout_seconds, unfinished=config.unfinished
        )
        self.pending: Pending | None = None
        self._step_on_disk: int | None = None
        self._failure: CheckpointError | None = None
        self._cleaning: threading.Thread | None = None

    def prepare(self) -> None:
        """Plan the first save and allocate its memory behind training (collective)."""
        if self._config.mode != "sync":
            checkpoint.prepare(self._config.folder, self._parts, options=self._options)

    def begin(self, step: int, *, in_memory: bool = False) -> None:
        """Begin to save the state after a step (collective)."""
        if self._config.unfinished == "wait":
            self._conclude()
        self._join_cleaning()
        path = checkpoint.step_folder(self._config.folder, step)
        if in_memory:
            assert self._memory is not None
            path = self._memory.child(checkpoint.step_folder("", step).lstrip("/"))
        else:
            self._step_on_disk = step
        before, self._failure = self.pending, None
        try:
            self.pending = checkpoint.save(path, self._parts, mode=self._config.mode, options=self._options)
        except CheckpointError as error:
            self.pending, self._failure = None, error
            logger.error(f"step {step} is not saved, training goes on: {error}")
        if before is not None:
            self._report(before)
        self.look()

    def wait_staged(self) -> None:
        """Wait until the state may change."""
        if self.pending is not None:
            self.pending.wait_staged()

    def look(self) -> None:
        """Report a save that has ended (local)."""
        if self.pending is not None and self.pending.done():
            self._conclude()

    def close(self) -> None:
        """Wait for the last save, then free the memory of the hosts.

        Raises:
            CheckpointError: it failed.
        """
        self._conclude()
        self._join_cleaning()
        if self._failure is not None:
            raise self._failure
        if self._memory is not None and self._memory.is_first(self._rank):
            self._memory.remove_folder()

    def _conclude(self) -> None:
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self._failure = self._report(pending)
            if self._failure is None:  # and none is under way, whose files would go
                self._join_cleaning()
                self._cleaning = threading.Thread(target=self._clean, name="checkpoint-clean", daemon=True)
                self._cleaning.start()

    def _report(self, pending: Pending) -> CheckpointError | None:
        try:
            pending.wait()
        except checkpoint.SupersededError as error:
            logger.warning(str(error))
            return None
        except CheckpointError as error:
            logger.error(f"a save failed, training goes on: {error}")
            return error
        logger.info(
            f"saved {pending.path}: {pending.num_bytes / 2**30:.2f} GiB by this process, copied in "
            f"{pending.staged_seconds:.2f} s, complete after {pending.total_seconds:.2f} s, "
            f"plan {'reused' if pending.plan_reused else 'made'}"
        )
        return None

    def _clean(self) -> None:
        config, memory = self._config, self._memory
        try:
            if self._rank == 0 and self._step_on_disk is not None:
                checkpoint.retain(config.folder, config.keep, config.keep_every_steps, newest=self._step_on_disk)
            if memory is not None and memory.is_first(self._rank):
                checkpoint.retain(memory, keep=1)
        except (CheckpointError, OSError) as error:
            logger.warning(f"old checkpoints are not deleted: {error}")

    def _join_cleaning(self) -> None:
        if self._cleaning is not None:
            self._cleaning.join()
            self._cleaning = None


def open_memory(config: CheckpointConfig, run_folder: str, mesh: Mesh) -> HostMemory | None:
    """Return where the hosts keep the state of this run, if they are to (collective)."""
    if config.memory_every_steps is None:
        return None
    size = dist.get_world_size()
    hosts: list[str] = [""] * size
    dist.all_gather_object(hosts, socket.gethostname())
    token = [_run_token(Path(run_folder)) if mesh.rank == 0 else ""]
    dist.broadcast_object_list(token)
    coordinates = np.stack(np.unravel_index(np.arange(size), tuple(mesh.degrees.values())), axis=1)
    shift = checkpoint.choose_shift(hosts, coordinates)
    folder = Path(config.memory_folder) / hosts[mesh.rank] / token[0]
    copies = f"each part also on another host, that of rank r + {shift}" if shift else "on this one host only"
    logger.info(f"every {config.memory_every_steps} steps the state is kept in {folder}, {copies}")
    return HostMemory(folder, hosts, shift)


def _run_token(run_folder: Path) -> str:
    """Return a name that this run folder alone has: one that is made anew does not find the memory of the old one."""
    path = run_folder / ".token"
    if not path.exists():
        path.write_text(secrets.token_hex(8), "utf-8")
    return path.read_text("utf-8")
