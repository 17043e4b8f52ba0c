"""LAMB against the algorithm written out, on every layout, clipped, skipped and resumed. AdamW: see test_trainer."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from support import assert_close, curve, fork, records, small, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from shardwright.conf.load import load_config
from shardwright.kernels import optimizer as op
from shardwright.parallel.gradients import global_norm, local, sharded_over, square_norms
from shardwright.trainer.optim import Optimizer

NO, YES, ONE = torch.tensor(False), torch.tensor(True), torch.tensor(1.0)


def make(*overrides):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False))
    nn.init.zeros_(model[2].weight)
    return model, Optimizer(load_config(["optim=lamb", *overrides]).optim, model)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_hand(w, gradient, m, v, *, step, lr, decay, is_matrix):
    """Algorithm 2 of arXiv 1904.00962, in float64."""
    beta1, beta2, eps = 0.9, 0.95, 1e-6
    m.mul_(beta1).add_((1 - beta1) * gradient)
    v.mul_(beta2).add_((1 - beta2) * gradient**2)
    update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    ratio = 1.0
    if is_matrix:
        update = update + decay * w
        if w.norm() > 0 and update.norm() > 0:
            ratio = w.norm() / update.norm()
    w.sub_(lr * ratio * update)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lamb_is_lamb(decay):
    model, optimizer = make("optim.beta2=0.95", f"optim.weight_decay={decay}")
    state = {
        n: [p.double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()] for n, p in values(model).items()
    }
    for step in range(1, 9):
        scale, lr = torch.tensor(0.5 + step), 0.01 * step
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            hyper = {"step": step, "lr": lr, "decay": decay, "is_matrix": p.ndim > 1}
            by_hand(state[name][0], p.grad.double() / scale, *state[name][1:], **hyper)
        optimizer.step(lr=lr, grad_scale=scale, skip=NO)
        assert all(p.grad is None for p in model.parameters())
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.double(), state[name][0], atol=2e-6, rtol=2e-6)
    saved = optimizer.state_dict()
    assert saved["num_updates"] == 8
    for name, moments in saved["moments"].items():
        torch.testing.assert_close(moments["exp_avg"].double(), state[name][1], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(moments["exp_avg_sq"].double(), state[name][2], atol=1e-6, rtol=1e-5)


def test_lamb_without_matrices():
    model = nn.LayerNorm(4)
    optimizer = Optimizer(load_config(["optim=lamb"]).optim, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(lr=0.1, grad_scale=ONE, skip=NO)
    torch.testing.assert_close(model.weight.detach(), torch.full((4,), 0.9), atol=1e-5, rtol=0)


def test_nothing_to_move_by_is_no_nan():
    model, optimizer = make("optim.weight_decay=0")
    before = values(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(lr=0.1, grad_scale=ONE, skip=NO)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def run_steps(gradients, skips, *overrides):
    """Weights and state after one step per (factor of the gradient, divisor) with the given decisions to skip."""
    model, optimizer = make(*overrides)
    for i, ((factor, scale), skip) in enumerate(zip(gradients, skips, strict=True)):
        generator = torch.Generator().manual_seed(i if factor == factor else 99)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * factor
        optimizer.step(lr=0.02, grad_scale=torch.tensor(scale), skip=skip)
    return values(model), optimizer.state_dict()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(wrong):
    """Not the weights, not the moments, not the number of updates: bit for bit as before it."""
    weights, state = run_steps([(1.0, 1.0)] * 2, [NO] * 2)
    for scale in (1.0, wrong):  # the norm that the gradient is divided by is not finite either
        again, other = run_steps([(1.0, 1.0), (1.0, 1.0), (wrong, scale)], [NO, NO, YES])
        assert other["num_updates"] == state["num_updates"] == 2
        assert all(torch.equal(weights[name], again[name]) for name in weights)
        for name, moments in state["moments"].items():
            assert all(torch.equal(moments[key], other["moments"][name][key]) for key in moments)


def test_clipping_divides_the_gradient():
    clipped, plain = run_steps([(8.0, 8.0)] * 3, [NO] * 3)[0], run_steps([(1.0, 1.0)] * 3, [NO] * 3)[0]
    unclipped = run_steps([(1.0, 1.0), (8.0, 1.0), (1.0, 1.0)], [NO] * 3)[0]
    for name in plain:
        torch.testing.assert_close(clipped[name], plain[name])
    assert not torch.allclose(unclipped["0.weight"], plain["0.weight"], atol=1e-4)


def test_square_norms_keep_their_order():
    tensors = [torch.tensor([3.0, 4.0]), torch.zeros(0), torch.tensor([[2.0]])]
    assert square_norms(tensors, [sharded_over(t) for t in tensors]).tolist() == [25.0, 0.0, 4.0]


def on_a_mesh(update):
    """Three steps of a model split over a tensor axis and then by FSDP2: whole weights, norms, kinds of placement."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    whole, _ = make()
    model, _ = make()
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["shard"])
    optimizer = Optimizer(load_config(["optim=lamb"]).optim, model, update)
    generator, norms = torch.Generator().manual_seed(1), []
    for _ in range(3):
        for name, p in model.named_parameters():
            full = torch.randn(whole.get_parameter(name).shape, generator=generator)
            sizes, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
            box = full[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
            p.grad = DTensor.from_local(box, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
        norms.append(global_norm(p.grad for p in model.parameters()).item())
        optimizer.step(lr=0.02, grad_scale=ONE, skip=NO)
    squares = square_norms([local(p) for p in model.parameters()], [sharded_over(p) for p in model.parameters()])
    kinds = {type(placement).__name__ for p in model.parameters() for placement in p.placements}
    weights = {name: p.full_tensor().detach().numpy() for name, p in model.named_parameters()}
    dist.destroy_process_group()
    return weights, norms, squares.tolist(), kinds


ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs kernels that are interpreted")


@pytest.mark.parametrize("update", [op.reference, pytest.param(op.triton, marks=ON_CPU)])
def test_norms_are_of_whole_parameters_on_every_mesh(update):
    model, optimizer = make()
    generator, expected = torch.Generator().manual_seed(1), []
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        expected.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        optimizer.step(lr=0.02, grad_scale=ONE, skip=NO)
    for weights, norms, squares, kinds in fork(4, on_a_mesh, update):
        assert {"Shard", "_StridedShard"} <= kinds
        assert norms == pytest.approx(expected, rel=1e-6)
        assert squares == pytest.approx([p.square().sum().item() for p in model.parameters()], rel=1e-5)
        for name, p in model.named_parameters():
            torch.testing.assert_close(torch.from_numpy(weights[name]), p.detach(), atol=1e-6, rtol=1e-5)


STEPS = ["optim=lamb", "optim.peak_lr=0.02", "train.num_steps=20"]


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    fork(1, train, small(corpus, folder, *STEPS))
    return curve(folder)


@pytest.mark.parametrize(
    ("processes", "layout"),
    [*(pytest.param(n, [], marks=pytest.mark.slow) for n in (2, 4)), (4, ["parallel.replicate=2"])],
    ids=str,
)
def test_same_run_on_every_layout(corpus, tmp_path, alone, processes, layout):
    fork(processes, train, small(corpus, tmp_path, *STEPS, *layout))
    assert alone[-1][0] < alone[0][0] - 0.5, "it learns"
    assert_close(curve(tmp_path), alone)


def killed(overrides):
    def kill(run, step, batches):
        if step == 12:
            os.kill(os.getpid(), signal.SIGKILL)

    train(overrides, kill)


def test_resumed_bit_identical(corpus, tmp_path, alone):
    overrides = small(corpus, tmp_path, *STEPS, "checkpoint.every_steps=5")
    assert fork(1, killed, overrides) == [-signal.SIGKILL]
    fork(1, train, overrides)
    assert curve(tmp_path) == alone
    assert max(records(tmp_path)) == 20
