"""The checkpoints that a run makes while it trains."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

from shardwright import checkpoint
from shardwright.checkpoint import CheckpointError, Pending, SaveOptions, Stateful
from shardwright.conf.schema import CheckpointConfig

logger = logging.getLogger(__name__)


class Saves:
    """Begins saves, and looks after them until they are complete.

    A save that fails is logged and training goes on, as the next may succeed; the last one's failure ends the run.

    Args:
        config: when to keep what, and how.
        parts: what to save.
        cleans: whether this process deletes old checkpoints; one must.
    """

    def __init__(self, config: CheckpointConfig, parts: Mapping[str, Stateful], *, cleans: bool) -> None:
        self._config, self._parts, self._cleans = config, parts, cleans
        self._options = SaveOptions(
            memory_gib=config.memory_gib, timeout_seconds=config.timeout_seconds, unfinished=config.unfinished
        )
        self._pending: Pending | None = None
        self._failure: CheckpointError | None = None
        self._cleaning: threading.Thread | None = None

    def begin(self, step: int) -> None:
        """Begin to save the state after a step (collective)."""
        if self._config.unfinished == "wait":
            self._conclude()
        self._join_cleaning()
        path = checkpoint.step_folder(self._config.folder, step)
        before, self._failure = self._pending, None
        try:
            self._pending = checkpoint.save(path, self._parts, mode=self._config.mode, options=self._options)
        except CheckpointError as error:
            self._pending, self._failure = None, error
            logger.error(f"step {step} is not saved, training goes on: {error}")
        if before is not None:
            self._report(before)
        self.look()

    def wait_staged(self) -> None:
        """Wait until the state may change."""
        if self._pending is not None:
            self._pending.wait_staged()

    def look(self) -> None:
        """Report a save that has ended (local)."""
        if self._pending is not None and self._pending.done():
            self._conclude()

    def close(self) -> None:
        """Wait for the last save.

        Raises:
            CheckpointError: it failed.
        """
        self._conclude()
        self._join_cleaning()
        if self._failure is not None:
            raise self._failure

    def _conclude(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._failure = self._report(pending)

    def _report(self, pending: Pending) -> CheckpointError | None:
        try:
            pending.wait()
        except checkpoint.Superseded as error:
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
        if self._cleans:
            self._join_cleaning()
            self._cleaning = threading.Thread(target=self._clean, name="checkpoint-clean")
            self._cleaning.start()
        return None

    def _clean(self) -> None:
        try:
            checkpoint.retain(self._config.folder, self._config.keep, self._config.keep_every_steps)
        except (CheckpointError, OSError) as error:
            logger.warning(f"old checkpoints in {self._config.folder} are not deleted: {error}")

    def _join_cleaning(self) -> None:
        if self._cleaning is not None:
            self._cleaning.join()
            self._cleaning = None
