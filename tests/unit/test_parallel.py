"""Mesh arithmetic, plans, initial values: no processes needed."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shardwright.conf.load import load_config
from shardwright.kernels import Kernels
from shardwright.models.llama.plan import plan
from shardwright.models.registry import FAMILIES
from shardwright.parallel import Mesh, ParallelPlan, PlanError, TopologyError
from shardwright.parallel.apply import check_served
from shardwright.parallel.init import initial_box, normal_run
from shardwright.parallel.mesh import AXES
from shardwright.parallel.plan import Constant, Normal


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


@pytest.mark.parametrize("axis", ["pipeline", "context", "tensor"])
def test_axes_that_are_not_served_are_refused(axis):
    with pytest.raises(TopologyError, match=f"parallel.{axis}=2 is not served yet.*set parallel.{axis}=1"):
        check_served(Mesh.of(degrees(**{axis: 2}), num_processes=2, rank=0))


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
