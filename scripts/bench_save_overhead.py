"""Measure what saves cost a training run: [torchrun ...] bench_save_overhead.py OUT.json [KEY=VALUE ...].

One run trains in rounds of `--steps` steps, by turns without and with a save at the begin, so that both kinds see the
same machine. A round's time is all of it: steps, the begin of the save, and what the save behind takes from training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from shardwright.checkpoint import Pending
from shardwright.conf.load import load_config, to_dict
from shardwright.observe.hardware import device_name
from shardwright.observe.log import configure_logging
from shardwright.trainer.build import Run, build
from shardwright.trainer.saves import Saves

WARMUP_STEPS = 5


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure what saves cost a training run.")
    parser.add_argument("out", type=Path, help="JSON file for the figures")
    parser.add_argument("overrides", nargs="*", help="settings, as for train.py")
    parser.add_argument("--steps", type=int, default=10, help="of a round, and so from one save to the next")
    parser.add_argument("--rounds", type=int, default=3, help="of each kind")
    args = parser.parse_args()
    config = load_config([*args.overrides, "observe.wandb=disabled", "checkpoint.keep=1"])
    run = build(config, to_dict(config))
    configure_logging(run.world.rank, run.world.num_processes)
    with run.cleanup:
        figures = measure(run, args.steps, args.rounds)
    if run.world.rank == 0:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
        report(figures)


def measure(run: Run, num_steps: int, num_rounds: int) -> dict[str, Any]:
    """Train, and return every round's seconds."""
    saves, saved = Saves(run.config.checkpoint, run.parts, run.memory, run.world.rank), []
    saves.prepare()
    train_round(run, saves, WARMUP_STEPS)
    rounds: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(num_rounds):
        rounds["without"].append(train_round(run, saves, num_steps))
        rounds["with"].append(train_round(run, saves, num_steps, begin=saved))
    for pending in saved:
        pending.wait()
    saves.close()
    return {
        "device": device_name(run.world.device),
        "processes": run.world.num_processes,
        "torch": torch.__version__,
        "steps_per_round": num_steps,
        "mode": run.config.checkpoint.mode,
        "round_seconds": rounds,
        "saves": [
            {"gib": p.num_bytes / 2**30, "staged_seconds": p.staged_seconds, "total_seconds": p.total_seconds}
            for p in saved
        ],
    }


def train_round(run: Run, saves: Saves, num_steps: int, begin: list[Pending] | None = None) -> float:
    """Train some steps, each read as a run that reports every step does; return seconds."""
    start = time.perf_counter()
    for step in range(num_steps):
        batches = next(run.loader)
        result = run.engine.train_step(batches, lr=1e-4, before_update=saves.wait_staged)
        run.progress.step += 1
        run.engine.read(result)
        if step == 0 and begin is not None:
            saves.begin(run.progress.step)
            assert saves.pending is not None
            begin.append(saves.pending)
    return time.perf_counter() - start


def report(figures: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("round", "seconds without a save", "seconds with one", "ratio", "copied after", "complete after")
    pairs = zip(*figures["round_seconds"].values(), figures["saves"], strict=True)
    for number, (without, with_save, save) in enumerate(pairs):
        seconds = [f"{save[key]:.2f} s" for key in ("staged_seconds", "total_seconds")]
        table.add_row(str(number), f"{without:.3f}", f"{with_save:.3f}", f"{with_save / without:.4f}", *seconds)
    console = Console()
    console.print(table)
    medians = [statistics.median(seconds) for seconds in figures["round_seconds"].values()]
    console.print(f"a save every {figures['steps_per_round']} steps costs {medians[1] / medians[0] - 1:+.2%} (medians)")


if __name__ == "__main__":
    main()
