"""Every layout of a small model against the plain model in one process: losses, norms, gradients, weights.

Three steps in float32 on packed documents, with accumulation and clipping. One group of processes serves all layouts
of a number of processes.
"""

import os
import time

import pytest
import torch
import torch.distributed as dist
from support import fork_each

from shardwright.conf.load import load_config
from shardwright.parallel.world import World
from shardwright.trainer.verify import verify

BASE = """model.vocab_size=96 model.hidden_size=32 model.intermediate_size=48 model.num_layers=4 model.num_heads=4
model.num_kv_heads=2 model.head_dim=8 model.tied_embeddings=false train.sequence_length=32
train.global_batch_sequences=4 train.microbatch_sequences=1 optim.peak_lr=1e-3 optim.max_grad_norm=0.5"""

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

LAYOUTS = {
    1: """
    microbatch=2 recompute=full
    recompute=selective parallel_block=true tied=true
    """,
    2: """
    tensor=2
    tensor=2 overlap=chunked
    tensor=2 microbatch=2
    tensor=2 overlap=chunked microbatch=2 parallel_block=true
    tensor=2 tied=true parallel_block=true
    tensor=2 recompute=selective
    context=2
    context=2 mode=ulysses
    context=2 window=7
    context=2 mode=ulysses window=7 microbatch=2
    context=2 recompute=full microbatch=2
    shard=2 zero=2
    shard=2 zero=3
    shard=2 recompute=full tied=true
    replicate=2
    pipeline=2 schedule=gpipe
    pipeline=2 schedule=1f1b
    pipeline=2 schedule=1f1b tied=true
    pipeline=2 schedule=1f1b batch=5 layers=5
    pipeline=2 schedule=interleaved_1f1b
    pipeline=2 schedule=interleaved_1f1b chunks=3 layers=6
    pipeline=2 schedule=interleaved_1f1b batch=5 layers=5 tied=true
    pipeline=2 schedule=interleaved_1f1b recompute=full
    pipeline=2 schedule=interleaved_1f1b recompute=selective
    pipeline=2 schedule=zb_h1
    pipeline=2 schedule=zb_h1 batch=5 parallel_block=true
    pipeline=2 schedule=zb_h1 recompute=full tied=true
    pipeline=2 schedule=zb_h1 recompute=selective
    pipeline=2 schedule=zbv
    pipeline=2 schedule=zbv tied=true batch=5
    pipeline=2 schedule=zbv recompute=full
    pipeline=2 schedule=zbv recompute=selective parallel_block=true
    pipeline=2 schedule={table} batch=3
    """,
    3: """
    pipeline=3 schedule=1f1b layers=5
    pipeline=3 schedule=interleaved_1f1b layers=6 batch=5
    pipeline=3 schedule=zb_h1 layers=5 batch=5
    pipeline=3 schedule=zbv layers=6 batch=5
    replicate=3 batch=6
    """,
    4: """
    tensor=4
    tensor=4 overlap=chunked
    tensor=4 tied=true parallel_block=true microbatch=2
    context=4
    context=4 mode=ulysses
    pipeline=2 replicate=2
    pipeline=2 shard=2
    pipeline=2 context=2
    pipeline=2 tensor=2
    replicate=2 shard=2
    replicate=2 context=2
    replicate=2 tensor=2
    shard=2 context=2
    shard=2 tensor=2
    context=2 tensor=2
    context=2 tensor=2 window=7 microbatch=2
    context=2 mode=ulysses tensor=2 overlap=chunked
    pipeline=2 schedule=interleaved_1f1b shard=2
    pipeline=2 schedule=zb_h1 shard=2
    pipeline=2 schedule=zbv shard=2 tied=true
    pipeline=2 schedule=zbv shard=2 recompute=full
    pipeline=2 schedule=zbv tensor=2 overlap=chunked
    pipeline=2 schedule=zb_h1 tensor=2 tied=true recompute=selective
    pipeline=2 schedule=zbv context=2 tied=true
    shard=2 tensor=2 optim=lamb
    """,
    8: """
    pipeline=2 shard=2 tensor=2
    pipeline=2 context=2 tensor=2
    replicate=2 shard=2 tensor=2
    pipeline=2 schedule=zbv shard=2 tensor=2 recompute=full
    """,
}
NAMES = {
    processes: [" ".join(line.split()) for line in text.split("\n") if line.strip()]
    for processes, text in LAYOUTS.items()
}

# Stages in a V, with whole and split backwards of the same stages.
TABLE = """
stages: [0, 1, 1, 0]
ranks:
  - 0F0 0F1 3F0 3I0 0F2 3W0 3F1 3B1 0B0 3F2 3B2 0B1 0I2 0W2
  - 1F0 2F0 1F1 2F1 1F2 2I0 1B0 2F2 2B1 1B1 2W0 2B2 1B2
"""


def overrides(name, table):
    words = [word.partition("=") for word in name.format(table=table).split()]
    return [*BASE.split(), *(f"{SHORT.get(key, key)}={value}" for key, _, value in words)]


def compare(config):
    world = World.from_environment("cpu")
    if not dist.is_initialized():
        world.start()
    begin = time.perf_counter()
    r = verify(config, world)
    if world.rank == 0:
        os.write(2, f"{time.perf_counter() - begin:.2f} {os.getpid()}\n".encode())
    return r


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Number of processes -> name -> report, or what went wrong."""
    table = tmp_path_factory.mktemp("schedule") / "mixed.yaml"
    table.write_text(TABLE)
    known = {}

    def of(processes):
        if processes not in known:
            calls = {name: (load_config(overrides(name, table)),) for name in NAMES[processes]}
            known[processes] = fork_each(processes, compare, calls)
        return known[processes]

    return of


@pytest.mark.parametrize(
    ("processes", "name"), [(processes, name) for processes, names in NAMES.items() for name in names]
)
def test_layout(reports, processes, name):
    found = reports(processes)[name]
    assert not isinstance(found, str), found
    report = found[0]
    assert report.passed, (report.faults, report.worst)
