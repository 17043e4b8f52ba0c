"""What the kernel benchmark keeps for `auto`: the table of a kind of GPU, see `shardwright.kernels.measured`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from shardwright.kernels import KernelError, Kernels
from shardwright.kernels.measured import file_name, measured
from shardwright.kernels.triton.config import Choice, Config
from shardwright.scripts.bench_kernels_timing import Stopwatch, Timing

FOLDER = Path(__file__).resolve().parents[1] / "kernels" / "tables"


class Tables:
    """The table of one kind of GPU, brought up to date by what is measured.

    Args:
        gpu: what the GPU calls itself.
    """

    def __init__(self, gpu: str | None) -> None:
        self.gpu = gpu or "none"
        self._table: dict[str, Any] = json.loads(json.dumps(measured(gpu)))

    def tune(self, choices: Iterable[Choice], function: Callable[[], object], stopwatch: Stopwatch) -> None:
        """Launch kernels in all of their configurations, one kernel after the other, and settle on the fastest."""
        for choice in choices:
            calls: dict[str, Callable[[], object]] = {
                str(index): partial(_call, choice, config, function) for index, config in enumerate(choice.configs)
            }
            timings = {index: timing for index, timing in stopwatch.time(calls).items() if isinstance(timing, Timing)}
            if not timings:
                raise KernelError(f"no configuration of {choice.kernel} runs here")
            choice.config = choice.configs[int(min(timings, key=lambda index: timings[index].median))]
            self._table["configs"].setdefault(choice.kernel, {})[choice.key] = choice.config.arguments

    def rank(self, rows: list[dict[str, Any]]) -> None:
        """Put the implementations of every op in order: by the mean of their time relative to the best of each row.

        Those that were not measured stay in their former order, after the others.
        """
        for op in {row["op"] for row in rows} & {field.name for field in fields(Kernels)}:
            ratios: Mapping[str, list[float]] = defaultdict(list)
            timed = [row for row in rows if row["op"] == op and "ms" in row and not row["peer"]]
            for case in {(row["case"], row["direction"]) for row in timed}:
                same = {r["name"]: r["ms"]["median"] for r in timed if (r["case"], r["direction"]) == case}
                for name, milliseconds in same.items():
                    ratios[name].append(milliseconds / min(same.values()))
            order = sorted(ratios, key=lambda name: geometric_mean(ratios[name]))
            former = self._table["order"].get(op, [])
            self._table["order"][op] = order + [name for name in former if name not in ratios]

    def write(self) -> None:
        """Write the file."""
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / file_name(self.gpu)).write_text(json.dumps(self._table, indent=1, sort_keys=True) + "\n")


def _call(choice: Choice, config: Config, function: Callable[[], object]) -> None:
    choice.config = config
    function()
