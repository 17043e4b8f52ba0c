"""Measure every op beside its other implementations, forward and backward: bench_kernels.py OUT.md. See --help.

All are measured in one run and in turns, on the same random data, with the caches flushed before each call: the median
of the device's own time, with the 20th and 80th percentile. Rates are told as part of what this device was measured to
copy, or to multiply when it does so for seconds on end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from shardwright.kernels.op import Situation
from shardwright.scripts.bench_kernels_cases import Case, cases

FLUSHED_BYTES = 2**28  # more than any second-level cache holds
WARMUP_CALLS = 3


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

    def time(self, functions: dict[str, Callable[[], object]]) -> dict[str, Timing]:
        """Return the timing of every function; they take turns."""
        milliseconds: dict[str, list[float]] = {name: [] for name in functions}
        for number in range(WARMUP_CALLS + self.num_calls):
            for name, function in functions.items():
                seconds = self._once(function)
                if number >= WARMUP_CALLS:
                    milliseconds[name].append(1e3 * seconds)
        return {name: Timing(median(values), *_spread(values)) for name, values in milliseconds.items()}

    def _once(self, function: Callable[[], object]) -> float:
        self._flushed.zero_()
        if self.device.type != "cuda":
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000)  # so that launches are queued when the clock starts
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
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda._sleep(100_000_000)
    start = time.perf_counter()
    for _ in range(20):
        function()
    taken = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e6 * taken / 20


def measure(case: Case, device: torch.device, num_calls: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of one case: implementation, direction, timing, or why there is none."""
    situation = Situation(device=device.type, dtype=case.dtype, sizes=case.sizes)
    inputs = case.inputs(device)
    forward, backward = {}, {}
    for name, function, refusal in case.implementations(situation):
        try:
            if refusal is not None:
                raise RuntimeError(refusal)
            out = function(*inputs)
            gradient = torch.randn_like(out)
            wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
            torch.autograd.grad(out, wanted, gradient, retain_graph=True)
        except Exception as error:  # one that cannot run is a row of the table, not a failure
            yield {"case": case.label, "name": name, "refused": str(error).splitlines()[0][:120]}
            continue
        forward[name] = lambda function=function: function(*inputs)
        backward[name] = lambda out=out, gradient=gradient, wanted=wanted: torch.autograd.grad(
            out, wanted, gradient, retain_graph=True
        )
    stopwatch = Stopwatch(device, num_calls)
    for direction, functions in (("forward", forward), ("backward", backward)):
        for name, timing in stopwatch.time(functions).items():
            host = host_microseconds(functions[name], device)
            row = {"case": case.label, "name": name, "direction": direction, "ms": asdict(timing), "host_us": host}
            yield row | case.rate(direction, timing.median)


def page(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the figures as Markdown."""
    lines = [f"# Kernels on {about['device']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()] + [""]
    lines += ["| case | direction | implementation | ms (20 % to 80 %) | rate | of the ceiling | host us |"]
    lines += ["|---|---|---|--:|--:|--:|--:|"]
    for row in rows:
        if "refused" in row:
            lines.append(f"| {row['case']} | - | {row['name']} | - | {row['refused']} | - | - |")
            continue
        ms, ceiling = row["ms"], about[row["unit"]]
        lines.append(
            f"| {row['case']} | {row['direction']} | {row['name']} | {ms['median']:.3f} ({ms['low']:.3f} to "
            f"{ms['high']:.3f}) | {row['rate']:.0f} {row['unit'].split()[-1]} | {row['rate'] / ceiling:.0%} | "
            f"{row['host_us']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure every op beside its other implementations.")
    parser.add_argument("output", type=Path, help="page to write, PAGE.md; the raw figures go to PAGE.json")
    parser.add_argument("--only", default="", help="regular expression that a case's label must match")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calls", type=int, default=50, help="timed calls of each implementation")
    parser.add_argument("--seconds", type=float, default=10, help="for which each ceiling is kept up")
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    about = {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ptxas": os.environ.get("TRITON_PTXAS_PATH", "Triton's own").rpartition("/")[2],
        **ceilings(device, args.seconds),
    }
    rows: list[dict[str, Any]] = []
    for case in cases(small=not on_gpu):
        if re.search(args.only, case.label):
            for row in measure(case, device, args.calls):
                rows.append(row)
                print(json.dumps(row), flush=True)
            if on_gpu:
                torch.cuda.empty_cache()
            args.output.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
            args.output.write_text(page(about, rows))
    if not rows:
        parser.error(f"--only {args.only} matches no case")


if __name__ == "__main__":
    main()
