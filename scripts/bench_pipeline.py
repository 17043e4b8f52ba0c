"""Measure one step of a pipeline beside its simulation: torchrun ... bench_pipeline.py OUT_FOLDER [KEY=VALUE ...]."""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from shardwright.conf.load import load_config, to_dict
from shardwright.observe.log import configure_logging
from shardwright.parallel.pipeline.schedule import Action, Schedule
from shardwright.parallel.pipeline.timeline import Costs, Span, Timeline, draw, simulate, write_trace
from shardwright.trainer.build import Run, build
from shardwright.trainer.native import NativeEngine

WARMUP_STEPS = 4


class Clock:
    """Notes when this rank's actions start and end, on the device where there is one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moments: list[tuple[Action, Any, Any]] = []
        self.begin = self.now()

    def now(self) -> Any:
        """Return this moment: an event in the device's stream, or seconds."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def observe(self, action: Action) -> Iterator[None]:
        """Note an action's start and end."""
        start = self.now()
        yield
        self.moments.append((action, start, self.now()))

    def spans(self, rank: int) -> list[Span]:
        """Return the actions in seconds since the clock was made. Call when the device is idle."""
        return [Span(rank, action, self._seconds(start), self._seconds(end)) for action, start, end in self.moments]

    def _seconds(self, moment: Any) -> float:
        return self.begin.elapsed_time(moment) / 1e3 if self.device.type == "cuda" else moment - self.begin


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure one pipeline step beside its simulation.")
    parser.add_argument("out", type=Path, help="folder for timeline.png, timeline.json and traces")
    parser.add_argument("overrides", nargs="*", help="settings, with parallel.pipeline and parallel.pipeline_schedule")
    args = parser.parse_args()
    config = load_config([*args.overrides, "checkpoint.every_steps=null", "observe.wandb=disabled"])
    run = build(config, to_dict(config))
    configure_logging(run.world.rank, run.world.num_processes)
    with run.cleanup:
        measured = measure_step(run)
        if run.world.rank == 0:
            report(run, measured, args.out)


def measure_step(run: Run) -> Timeline:
    """Warm up, run one observed step, and return the timeline of the pipeline that rank 0 belongs to."""
    engine, device = run.engine, run.world.device
    assert isinstance(engine, NativeEngine)
    for _ in range(WARMUP_STEPS):
        engine.read(engine.train_step(next(run.loader), lr=1e-4))
    batches = next(run.loader)
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = Clock(device)
    executor = engine.model.executor
    executor.observe = clock.observe
    engine.read(engine.train_step(batches, lr=1e-4))
    gathered: list[Any] = [None] * run.world.num_processes
    place = dist.get_process_group_ranks(engine.mesh.get_group("pipeline"))
    dist.all_gather_object(gathered, clock.spans(engine.mesh.coordinate("pipeline")))
    spans = sorted((span for rank in place for span in gathered[rank]), key=lambda span: (span.start, span.rank))
    first = spans[0].start
    moved = tuple(Span(s.rank, s.action, s.start - first, s.end - first) for s in spans)
    return Timeline(spans=moved, num_ranks=len(place))


def costs_of(timeline: Timeline, schedule: Schedule) -> Costs:
    """Return the mean duration of each stage's actions; half of a whole backward counts as either part."""
    durations: dict[tuple[int, str], list[float]] = defaultdict(list)
    for span in timeline.spans:
        parts = "IW" if span.action.kind == "B" else span.action.kind
        for part in parts:
            durations[span.action.stage, part].append((span.end - span.start) / len(parts))
    means = {key: sum(values) / len(values) for key, values in durations.items()}
    forward, inputs, weights = ([means[stage, kind] for stage in range(schedule.num_stages)] for kind in "FIW")
    return Costs(forward=forward, backward_input=inputs, backward_weight=weights)


def report(run: Run, measured: Timeline, out: Path) -> None:
    """Simulate with the measured durations, print both, write picture, traces and figures."""
    assert isinstance(run.engine, NativeEngine)
    schedule = run.engine.model.executor.schedule
    simulated = simulate(schedule, costs_of(measured, schedule))
    timelines = {f"{schedule.name}, measured": measured, f"{schedule.name}, simulated": simulated}
    out.mkdir(parents=True, exist_ok=True)
    draw(timelines, out / "timeline.png")
    table = Table(title=f"{schedule.name}: {schedule.num_microbatches} microbatches on {schedule.num_ranks} ranks")
    for column in ("timeline", "seconds", "bubble"):
        table.add_column(column)
    figures = {}
    for name, timeline in timelines.items():
        write_trace(timeline, out / f"{name.split()[-1]}.trace.json")
        figures[name] = {"seconds": timeline.total_seconds, "bubble_fraction": timeline.bubble_fraction}
        table.add_row(name, f"{timeline.total_seconds:.4f}", f"{timeline.bubble_fraction:.1%}")
    order = {rank: [str(s.action) for s in measured.spans if s.rank == rank] for rank in range(schedule.num_ranks)}
    (out / "timeline.json").write_text(json.dumps({"figures": figures, "order": order, "torch": torch.__version__}))
    Console().print(table)


if __name__ == "__main__":
    main()
