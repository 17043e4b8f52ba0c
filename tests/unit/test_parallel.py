"""Mesh arithmetic, plans, stages, initial values; and the order in which the executor works."""

import itertools
import random
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import TINY, first_backward, fork, fork_each, make_engine, spell_out, started_world
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from shardwright.conf.load import load_config
from shardwright.kernels import Kernels
from shardwright.models.llama.plan import plan
from shardwright.models.registry import FAMILIES
from shardwright.parallel import Mesh, ParallelPlan, PlanError, TopologyError
from shardwright.parallel.init import initial_box, normal_run
from shardwright.parallel.mesh import AXES
from shardwright.parallel.pipeline.schedule import live_at_peak, make_schedule
from shardwright.parallel.pipeline.stage import cut, partition, split_by_cost
from shardwright.parallel.plan import (
    Columns,
    Constant,
    Normal,
    Row,
    SequenceSharded,
    VocabularyEmbedding,
    VocabularyHead,
)
from shardwright.parallel.tensor import resolve


def degrees(**given):
    return SimpleNamespace(**{axis: 1 for axis in AXES} | {"shard": "auto"} | given)


def test_every_rank_has_its_own_place():
    config = degrees(pipeline=2, replicate=3, shard=2, context=2, tensor=4)
    meshes = [Mesh.of(config, num_processes=96, rank=rank) for rank in range(96)]
    places = [tuple(mesh.coordinate(axis) for axis in AXES) for mesh in meshes]
    assert places == list(itertools.product(range(2), range(3), range(2), range(2), range(4)))
    for data_rank in range(6):
        assert sum(mesh.data_rank == data_rank for mesh in meshes) == 96 // 6


def test_a_place_among_many():
    mesh = Mesh.of(degrees(pipeline=8, tensor=8), num_processes=12288, rank=11999)
    assert mesh.degrees["shard"] == 192
    assert [mesh.coordinate(axis) for axis in AXES] == [7, 0, 155, 0, 7]


@pytest.mark.parametrize(
    ("config", "processes", "words"),
    [
        (degrees(shard=4), 2, ["shard=4", "2 processes", "exactly 4"]),
        (degrees(replicate=3), 4, ["replicate=3", "4 processes", "multiple of 3"]),
        (degrees(tensor=2, shard=2), 6, ["exactly 4"]),
    ],
)
def test_meshes_that_do_not_fit(config, processes, words):
    with pytest.raises(TopologyError) as caught:
        Mesh.of(config, num_processes=processes, rank=0)
    assert all(word in str(caught.value) for word in words), caught.value


def test_axes_are_not_live_before_the_start():
    with pytest.raises(TopologyError, match="not live"):
        Mesh.of(degrees(), num_processes=1, rank=0).get("shard")


def test_the_plan_covers_the_model():
    config = load_config().model
    with torch.device("meta"):
        model = FAMILIES["llama"].build(config, Kernels())
    names = [name for name, _ in model.named_modules()]
    assert plan(config).match_blocks(names) == [f"layers.{i}" for i in range(config.num_layers)]
    for name, parameter in model.named_parameters():
        value = plan(config).initial_value(name)
        assert isinstance(value, Constant if parameter.ndim == 1 else Normal)


def test_plans_that_do_not_fit():
    with pytest.raises(PlanError, match="blocks pattern 'stages"):
        ParallelPlan(blocks=("stages.*",), initial_values={}).match_blocks(["layers.0"])
    with pytest.raises(PlanError, match="'bias' has no initial values"):
        ParallelPlan(blocks=(), initial_values={"*.weight": Constant(0)}).initial_value("bias")


def test_initial_values_are_normal_and_keyed_by_name_and_seed():
    x = normal_run(0, "a", 0, 400_000)
    assert abs(x.mean()) < 0.006 and abs(x.std() - 0.9866) < 0.005 and abs(x).max() <= 3
    quantiles = np.quantile(x, [0.025, 0.16, 0.5, 0.84, 0.975])
    np.testing.assert_allclose(quantiles, [-1.95, -0.99, 0, 0.99, 1.95], atol=0.02)
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.006
    for other in (normal_run(1, "a", 0, 400_000), normal_run(0, "b", 0, 400_000)):
        assert abs(np.corrcoef(x, other)[0, 1]) < 0.006


def test_any_box_is_a_part_of_the_whole():
    rng, shape = np.random.default_rng(0), (37, 11, 5)
    whole = initial_box(Normal(0.5), 3, "w", shape, (0, 0, 0), shape)
    for _ in range(50):
        offsets = tuple(int(rng.integers(0, n)) for n in shape)
        sizes = tuple(int(rng.integers(1, n - o + 1)) for n, o in zip(shape, offsets, strict=True))
        box = whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
        assert torch.equal(initial_box(Normal(0.5), 3, "w", shape, offsets, sizes), box)
    assert initial_box(Constant(1.0), 0, "n", (4,), (1,), (2,)).tolist() == [1, 1]


def test_a_large_run_does_not_depend_on_its_chunks():
    whole = normal_run(0, "a", 0, (1 << 22) + 1000)
    assert np.array_equal(whole[(1 << 22) - 500 :], normal_run(0, "a", (1 << 22) - 500, 1500))


class Small(nn.Module):
    """What a plan without faults fits: names and sizes are chosen by the tests below."""

    def __init__(self, width=12):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.layers = nn.ModuleDict({str(i): nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8)) for i in range(3)})
        self.norm = nn.LayerNorm(8)


STYLES = {
    "embedding": VocabularyEmbedding(),
    "layers.*": Columns(("0",)),
    "layers.*.1": Row(),
    "norm": SequenceSharded(),
}


def tensor_plan(styles):
    return ParallelPlan(blocks=("layers.*",), initial_values={}, tensor=styles)


def without(pattern):
    return {key: style for key, style in STYLES.items() if key != pattern}


def test_a_plan_that_fits_names_every_split_module():
    styles = resolve(tensor_plan(STYLES), Small(), 4)
    layers = [f"layers.{i}" for i in range(3)]
    assert sorted(styles) == sorted(["embedding", "norm", *layers, *(f"{layer}.1" for layer in layers)])
    assert isinstance(styles["layers.2.1"], Row)


@pytest.mark.parametrize(
    ("styles", "width", "size", "words"),
    [
        (None, 12, 2, ["no tensor plan", "parallel.tensor=1"]),
        (STYLES | {"head": VocabularyHead()}, 12, 2, ["pattern 'head'", "matches no module"]),
        (without("norm"), 12, 2, ["'norm.weight'", "has no style", "add a pattern"]),
        (without("layers.*.1"), 12, 2, ["'layers.0.1.weight'", "has no style"]),
        (STYLES, 10, 4, ["parallel.tensor=4", "layers.0.0.weight", "[10, 8]", "dim 0", "divide 10"]),
        (STYLES, 12, 3, ["parallel.tensor=3", "embedding.weight", "[16, 8]", "divide 16"]),
        (without("layers.*.1") | {"layers.*.1": Columns(("weight",))}, 12, 2, ["layers.0.1.weight", "nn.Linear"]),
        (STYLES | {"norm": Row()}, 12, 2, ["norm is LayerNorm", "nn.Linear"]),
    ],
    ids=["none", "no match", "uncovered", "uncovered linear", "columns", "vocabulary", "no module", "no linear"],
)
def test_plans_that_cannot_be_split_over_tensor(styles, width, size, words):
    with pytest.raises(PlanError) as caught:
        resolve(tensor_plan(styles), Small(width), size)
    assert all(word in str(caught.value) for word in words), caught.value


def dearest(blocks, cuts, first, last):
    sums = [sum(blocks[start:end]) for start, end in itertools.pairwise(cuts)]
    sums[0] += first
    sums[-1] += last
    return max(sums)


def test_partition_is_as_good_as_any():
    rng = random.Random(0)
    for _ in range(150):
        blocks = [rng.choice([1.0, 2.0, rng.random() * 5]) for _ in range(rng.randint(1, 9))]
        num_stages = rng.randint(1, len(blocks))
        first, last = rng.choice([(0, 0), (0, 6.5), (2.5, 3.5)])
        runs = partition(blocks, num_stages, first=first, last=last)
        cuts = [0, *(run.stop for run in runs)]
        assert len(runs) == num_stages and all(len(run) for run in runs)
        assert [i for run in runs for i in run] == list(range(len(blocks)))
        inner = itertools.combinations(range(1, len(blocks)), num_stages - 1)
        best = min(dearest(blocks, [0, *several, len(blocks)], first, last) for several in inner)
        assert dearest(blocks, cuts, first, last) == pytest.approx(best)


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_stages_have_their_own_parameters_and_together_all(tied, num_stages):
    config = load_config([*TINY, "model.num_layers=5", f"model.tied_embeddings={tied}"]).model
    family = FAMILIES["llama"]
    with torch.device("meta"):
        model = family.build(config, Kernels())
    whole = {name: p.shape for name, p in model.named_parameters()}
    split = split_by_cost(model, family.plan(config), num_stages, 32)
    assert [i for run in split for i in run] == list(range(5))
    found = [
        {n: p.shape for n, p in cut(model, family.plan(config), split, s).named_parameters()} for s in range(num_stages)
    ]
    for stage, parameters in enumerate(found):
        layers = {int(name.split(".")[1]) for name in parameters if name.startswith("layers.")}
        ends = {name for name in parameters if not name.startswith("layers.")}
        first = {"embedding.weight"} if stage == 0 else set()
        last = {"norm.weight", "embedding.weight" if tied == "true" else "head.weight"}
        assert layers == set(split[stage])
        assert ends == first | (last if stage == num_stages - 1 else set())
    assert {name: shape for parameters in found for name, shape in parameters.items()} == whole
    assert dict(model.named_parameters()).keys() == whole.keys(), "the model itself keeps all"
    assert sum(map(len, found)) == len(whole) + (tied == "true")


def test_what_is_live_at_the_peak():
    def live(kind, rank, num_ranks, num_chunks=1, num_microbatches=8):
        schedule = make_schedule(kind, num_ranks=num_ranks, num_chunks=num_chunks, num_microbatches=num_microbatches)
        return live_at_peak(schedule, rank)

    assert [live("1f1b", rank, 4) for rank in range(4)] == [{0: 4}, {1: 3}, {2: 2}, {3: 1}]
    assert live("gpipe", 1, 2) == {1: 8}
    assert live("interleaved_1f1b", 0, 2, 2) == {0: 3, 2: 2}
    assert live("zb_h1", 1, 2) == {1: 2}
    assert [sum(live("zbv", rank, 2, 2).values()) for rank in range(2)] == [4, 4]


MIXED = """
stages: [0, 1, 1, 0]
ranks:
  - 0F0 0F1 3F0 3I0 0F2 3W0 3F1 3B1 0B0 3F2 3B2 0B1 0I2 0W2
  - 1F0 2F0 1F1 2F1 1F2 2I0 1B0 2F2 2B1 1B1 2W0 2B2 1B2
"""
ORDERS = {
    2: [
        "schedule=gpipe",
        "schedule=1f1b",
        "schedule=interleaved_1f1b batch=5",
        "schedule=interleaved_1f1b chunks=3 layers=6",
        "schedule=zb_h1",
        "schedule=zbv batch=5",
        "schedule={table} batch=3",
    ],
    3: ["schedule=interleaved_1f1b layers=6", "schedule=zb_h1 batch=7"],
    4: ["schedule=1f1b batch=3", "schedule=zbv layers=8"],
}


def worked_off(config):
    """Return what a process did in a step, in order, and what its schedule says."""
    subject, engine = make_engine(config)
    done, executor = [], engine.model.executor

    @contextmanager
    def note(action):
        yield
        done.append(action)

    executor.observe = note
    first_backward(config, engine, subject.share)
    return done, subject.layout.schedule.actions


@pytest.mark.parametrize("processes", ORDERS)
def test_the_executor_keeps_to_the_table(tmp_path, processes):
    (tmp_path / "mixed.yaml").write_text(MIXED)
    calls = {}
    for layout in ORDERS[processes]:
        words = f"pipeline={processes} {layout.format(table=tmp_path / 'mixed.yaml')}"
        calls[layout] = [load_config([*TINY, *spell_out(words)])]
    for layout, ranks in fork_each(processes, worked_off, calls).items():
        assert not isinstance(ranks, str), f"{layout}: {ranks}"
        for rank, (done, actions) in enumerate(ranks):
            assert tuple(done) == actions[rank], layout
    if processes == 2:
        table = [row.strip(" -") for row in MIXED.splitlines() if row.startswith("  -")]
        assert [" ".join(map(str, done)) for done, _ in ranks] == table


def groups_after_two_starts():
    """Return, for tensors on two meshes that are alike, whether one made from each is on the groups of its own."""
    config, world = degrees(tensor=2), started_world()
    same = []
    for _ in range(2):
        mesh = Mesh.of(config, num_processes=4, rank=world.rank).start("cpu")
        part = DTensor.from_local(torch.ones(2), mesh.get("tensor"), [Shard(0)])
        same.append(torch.ones_like(part).device_mesh.get_group() is mesh.get_group("tensor"))
    return same


def test_a_second_start_in_a_process_has_its_own_groups():
    assert fork(4, groups_after_two_starts) == [[True, True]] * 4
