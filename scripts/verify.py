"""Compare any layout of any model with one process: verify.py [KEY=VALUE ...]. See --help."""

from __future__ import annotations

import argparse
import math
import os
import pickle
import random
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from shardwright.conf import ConfigError
from shardwright.conf.checks import CHUNKS
from shardwright.conf.load import load_config
from shardwright.conf.schema import TrainConfig
from shardwright.parallel.mesh import AXES, Mesh
from shardwright.parallel.world import World
from shardwright.scripts.train import REFUSED, refuse
from shardwright.trainer.verify import NUM_STEPS, TOLERANCE, Comparison, Report, Subject, verify

HELP = """Train a layout, and the plain model in one process, from the same weights on the same made-up data in float32,
and compare losses, gradient norms, every parameter's gradient and every weight. Status 0: alike, 1: not, 2: cannot run.

  verify.py model=llama_tiny parallel.tensor=2 parallel.pipeline=2
  verify.py --random 20 --processes 8 --seed 1

Takes every setting of train.py. Unless given, train.sequence_length is 64 and train.global_batch_sequences 12, or the
next more that the layout needs. The processes are started here, on the CPU; to use GPUs, start it with torchrun:

  torchrun --nproc-per-node 4 scripts/verify.py model=llama_tiny parallel.tensor=2 parallel.pipeline=2
"""
SIZES = "train.sequence_length={}", "train.global_batch_sequences={}"
DIVISIBLE = 720720  # by every small number
NUM_REDRAWS = 500
NUM_SHOWN = 5


def main() -> None:
    """Run the command."""
    args = _parse()
    try:
        passed = _verify_random(args) if args.random else _verify_one(args)
    except Exception as error:
        if _is_refusal(error):
            refuse(error)
        raise
    sys.exit(0 if passed else 1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of train.py")
    parser.add_argument("--steps", type=_positive, default=NUM_STEPS, help=f"steps to train (default {NUM_STEPS})")
    parser.add_argument("--processes", type=_positive, help="for parallel.shard=auto to fill (default: no more)")
    random_help = "verify K random layouts of --processes, and of random Llamas unless a model is given, instead"
    parser.add_argument("--random", type=_positive, metavar="K", help=f"{random_help}; KEY=VALUE hold for all")
    parser.add_argument("--seed", type=int, default=0, help="of the random layouts (default 0)")
    return parser.parse_intermixed_args()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def _is_refusal(error: BaseException) -> bool:
    return type(error).__module__.startswith("shardwright.")


def _verify_one(args: argparse.Namespace) -> bool:
    under_torchrun = "WORLD_SIZE" in os.environ
    processes = int(os.environ["WORLD_SIZE"]) if under_torchrun else args.processes
    overrides, mesh = _complete(args.overrides, processes)
    config = load_config([*overrides, "train.precision=fp32"])
    if under_torchrun:
        report = _run_here(config, args.steps)
    else:
        _refuse_gpu(config)
        Subject.of(config, num_processes=mesh.num_processes, rank=0, device=torch.device("cpu"))
        report = _run_forked(config, mesh.num_processes, args.steps)
    if int(os.environ.get("RANK", 0)) == 0:
        _show(report, f"{config.model.name} on {mesh}")
    return report.passed


def _complete(overrides: Sequence[str], processes: int | None) -> tuple[list[str], Mesh]:
    """Return the overrides with sizes that are small and fit the layout, and the mesh.

    Raises:
        ConfigError, TopologyError: the layout is impossible.
    """
    config = _load_any_size(overrides)
    degrees = {axis: getattr(config.parallel, axis) for axis in AXES}
    least = math.prod(degree for degree in degrees.values() if degree != "auto")
    mesh = Mesh.of(config.parallel, num_processes=processes or least, rank=0)
    length = math.lcm(2 * mesh.degrees["context"], mesh.degrees["context"] * mesh.degrees["tensor"])
    share = config.train.microbatch_sequences * mesh.data_degree
    num_microbatches = max(2, mesh.degrees["pipeline"] + 1, math.ceil(12 / share))
    sizes = length * math.ceil(64 / length), share * num_microbatches
    return [*(text.format(size) for text, size in zip(SIZES, sizes, strict=True)), *overrides], mesh


def _load_any_size(overrides: Sequence[str]) -> TrainConfig:
    """Load a layout with sizes that suit it, whatever they are; the error of the usual sizes if none do."""
    try:
        return load_config([SIZES[0].format(64), SIZES[1].format(12), *overrides])
    except ConfigError as error:
        try:
            return load_config([*(text.format(DIVISIBLE) for text in SIZES), *overrides])
        except ConfigError:
            raise error from None


def _refuse_gpu(config: TrainConfig) -> None:
    if config.train.device == "cuda":
        raise ConfigError(
            "train.device=cuda: processes that this command starts itself compute on the CPU; "
            "start it with torchrun --nproc-per-node, or drop train.device"
        )


def _run_here(config: TrainConfig, num_steps: int) -> Report:
    """Verify in processes that exist (collective)."""
    world = World.from_environment(config.train.device)
    world.start()
    try:
        return verify(config, world, num_steps=num_steps)
    finally:
        world.stop()


def _run_forked(config: TrainConfig, num_processes: int, num_steps: int) -> Report:
    """Verify in processes of its own, on the CPU; raise what one of them refused."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        outcome = Path(folder) / "outcome"
        try:
            start_processes(
                _work, (config, num_processes, num_steps, port, outcome), num_processes, start_method="fork"
            )
        except ProcessExitedException as error:
            if error.exit_code != REFUSED:
                raise
            raise pickle.loads(outcome.read_bytes()) from None
        return pickle.loads(outcome.read_bytes())


def _work(rank: int, config: TrainConfig, num_processes: int, num_steps: int, port: int, outcome: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_processes))
    world = World(rank=rank, num_processes=num_processes, device=torch.device("cpu"))
    world.start()
    try:
        report = verify(config, world, num_steps=num_steps)
    except Exception as error:
        if not _is_refusal(error):
            raise
        outcome.write_bytes(pickle.dumps(error))
        sys.exit(REFUSED)
    if rank == 0:
        outcome.write_bytes(pickle.dumps(report))
    world.stop()


def _verify_random(args: argparse.Namespace) -> bool:
    if "WORLD_SIZE" in os.environ or args.processes is None:
        raise ConfigError("--random starts its own processes; give their number as --processes, and no torchrun")
    rng, num_failed = random.Random(args.seed), 0
    for _ in range(args.random):
        overrides, config = _draw_valid(rng, args)
        started, report, trouble = time.monotonic(), None, ""
        try:
            report = _run_forked(config, args.processes, args.steps)
        except (ProcessRaisedException, ProcessExitedException) as error:
            trouble = str(error)
        except Exception as error:  # refused by the processes only, which is a fault: it should have been at once
            if not _is_refusal(error):
                raise
            trouble = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - started
        passed = report is not None and report.passed
        worst = f"{report.worst.difference:.1e}" if report is not None else "no result"
        print(f"{'pass' if passed else 'FAIL'}  {worst}  {seconds:5.1f} s  {shlex.join(overrides)}", flush=True)
        if not passed:
            num_failed += 1
            _show(report, "") if report is not None else print(trouble)
            print(f"  python scripts/verify.py --steps {args.steps} {shlex.join(overrides)}", flush=True)
    print(f"{args.random - num_failed} of {args.random} layouts pass")
    return not num_failed


def _draw_valid(rng: random.Random, args: argparse.Namespace) -> tuple[list[str], TrainConfig]:
    """Draw until a layout can run.

    Raises:
        ConfigError, TopologyError, PlanError, ScheduleError, KernelError: none of many can.
    """
    own_model = any(text.startswith(("model=", "plugins=")) for text in args.overrides)
    for attempt in range(NUM_REDRAWS):
        drawn = [*draw_layout(rng, args.processes), *(() if own_model else draw_model(rng)), *args.overrides]
        try:
            config = load_config([*drawn, "train.precision=fp32"])
            _refuse_gpu(config)
            Subject.of(config, num_processes=args.processes, rank=0, device=torch.device("cpu"))
        except Exception as error:
            if not _is_refusal(error) or attempt == NUM_REDRAWS - 1:
                raise
        else:
            return drawn, config
    raise AssertionError


def draw_layout(rng: random.Random, num_processes: int) -> list[str]:
    """Return overrides of a random layout for a number of processes; it may be impossible."""
    degrees = dict.fromkeys(AXES, 1)
    for prime in _primes(num_processes):
        degrees[rng.choice(AXES)] *= prime
    overrides = [f"parallel.{axis}={degree}" for axis, degree in degrees.items() if degree > 1 or axis == "shard"]
    if degrees["pipeline"] > 1:
        schedule, (least, most) = rng.choice(list(CHUNKS.items()))
        overrides.append(f"parallel.pipeline_schedule={schedule}")
        overrides.append(f"parallel.pipeline_chunks={rng.choice([least, min(least + 1, most)])}")
    if degrees["context"] > 1:
        overrides.append(f"parallel.context_mode={rng.choice(['ring', 'ulysses'])}")
    if degrees["tensor"] > 1:
        overrides.append(f"parallel.tensor_overlap={rng.choice(['none', 'chunked'])}")
    microbatch = rng.choice([1, 1, 2, 3])
    num_microbatches = rng.randint(1, 2 * degrees["pipeline"] + 1)
    batch = microbatch * degrees["replicate"] * degrees["shard"] * num_microbatches
    return [
        *overrides,
        f"parallel.zero={rng.choice(['auto', 2] if degrees['pipeline'] > 1 else ['auto', 2, 3])}",
        f"recompute={rng.choice(['none', 'full', 'selective'])}",
        f"optim={rng.choice(['adamw', 'lamb'])}",
        f"train.seed={rng.randrange(100)}",
        f"train.sequence_length={rng.choice([32, 48, 64, 96])}",
        f"train.microbatch_sequences={microbatch}",
        f"train.global_batch_sequences={batch}",
    ]


def draw_model(rng: random.Random) -> list[str]:
    """Return overrides of a random small Llama; it may be impossible."""
    heads = rng.choice([2, 3, 4, 6, 8])
    settings = {
        "vocab_size": rng.choice([96, 240]),
        "hidden_size": rng.choice([24, 48]),
        "intermediate_size": rng.choice([48, 96]),
        "num_layers": rng.randint(2, 8),
        "num_heads": heads,
        "num_kv_heads": rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "head_dim": rng.choice([6, 8]),
        "tied_embeddings": rng.choice(["true", "false"]),
        "parallel_block": rng.choice(["true", "false"]),
        "sliding_window": rng.choice(["null", 1, 5, 24]),
    }
    return ["model=llama_tiny", *(f"model.{key}={value}" for key, value in settings.items())]


def _primes(number: int) -> list[int]:
    for divisor in range(2, number + 1):
        if number % divisor == 0:
            return [divisor, *_primes(number // divisor)]
    return []


def _show(report: Report, title: str) -> None:
    """Print the numbers of every step, the worst parameters, and the verdict."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    steps = Table(title=title, title_justify="left")
    for heading in ("step", "quantity", "layout", "oracle", "difference", ""):
        steps.add_column(heading)
    for row in report.of_steps():
        steps.add_row(str(row.step), row.quantity, f"{row.layout:.8g}", f"{row.oracle:.8g}", *_verdict(row))
    console.print(steps)
    for (quantity, step), rows in report.of_parameters().items():
        table = Table(title=f"{quantity}s of step {step}: the worst of {len(rows)}", title_justify="left")
        for heading in ("parameter", "norm / oracle's", "difference", ""):
            table.add_column(heading, overflow="fold")
        for row in rows[:NUM_SHOWN]:
            table.add_row(row.name, f"{row.ratio:.6f}", *_verdict(row))
        console.print(table)
    for fault in report.faults:
        console.print(fault, style="red", markup=False)
    num_bad = sum(not comparison.passed for comparison in report.comparisons) + len(report.faults)
    verdict = (
        f"FAILED: {num_bad} of {len(report.comparisons) + len(report.faults)} comparisons" if num_bad else "passed"
    )
    console.print(f"{verdict}; largest difference {report.worst.difference:.1e}, tolerance {TOLERANCE:g}")


def _verdict(row: Comparison) -> tuple[str, str]:
    return f"{row.difference:.1e}", "ok" if row.passed else "[red]DIFFERS"


if __name__ == "__main__":
    main()
