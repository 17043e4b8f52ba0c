"""Every layout of a small model against the plain model in one process: losses, norms, gradients, weights.

Three steps in float32 on packed documents, with accumulation and clipping. One group of processes serves all layouts
of a number of processes.
"""

from collections import Counter
from functools import cache

import pytest
from support import TINY, fork_each, spell_out, started_world

from shardwright.conf.load import load_config
from shardwright.trainer.verify import verify

MAX_NORM = 0.5

LAYOUTS = {
    1: """
    microbatch=2 recompute=full
    recompute=selective parallel_block=true tied=true
    """,
    2: """
    tensor=2 batch=2
    tensor=2 overlap=chunked batch=2
    tensor=2 overlap=chunked microbatch=2 parallel_block=true
    context=2 batch=2
    context=2 mode=ulysses batch=2
    context=2 window=7 batch=2
    shard=2 zero=2
    shard=2 zero=3
    replicate=2
    pipeline=2 schedule=gpipe
    pipeline=2 schedule=1f1b
    pipeline=2 schedule=1f1b batch=5 layers=5
    pipeline=2 schedule=interleaved_1f1b chunks=3 layers=6
    pipeline=2 schedule=interleaved_1f1b batch=5 layers=5 tied=true
    pipeline=2 schedule=interleaved_1f1b recompute=full
    pipeline=2 schedule=zb_h1 recompute=full tied=true
    pipeline=2 schedule=zbv tied=true batch=5
    pipeline=2 schedule=zbv recompute=full
    pipeline=2 schedule=zbv recompute=selective parallel_block=true
    pipeline=2 schedule={table} batch=3
    """,
    3: """
    pipeline=3 schedule=1f1b layers=5
    pipeline=3 schedule=zb_h1 layers=5 batch=5
    """,
    4: """
    tensor=4 batch=2
    pipeline=2 replicate=2
    pipeline=2 shard=2
    pipeline=2 context=2 batch=2
    pipeline=2 tensor=2 batch=3 layers=3
    replicate=2 shard=2 batch=8
    replicate=2 context=2 layers=2
    replicate=2 tensor=2 layers=2
    shard=2 context=2 layers=2
    shard=2 tensor=2 layers=3
    context=2 tensor=2 batch=2 layers=3
    context=2 mode=ulysses tensor=2 overlap=chunked batch=2 layers=2
    pipeline=2 schedule=interleaved_1f1b shard=2
    pipeline=2 schedule=zb_h1 shard=2 layers=2
    pipeline=2 schedule=zbv shard=2 recompute=full tied=true
    pipeline=2 schedule=zbv tensor=2 overlap=chunked batch=2
    shard=2 tensor=2 optim=lamb layers=2
    """,
    8: """
    pipeline=2 shard=2 tensor=2 layers=2
    pipeline=2 context=2 tensor=2 layers=2 batch=2
    """,
}
NIGHTLY = {
    3: """
    pipeline=3 schedule=interleaved_1f1b layers=6 batch=5
    pipeline=3 schedule=zbv layers=6 batch=5
    """,
    2: """
    tensor=2 tied=true parallel_block=true batch=2
    pipeline=2 schedule=interleaved_1f1b recompute=selective
    pipeline=2 schedule=zb_h1 recompute=selective
    tensor=2 microbatch=2
    tensor=2 recompute=selective batch=2
    context=2 mode=ulysses window=7 microbatch=2
    context=2 recompute=full microbatch=2
    shard=2 recompute=full tied=true
    pipeline=2 schedule=1f1b tied=true
    pipeline=2 schedule=interleaved_1f1b
    pipeline=2 schedule=zb_h1
    pipeline=2 schedule=zb_h1 batch=5 parallel_block=true
    pipeline=2 schedule=zbv
    """,
    4: """
    tensor=4 overlap=chunked batch=2 layers=2
    context=4 batch=2 layers=2
    tensor=4 tied=true parallel_block=true microbatch=2 layers=2
    context=4 mode=ulysses batch=2 layers=2
    context=2 tensor=2 window=7 microbatch=2 layers=2
    pipeline=2 schedule=zb_h1 tensor=2 tied=true recompute=selective batch=2 layers=2
    pipeline=2 schedule=zbv context=2 tied=true batch=2
    """,
    8: """
    replicate=2 shard=2 tensor=2 layers=2 batch=8
    """,
}


def names(layouts):
    return {n: [line.strip() for line in text.strip().splitlines()] for n, text in layouts.items()}


NAMES = {False: names(LAYOUTS), True: names(NIGHTLY)}  # whether they run nightly only

# Stages in a V, with whole and split backwards of the same stages.
TABLE = """
stages: [0, 1, 1, 0]
ranks:
  - 0F0 0F1 3F0 3I0 0F2 3W0 3F1 3B1 0B0 3F2 3B2 0B1 0I2 0W2
  - 1F0 2F0 1F1 2F1 1F2 2I0 1B0 2F2 2B1 1B1 2W0 2B2 1B2
"""


def compare(config):
    return verify(config, started_world())


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Return a function: nightly, number of processes -> name -> report on each process, or what went wrong."""
    table = tmp_path_factory.mktemp("schedule") / "mixed.yaml"
    table.write_text(TABLE)

    def configs(nightly, processes):
        for name in NAMES[nightly][processes]:
            yield name, [load_config([*TINY, f"optim.max_grad_norm={MAX_NORM}", *spell_out(name.format(table=table))])]

    @cache
    def of(nightly, processes):
        return fork_each(processes, compare, dict(configs(nightly, processes)))

    return of


def cases():
    for nightly, groups in NAMES.items():
        for processes, name in ((n, name) for n, several in groups.items() for name in several):
            marks = [pytest.mark.slow] if nightly else []
            yield pytest.param(nightly, processes, name, marks=marks, id=f"{processes}-{name}")


@pytest.mark.parametrize(("nightly", "processes", "name"), cases())
def test_layout(reports, nightly, processes, name):
    found = reports(nightly, processes)[name]
    assert not isinstance(found, str), found
    report = found[0]
    assert report.passed, (report.faults, report.worst)
    ring = "context" in name and "ulysses" not in name
    for c in report.comparisons:
        assert c.difference <= (1e-4 if ring and c.quantity == "gradient" else 1e-5), c
        assert abs(c.ratio - 1) <= 1e-4, c
    counts = Counter((c.quantity, c.step) for c in report.comparisons)
    num_parameters = counts["weight", 3]
    steps = {(quantity, step): 1 for quantity in ("loss", "gradient norm") for step in (1, 2, 3)}
    assert num_parameters > 10
    assert counts == steps | {
        ("gradient", 1): num_parameters,
        ("gradient", 3): num_parameters,
        ("weight", 3): num_parameters,
    }
    assert all(c.oracle > MAX_NORM for c in report.of_steps() if c.quantity == "gradient norm"), "every step is clipped"
