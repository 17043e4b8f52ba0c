"""What several tests need: processes by fork, small runs, and their records."""

import faulthandler
import gc
import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path

import datasets
import torch
import torch._inductor
import torch.distributed as dist

from shardwright.conf.load import load_config, to_dict
from shardwright.observe.log import configure_logging
from shardwright.parallel.apply import apply
from shardwright.parallel.world import World
from shardwright.trainer.build import build
from shardwright.trainer.loop import train as loop
from shardwright.trainer.native import NativeEngine
from shardwright.trainer.optim import Optimizer
from shardwright.trainer.verify import Subject, synthetic_batches

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


TINY = [
    "model.vocab_size=96",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_layers=4",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=8",
    "model.tied_embeddings=false",
    "train.sequence_length=32",
    "train.global_batch_sequences=4",
    "train.microbatch_sequences=1",
    "optim.peak_lr=1e-3",
]

SHORT = {
    "batch": "train.global_batch_sequences",
    "microbatch": "train.microbatch_sequences",
    "schedule": "parallel.pipeline_schedule",
    "chunks": "parallel.pipeline_chunks",
    "overlap": "parallel.tensor_overlap",
    "mode": "parallel.context_mode",
    "layers": "model.num_layers",
    "tied": "model.tied_embeddings",
    "parallel_block": "model.parallel_block",
    "window": "model.sliding_window",
    **{key: f"parallel.{key}" for key in ("pipeline", "replicate", "shard", "context", "tensor", "zero")},
}


def spell_out(layout):
    """Overrides of a layout in short, such as `pipeline=2 schedule=zbv batch=5`."""
    words = [word.partition("=") for word in layout.split()]
    return [f"{SHORT.get(key, key)}={value}" for key, _, value in words]


def small(corpus, folder, *overrides):
    """Overrides of a run that takes seconds."""
    return [*SMALL, f"data.path={corpus}", f"run.folder={folder}", *overrides]


def fork(num_processes, function, *args):
    """Run function(*args) in forked processes that see torchrun's variables; return their results by rank.

    A process that was killed gives its negative signal; one that raised fails the test with its traceback.
    """
    results, failures = [], []
    for rank, (status, outcomes) in enumerate(_fork(num_processes, function, [args])):
        ok, value = outcomes[0] if outcomes else (True, status)
        results.append(value)
        if not ok:
            failures.append(f"rank {rank}:\n{value}")
    assert not failures, "\n".join(failures)
    return results


def fork_each(num_processes, function, calls, timeout_seconds=60):
    """Run function(*calls[name]) for every name, in one group of forked processes as long as all goes well.

    Return name -> results by rank, or a text that says what went wrong: a process that raises or takes too long ends at
    once, which makes its peers fail too; a new group goes on with the names that are left.
    """
    results, names = {}, list(calls)
    while names:
        ranks = _fork(num_processes, function, [calls[name] for name in names], timeout_seconds)
        num_done = min(sum(ok for ok, _ in outcomes) for _, outcomes in ranks)
        for index, name in enumerate(names[:num_done]):
            results[name] = [outcomes[index][1] for _, outcomes in ranks]
        for name in names[num_done : num_done + 1]:
            results[name] = "\n".join(_tell(rank, *ended, num_done) for rank, ended in enumerate(ranks))
        names = names[num_done + 1 :]
    return results


def _tell(rank, status, outcomes, index):
    said = f"ended with status {status}; 1 is that of a process that took too long, and said where on stderr"
    return f"rank {rank}: {outcomes[index][1] if index < len(outcomes) else said}"


def _fork(num_processes, function, calls, timeout_seconds=None):
    """Return for each rank its exit status, and (ok, value) of its calls up to the first that failed."""
    assert not dist.is_initialized(), "a test started a process group in this process, which forked ones would share"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ExitStack() as files:
        outcomes = [files.enter_context(tempfile.TemporaryFile()) for _ in range(num_processes)]
        ended, held = os.pipe()
        pids = [
            os.fork() or _work(num_processes, port, rank, file, function, calls, timeout_seconds, (ended, held))
            for rank, file in enumerate(outcomes)
        ]
        os.close(ended)
        os.close(held)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        return [(status, _read(file)) for status, file in zip(statuses, outcomes, strict=True)]


def _read(file):
    file.seek(0)
    outcomes = []
    with suppress(EOFError, pickle.UnpicklingError):  # the end, or a process that was killed while it wrote
        while True:
            outcomes.append(pickle.load(file))
    return outcomes


def _work(num_processes, port, rank, file, function, calls, timeout_seconds, pipe):
    """Be the process of a rank; does not return."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    gc.freeze()  # collections need not look at, and so copy, what the parent had
    try:
        for args in calls:
            if timeout_seconds is not None:
                faulthandler.dump_traceback_later(timeout_seconds, exit=True, file=2)
            ok, told = _outcome(function, args)
            file.write(told)
            file.flush()
            if not ok:
                break
        else:
            if rank == 0:
                _outlast_peers(*pipe)
    finally:
        os._exit(0)


def _outlast_peers(ended, held):
    """Wait until no other process holds the pipe: the first rank serves the store that its peers may still ask."""
    os.close(held)
    os.read(ended, 1)


def _outcome(function, args):
    try:
        return True, pickle.dumps((True, function(*args)))
    except BaseException:
        return False, pickle.dumps((False, traceback.format_exc()))


def started_world():
    """Join the forked processes of this call, once."""
    world = World.from_environment("cpu")
    if not dist.is_initialized():
        world.start()
    return world


def make_engine(config):
    """Return a layout on the forked processes, and its engine with initial weights."""
    world = started_world()
    subject = Subject.of(config, num_processes=world.num_processes, rank=world.rank, device=world.device)
    mesh = subject.mesh.start("cpu")
    model = apply(subject.model, subject.layout, mesh, config, device=world.device, compute_dtype=torch.float32)
    optimizer = Optimizer(config.optim, model, subject.kernels.optimizer)
    return subject, NativeEngine(model, optimizer, mesh, world.device, config.optim.max_grad_norm)


def first_backward(config, engine, share):
    """Leave the gradients of a first step on made-up batches, and return its numbers."""
    return engine.read(engine.backward(synthetic_batches(config.train.seed, 1, share, config.model.vocab_size)))


def train(overrides, at_step=None):
    """Train in this process; `at_step` is called with (run, step) before each step of the engine."""
    config = load_config(overrides)
    configure_logging(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    run = build(config, to_dict(config))
    if at_step is not None:
        inner = run.engine.train_step

        def step(batches, **settings):
            at_step(run, run.progress.step, batches)
            return inner(batches, **settings)

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
