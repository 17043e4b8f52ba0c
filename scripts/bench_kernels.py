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
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from shardwright.kernels.measured import gpu_name
from shardwright.kernels.op import Situation
from shardwright.kernels.triton.config import new_choices
from shardwright.scripts.bench_kernels_cases import Case, cases
from shardwright.scripts.bench_kernels_tables import Tables
from shardwright.scripts.bench_kernels_timing import Stopwatch, ceilings, host_microseconds


def passes(function: Callable[..., torch.Tensor], inputs: list[Any]) -> dict[str, Callable[[], object]]:
    """Return what to measure of an implementation, by direction: `both` for those whose backward can run once."""
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    out = function(*inputs)
    gradient = torch.randn_like(out) if wanted else None
    return {
        "forward": lambda: function(*inputs),
        "backward": lambda: torch.autograd.grad(out, wanted, gradient, retain_graph=True),
        "both": lambda: torch.autograd.grad(function(*inputs), wanted, gradient),
    }


def measure(case: Case, stopwatch: Stopwatch, tables: Tables | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of one case: implementation, direction, timing, or why there is none."""
    device = stopwatch.device
    situation = Situation(device=device.type, dtype=case.dtype, sizes=case.sizes)
    inputs = case.inputs(device)
    functions: dict[str, dict[str, Callable[[], object]]] = {direction: {} for direction in case.work}
    for name, function, refusal in case.implementations(situation):
        try:
            if refusal is not None:
                raise RuntimeError(refusal)
            with new_choices() as choices:
                found = passes(function, inputs)
            for direction in case.work:
                with new_choices() as more:
                    found[direction]()
                if tables is not None:
                    tables.tune([*choices, *more], found[direction], stopwatch)
                functions[direction][name], choices = found[direction], []
        except Exception as error:  # one that cannot run is a row of the table, not a failure
            yield {"case": case.label, "name": name, "refused": str(error).splitlines()[0][:120]}
    for direction, by_name in functions.items():
        for name, timing in stopwatch.time(by_name).items():
            host = host_microseconds(by_name[name], device)
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
    parser.add_argument("--write-table", action="store_true", help="keep what is fastest for this kind of GPU")
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
    stopwatch, tables = Stopwatch(device, args.calls), Tables(gpu_name(device)) if args.write_table else None
    for case in cases(small=not on_gpu):
        if re.search(args.only, case.label):
            for row in measure(case, stopwatch, tables):
                rows.append(row | {"op": case.op.name, "peer": row["name"] in case.peers})
                print(json.dumps(row), flush=True)
            if on_gpu:
                torch.cuda.empty_cache()
            args.output.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
            args.output.write_text(page(about, rows))
            if tables is not None:
                tables.rank(rows)
                tables.write()
    if not rows:
        parser.error(f"--only {args.only} matches no case")


if __name__ == "__main__":
    main()
