"""What is reported of a step, and the meter that measures it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One logged step. Rates and seconds are means over the steps since the last record."""

    step: int
    tokens: int
    loss: float
    grad_norm: float
    lr: float
    tokens_per_second_per_gpu: float
    step_seconds: float
    data_wait_seconds: float
    memory_gib: float
    mfu_full: float | None
    mfu_causal: float | None
    skipped_steps: int
    eta_seconds: float


class Meter:
    """Wall-clock time since the last reading, and the part of it that was spent waiting for data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin a new interval."""
        self._began, self._waited, self._steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data, and one step."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began
        self._steps += 1

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Do not count the time inside (evaluation, checkpoints)."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def read(self) -> tuple[float, float]:
        """Return (seconds, seconds waited for data) per step since the last reading, and begin anew.

        The caller has waited for the device before, so that its work is in.
        """
        seconds, waited, steps = time.perf_counter() - self._began, self._waited, max(self._steps, 1)
        self.reset()
        return seconds / steps, waited / steps
