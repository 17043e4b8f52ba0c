"""Simulate a pipeline schedule: schedule.py KIND_OR_TABLE.yaml --ranks P --microbatches M [--png PNG] [--table]."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shardwright.conf.checks import CHUNKS
from shardwright.parallel.pipeline.schedule import Schedule, ScheduleError, load_schedule, make_schedule
from shardwright.parallel.pipeline.timeline import Costs, Timeline, draw, simulate, write_trace


def main() -> None:
    """Run the command."""
    parser = _parser()
    args = parser.parse_args()
    try:
        schedule = _schedule(args)
        timeline = simulate(schedule, _costs(args, schedule))
    except ScheduleError as error:
        parser.error(str(error))
    if args.table:
        print(schedule.to_yaml(), end="")
    else:
        _print_figures(schedule, timeline)
    if args.png:
        draw({schedule.name: timeline}, args.png)
    if args.trace:
        write_trace(timeline, args.trace)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Bubble, time and memory of a pipeline schedule, without running it.")
    parser.add_argument("schedule", help=f"one of {', '.join(CHUNKS)}, or a .yaml table")
    parser.add_argument("--ranks", type=int, required=True, help="pipeline ranks")
    parser.add_argument("--microbatches", type=int, required=True, help="microbatches of a step")
    parser.add_argument("--chunks", type=int, help="stages of a rank (default: the least that the schedule allows)")
    for name, what in (("forward", "forward"), ("input", "backward for the input"), ("weight", "for the weights")):
        parser.add_argument(f"--{name}", type=float, default=1, help=f"seconds of {what}: one microbatch, one rank")
    parser.add_argument("--transfer", type=float, default=0, help="seconds from rank to rank")
    parser.add_argument("--png", type=Path, help="picture to write")
    parser.add_argument("--trace", type=Path, help="trace to write, for ui.perfetto.dev")
    parser.add_argument("--table", action="store_true", help="print the actions per rank as a .yaml table instead")
    return parser


def _schedule(args: argparse.Namespace) -> Schedule:
    if args.schedule.endswith((".yaml", ".yml")):
        if args.chunks is not None:
            raise ScheduleError(f"--chunks {args.chunks} has no meaning for a table, which says its stages; drop it")
        return load_schedule(args.schedule, num_ranks=args.ranks, num_microbatches=args.microbatches)
    least, _ = CHUNKS.get(args.schedule, (1, 1))
    chunks = least if args.chunks is None else args.chunks
    return make_schedule(args.schedule, num_ranks=args.ranks, num_chunks=chunks, num_microbatches=args.microbatches)


def _costs(args: argparse.Namespace, schedule: Schedule) -> Costs:
    """Divide the model's time evenly over the stages, so that schedules with other numbers of chunks compare."""
    share = schedule.num_ranks / schedule.num_stages
    return Costs.uniform(
        schedule.num_stages,
        forward=args.forward * share,
        backward_input=args.input * share,
        backward_weight=args.weight * share,
        transfer=args.transfer,
    )


def _print_figures(schedule: Schedule, timeline: Timeline) -> None:
    table = Table(title=f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_microbatches} microbatches")
    table.add_column("figure")
    table.add_column("value")
    live = [count / len(schedule.stages_of(rank)) for rank, count in enumerate(timeline.peak_live)]
    table.add_row("total", f"{timeline.total_seconds:.4g} s")
    table.add_row("bubble", f"{timeline.bubble_fraction:.2%}")
    table.add_row("peak live per rank, (stage, microbatch) pairs", " ".join(map(str, timeline.peak_live)))
    table.add_row("the same in microbatches of a rank's share", " ".join(f"{count:g}" for count in live))
    Console().print(table)


if __name__ == "__main__":
    main()
