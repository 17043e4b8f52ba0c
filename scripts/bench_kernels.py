"""Measure every op beside its other implementations, forward and backward: bench_kernels.py OUT.md. See --help.

All are measured in one run and in turns, on the same random data, with the caches flushed before each call: the median
of the device's own time, with the 20th and 80th percentile. Rates are told as part of what this device was measured to
copy, or to multiply when it does so for seconds on end. One that cannot run is a row of the table that says why.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from shardwright.kernels.measured import gpu_name
from shardwright.kernels.op import KernelError, Situation
from shardwright.kernels.triton.config import new_choices
from shardwright.scripts.bench_kernels_cases import Case, Load, cases
from shardwright.scripts.bench_kernels_page import write_page
from shardwright.scripts.bench_kernels_tables import Tables
from shardwright.scripts.bench_kernels_timing import Stopwatch, ceilings, host_microseconds

PACKAGES = ("torch", "triton", "liger-kernel", "quack-kernels", "flash-attn-4")


def passes(function: Callable[..., Any], inputs: list[Any]) -> dict[str, Callable[[], object]]:
    """Return what to measure of an implementation, by direction: `both` for those whose backward can run once."""
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    outputs = _listed(function(*inputs))
    gradients = [torch.randn_like(out) for out in outputs] if wanted else None
    return {
        "forward": lambda: function(*inputs),
        "backward": lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True),
        "both": lambda: torch.autograd.grad(_listed(function(*inputs)), wanted, gradients),
    }


def _listed(outputs: Any) -> list[torch.Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def ready(
    case: Case, function: Callable[..., Any], stopwatch: Stopwatch, tables: Tables | None
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what to measure of an implementation once it has run, and is tuned if there are tables to keep that."""
    torch.manual_seed(0)  # of each its own copy of the same inputs, as some write over them
    with new_choices() as choices:
        found = passes(function, case.inputs(stopwatch.device))
    for direction in case.work:
        with new_choices() as more:
            found[direction]()
        if tables is not None:
            tables.tune([*choices, *more], found[direction], stopwatch)
        choices = []
        yield direction, found[direction]


def measure(case: Case, names: str, stopwatch: Stopwatch, tables: Tables | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of one case: implementation, direction, timing, or why there is none.

    Args:
        case: what to measure.
        names: a regular expression for implementations.
        stopwatch: measures.
        tables: of what is fastest, or None if nothing is to be tuned.
    """
    device = stopwatch.device
    functions: dict[str, dict[str, Callable[[], object]]] = {direction: {} for direction in case.work}
    for name, load in _implementations(case, device).items():
        if not re.search(names, name):
            continue
        try:
            for direction, function in ready(case, load(), stopwatch, tables):
                functions[direction][name] = function
        except Exception as error:  # one that cannot run is a row of the table, not a failure
            yield {"case": case.label, "name": name, "refused": reason(error)}
    for direction, by_name in functions.items():
        for name, timing in stopwatch.time(by_name).items():
            row = {"case": case.label, "name": name, "direction": direction}
            if isinstance(timing, Exception):
                yield row | {"refused": reason(timing)}
                continue
            host = host_microseconds(by_name[name], device)
            yield row | {"ms": asdict(timing), "host_us": host} | case.rate(direction, timing.median)


def _implementations(case: Case, device: torch.device) -> dict[str, Load]:
    return case.implementations(Situation(device=device.type, dtype=case.dtype, sizes=case.sizes))


def reason(error: Exception) -> str:
    """Return why an implementation cannot run, in one line."""
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, KernelError):
        return text[:120]
    kind = "not installed" if isinstance(error, ImportError) else type(error).__name__
    return f"{kind}: {text}"[:120] if text else kind


def compile_ahead(chosen: list[Case], args: argparse.Namespace, device: torch.device) -> None:
    """Run the cases once each, several at a time, so that compilers will find on disk what they take long for."""
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        # Failures show when it counts.
        wait([pool.submit(_run_once, case.label, args.implementations, device, args.write_table) for case in chosen])


def _run_once(label: str, names: str, device: torch.device, tuned: bool) -> None:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # there are processes enough
    case = next(case for case in cases(small=device.type != "cuda") if case.label == label)
    for _ in measure(case, names, Stopwatch(device, 1), Tables(gpu_name(device)) if tuned else None):
        pass
    _tidy(device)


def _tidy(device: torch.device) -> None:
    torch.compiler.reset()  # it keeps few variants of a function
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe(device: torch.device, seconds: float) -> dict[str, Any]:
    """Return where and with what is measured, and the ceilings."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "python": platform.python_version(),
        "ptxas": os.environ.get("TRITON_PTXAS_PATH", "Triton's own").rpartition("/")[2],
        **{name: _version(name) for name in PACKAGES},
        **ceilings(device, seconds),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure every op beside its other implementations.")
    parser.add_argument("output", type=Path, help="page to write, PAGE.md; raw figures go to PAGE.json, and PAGE-*.png")
    parser.add_argument("--only", default="", help="regular expression that a case's label must match")
    parser.add_argument("--implementations", default="", help="the same for the names of implementations")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu: tiny cases")
    parser.add_argument("--calls", type=int, default=50, help="timed calls of each implementation")
    parser.add_argument("--write-table", action="store_true", help="keep what is fastest for this kind of GPU")
    parser.add_argument("--seconds", type=float, default=10, help="for which each ceiling is kept up")
    parser.add_argument("--processes", type=int, default=0, help="compile everything first, in so many at once")
    args = parser.parse_args()
    device = torch.device(args.device)
    chosen = [case for case in cases(small=device.type != "cuda") if re.search(args.only, case.label)]
    if not chosen:
        parser.error(f"--only {args.only} matches no case")
    names = {name for case in chosen for name in _implementations(case, device)}
    if not any(re.search(args.implementations, name) for name in names):
        parser.error(f"--implementations {args.implementations} matches none of {', '.join(sorted(names))}")
    if args.processes:
        compile_ahead(chosen, args, device)
    run(chosen, args, device)


def run(chosen: list[Case], args: argparse.Namespace, device: torch.device) -> None:
    """Measure the cases one after the other, and write what there is after each."""
    about, rows = describe(device, args.seconds), []
    stopwatch, tables = Stopwatch(device, args.calls), Tables(gpu_name(device)) if args.write_table else None
    for case in chosen:
        place = {"op": case.op.name, "family": case.family, "length": case.length, "sizes": dict(case.sizes)}
        lossy = {candidate.name for candidate in case.op.candidates if candidate.lossy}
        for row in measure(case, args.implementations, stopwatch, tables):
            rows.append(row | place | {"peer": row["name"] in case.peers, "lossy": row["name"] in lossy})
            print(json.dumps(rows[-1]), flush=True)
        _tidy(device)
        write_page(args.output, about, rows)
        if tables is not None:
            tables.rank(rows)
            tables.write()
    write_page(args.output, about, rows, drawn=True)


if __name__ == "__main__":
    main()
