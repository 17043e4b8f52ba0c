"""Schedules and the optimizer."""

import itertools

import pytest
import torch
from torch import nn

from shardwright.conf.load import load_config
from shardwright.parallel.gradients import global_norm
from shardwright.trainer.optim import Optimizer
from shardwright.trainer.schedule import lr_factor


def factors(num_steps, *overrides):
    config = load_config(list(overrides))
    return [lr_factor(config.schedule, step, num_steps) for step in range(num_steps)]


def test_warmup_stable_decay():
    found = factors(20, "schedule.warmup_steps=4", "schedule.decay_fraction=0.25", "schedule.min_lr_ratio=0.1")
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert found[14:] == pytest.approx([1.0, 1.0, 0.1 + 0.9 * 0.8, 0.1 + 0.9 * 0.6, 0.1 + 0.9 * 0.4, 0.1 + 0.9 * 0.2])


def test_cosine():
    found = factors(12, "schedule=cosine", "schedule.warmup_steps=2", "schedule.min_lr_ratio=0.2")
    assert found[:3] == pytest.approx([0.5, 1, 1])
    assert found[7] == pytest.approx(0.2 + 0.8 * 0.5)
    assert all(a > b for a, b in itertools.pairwise(found[2:])) and found[-1] > 0.2


@pytest.mark.parametrize(
    "overrides", [["schedule.warmup_steps=0"], ["schedule.warmup_steps=50"], ["schedule.decay_fraction=0"]]
)
def test_odd_schedules_stay_within_bounds(overrides):
    assert all(0 < factor <= 1 for factor in factors(10, *overrides))


def by_hand(parameter, gradient, m, v, *, step, lr, decay):
    """AdamW, Algorithm 2 of arXiv 1711.05101, in float64."""
    beta1, beta2, eps = 0.9, 0.95, 1e-8
    m.mul_(beta1).add_((1 - beta1) * gradient)
    v.mul_(beta2).add_((1 - beta2) * gradient**2)
    update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    parameter.sub_(lr * (update + decay * parameter))


def test_adamw_is_adamw_and_norms_are_not_decayed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3, bias=True), nn.LayerNorm(3))
    optimizer = Optimizer(load_config().optim, model)
    state = {
        n: [p.detach().double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()]
        for n, p in model.named_parameters()
    }
    no = torch.tensor(False)
    for step in range(1, 6):
        scale = torch.tensor(1.0 + step)
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            by_hand(
                state[name][0],
                p.grad.double() / scale,
                *state[name][1:],
                step=step,
                lr=0.01,
                decay=0.1 if p.ndim > 1 else 0,
            )
        optimizer.step(lr=0.01, grad_scale=scale, skip=no)
        assert all(p.grad is None for p in model.parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), state[name][0], atol=1e-6, rtol=1e-5)


def test_a_skipped_step_changes_nothing():
    model = nn.Linear(4, 4)
    optimizer = Optimizer(load_config().optim, model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step(lr=0.1, grad_scale=torch.tensor(1.0), skip=torch.tensor(True))
    state = optimizer.state_dict()
    assert state["num_updates"] == 0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(not moment.any() for moments in state["moments"].values() for moment in moments.values())


def test_global_norm_of_plain_gradients():
    gradients = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]]), torch.tensor([12.0])]
    assert global_norm(gradients).item() == pytest.approx(13)
