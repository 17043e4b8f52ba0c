"""How the kernel benchmark takes times: on the device, with cold caches, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

import torch

FLUSHED_BYTES = 2**28  # more than any second-level cache holds
WARMUP_CALLS = 3
HOST_CALLS = 20
QUEUED_CYCLES = 2_000_000  # of the device, about a millisecond: more than the host takes for a call


@dataclass(frozen=True)
class Timing:
    """Milliseconds of the calls of one implementation: median, 20th and 80th percentile."""

    median: float
    low: float
    high: float


class Stopwatch:
    """Times calls, each with cold caches.

    Args:
        device: where they run.
        num_calls: of each function.
    """

    def __init__(self, device: torch.device, num_calls: int) -> None:
        self.device, self.num_calls = device, num_calls
        self._flushed = torch.empty(FLUSHED_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)

    def time(self, functions: dict[str, Callable[[], object]]) -> dict[str, Timing | Exception]:
        """Return the timing of every function, or what it raised; they take turns."""
        milliseconds: dict[str, list[float]] = {name: [] for name in functions}
        failed: dict[str, Exception] = {}
        for number in range(WARMUP_CALLS + self.num_calls):
            for name in [name for name in functions if name not in failed]:
                try:
                    seconds = self._once(functions[name])
                except Exception as error:
                    failed[name] = error
                    continue
                if number >= WARMUP_CALLS:
                    milliseconds[name].append(1e3 * seconds)
        return {name: failed.get(name) or Timing(median(v), *_spread(v)) for name, v in milliseconds.items()}

    def _once(self, function: Callable[[], object]) -> float:
        self._flushed.zero_()
        if self.device.type != "cuda":
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(QUEUED_CYCLES)  # so that all launches are queued when the clock starts
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def _spread(values: list[float]) -> tuple[float, float]:
    fifths = quantiles(values, n=5) if len(values) > 1 else values * 4
    return fifths[0], fifths[-1]


def ceilings(device: torch.device, seconds: float) -> dict[str, float]:
    """Return GB/s of a large copy (read and written), and TFLOP/s of bf16 products, each kept up for some seconds."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    width = 8192 if device.type == "cuda" else 256
    x, y = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {
        "copy GB/s": 2 * size / _sustained(lambda: target.copy_(source), device, seconds) / 1e9,
        "product TFLOP/s": 2 * width**3 / _sustained(lambda: torch.mm(x, y), device, seconds) / 1e12,
    }


def _sustained(function: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the seconds of a call in the second half of the time."""
    middle, count = None, 0
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds or not count:
        if passed >= seconds / 2 and middle is None:
            middle, count = passed, 0
        for _ in range(10):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 10
    return (time.perf_counter() - start - (middle or 0)) / count


def host_microseconds(function: Callable[[], object], device: torch.device) -> float:
    """Return what a call costs the host, while the device is busy with something else."""
    num_calls = 1
    if device.type == "cuda":
        num_calls = HOST_CALLS
        torch.cuda.synchronize(device)
        torch.cuda._sleep(100_000_000)
    start = time.perf_counter()
    for _ in range(num_calls):
        function()
    taken = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e6 * taken / num_calls
