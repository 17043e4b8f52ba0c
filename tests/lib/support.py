"""What several tests need: processes by fork, small runs, and their records."""

import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import datasets
import torch
import torch._inductor

from shardwright.conf.load import load_config, to_dict
from shardwright.observe.log import configure_logging
from shardwright.trainer.build import build
from shardwright.trainer.loop import train as loop

# What a deterministic run on text loads is loaded here, so that forked processes have it.
LOADED = (datasets, torch._inductor, load_config())
ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "scripts" / "train.py"

SMALL = [
    "model.vocab_size=272",
    "model.hidden_size=48",
    "model.intermediate_size=80",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=12",
    "train.sequence_length=64",
    "train.global_batch_sequences=12",
    "train.microbatch_sequences=1",
    "train.deterministic=true",
    "evaluate.every_steps=null",
    "evaluate.num_batches=1",
    "schedule.warmup_steps=3",
    "observe.wandb=disabled",
    "observe.every_steps=1",
    "optim.peak_lr=1e-3",
    "data=files",
]


def small(corpus, folder, *overrides):
    """Overrides of a run that takes seconds."""
    return [*SMALL, f"data.path={corpus}", f"run.folder={folder}", *overrides]


def fork(num_processes, function, *args):
    """Run function(*args) in forked processes that see torchrun's variables; return their results by rank.

    A process that was killed gives its negative signal; one that raised fails the test with its traceback.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [_start(rank, num_processes, port, function, args) for rank in range(num_processes)]
    results, failures = [], []
    for rank, (pid, pipe) in enumerate(children):
        with os.fdopen(pipe, "rb") as stream:
            data = stream.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if not data:
            results.append(status)
            continue
        ok, value = pickle.loads(data)
        results.append(value)
        if not ok:
            failures.append(f"rank {rank}:\n{value}")
    assert not failures, "\n".join(failures)
    return results


def _start(rank, num_processes, port, function, args):
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    os.close(read)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        result = True, function(*args)
    except BaseException:
        result = False, traceback.format_exc()
    with os.fdopen(write, "wb") as stream:
        stream.write(pickle.dumps(result))
    os._exit(0)


def train(overrides, at_step=None):
    """Train in this process; `at_step` is called with (run, step) before each step of the engine."""
    config = load_config(overrides)
    configure_logging(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    run = build(config, to_dict(config))
    if at_step is not None:
        inner = run.engine.train_step

        def step(batches, *, lr):
            at_step(run, run.progress.step, batches)
            return inner(batches, lr=lr)

        run.engine.train_step = step
    with run.cleanup:
        return loop(run)


def train_and_listen(overrides):
    """Train, and return the lines that the trainer logged."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("shardwright.trainer").addHandler(handler)
    train(overrides)
    return lines


def records(folder):
    """The logged steps of a run: step -> record."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r for r in map(json.loads, lines) if "loss" in r}


def curve(folder, first=1):
    """(loss, gradient norm) of every step from `first` on."""
    return [(r["loss"], r["grad_norm"]) for step, r in sorted(records(folder).items()) if step >= first]


def assert_close(ours, theirs, tolerance=1e-5):
    """Two curves agree relatively, step by step."""
    assert len(ours) == len(theirs) > 0
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for x, y in zip(a, b, strict=True):
            assert abs(x - y) <= tolerance * abs(y), f"step {step}: {a} is not {b}"


def command(*overrides, script=TRAIN, processes=0, timeout=120, env=None):
    """Run a script as a user would, with torchrun if `processes`; return the finished process."""
    line = [sys.executable]
    if processes:
        line += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*line, str(script), *overrides],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        cwd=ROOT,
    )
