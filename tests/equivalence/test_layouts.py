"""Every layout is the same run as one process."""

import itertools
import os

import pytest
import torch
from support import assert_close, curve, fork, records, small, train
from torch.distributed.tensor import DTensor

from shardwright.parallel.gradients import local

STEPS = "train.num_steps=20"


@pytest.fixture(scope="module")
def oracle(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracle")
    fork(1, train, small(corpus, folder, STEPS))
    return curve(folder)


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        pytest.param(1, ["train.microbatch_sequences=4"], marks=pytest.mark.slow),
        (1, ["train.microbatch_sequences=12"]),
        (2, []),
        pytest.param(2, ["train.microbatch_sequences=3"], marks=pytest.mark.slow),
        pytest.param(2, ["parallel.replicate=2"], marks=pytest.mark.slow),
        pytest.param(4, [], marks=pytest.mark.slow),
        (4, ["train.microbatch_sequences=3"]),
        pytest.param(4, ["parallel.replicate=2"], marks=pytest.mark.slow),
        pytest.param(3, [], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_same_losses_and_gradient_norms(corpus, tmp_path, oracle, processes, layout):
    fork(processes, train, small(corpus, tmp_path, STEPS, *layout))
    assert_close(curve(tmp_path), oracle)


def test_reference_kernels_agree(corpus, tmp_path, oracle):
    fork(1, train, small(corpus, tmp_path, STEPS, "kernels=reference"))
    assert_close(curve(tmp_path), oracle)


def gradients(overrides):
    """Every parameter's gradient in step 1, taken before the update drops it."""
    from shardwright.trainer.optim import Optimizer

    found, inner = {}, Optimizer.step

    def keep(self, **kwargs):
        for name, p in self._parameters.items():
            found.setdefault(name, (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone())
        return inner(self, **kwargs)

    Optimizer.step = keep
    train([*overrides, "train.num_steps=1"])
    return {name: g.numpy() for name, g in found.items()}


@pytest.mark.parametrize("layout", [["parallel.replicate=2"], ["parallel.tensor=2"]], ids=str)
def test_same_gradient_of_every_parameter(corpus, tmp_path, layout):
    plain = fork(1, gradients, small(corpus, tmp_path / "1"))[0]
    for found in fork(4, gradients, small(corpus, tmp_path / "4", *layout)):
        assert found.keys() == plain.keys()
        for name, gradient in found.items():
            difference = torch.from_numpy(gradient - plain[name]).norm()
            assert difference <= 1e-5 * torch.from_numpy(plain[name]).norm(), name


@pytest.mark.slow
def test_bf16_runs_sharded_and_alone_alike(corpus, tmp_path):
    for processes in (1, 2):
        fork(processes, train, small(corpus, tmp_path / str(processes), "train.num_steps=5", "train.precision=bf16"))
    assert_close(curve(tmp_path / "2"), curve(tmp_path / "1"), tolerance=2e-2)


def poisoned(overrides):
    """Train with a NaN in the last rank's part of one gradient in step 3; say which steps left the weights alone."""
    from shardwright.parallel import model

    weights, inner = [], model.global_norm

    def poison(gradients):
        gradients = list(gradients)
        if len(weights) == 3 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            local(gradients[0]).view(-1)[0] = float("nan")
        return inner(gradients)

    def keep(run, step, batches):
        weights.append([local(p).detach().clone() for p in run.engine.model.parameters()])

    model.global_norm = poison
    train(overrides, keep)
    return [all(map(torch.equal, *pair)) for pair in itertools.pairwise(weights)]


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, []), (2, []), (2, ["parallel.tensor=2"]))),
        (2, ["parallel.pipeline=2"]),
    ],
    ids=str,
)
def test_a_step_that_is_not_finite_is_skipped_by_all_and_counted(corpus, tmp_path, processes, layout):
    for unchanged in fork(processes, poisoned, small(corpus, tmp_path, "train.num_steps=6", *layout)):
        assert unchanged == [False, False, True, False, False]
    found = records(tmp_path)
    assert [found[step]["skipped_steps"] for step in range(1, 7)] == [0, 0, 1, 1, 1, 1]
    assert found[3]["grad_norm"] is None, "not finite, which JSON has no word for"
