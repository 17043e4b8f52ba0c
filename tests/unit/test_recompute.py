"""What is dropped is made again bit for bit, once, and saves the bytes that arithmetic promises."""

import gc
import itertools
import logging
import random
import re
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support import fork
from torch import nn
from torch.profiler import ProfilerActivity, profile

from shardwright.conf.schema import (
    BudgetRecomputeConfig,
    FullRecomputeConfig,
    NoRecomputeConfig,
    SelectiveRecomputeConfig,
)
from shardwright.kernels import Kernels, attention, rms_norm
from shardwright.models.blocks import Context, rotary_angles
from shardwright.models.llama.model import Layer
from shardwright.parallel.plan import PlanError
from shardwright.parallel.products import Unsplit, WeightGradients
from shardwright.parallel.provenance import RecomputedBlock
from shardwright.parallel.recompute import recompute
from shardwright.parallel.recompute_budget import GIB, Choice, choose, measure_saved_bytes
from shardwright.parallel.tensor import SharedProducts

B, T, C, I, H, K, D = 2, 24, 32, 80, 4, 2, 8  # as in models/blocks.py; I: intermediate size
TOKENS = B * T
NONE, FULL = NoRecomputeConfig(kind="none"), FullRecomputeConfig(kind="full")
SDPA = Kernels(attention=attention.sdpa, rms_norm=rms_norm.native)
ALL = ("norms", "rope", "swiglu", "q", "k", "v", "o", "gate", "up", "down")
SETS = [("norms", "rope", "swiglu"), ("q", "k", "v"), ("rope", "q", "k"), ("norms", "swiglu", "gate", "up"), ALL]


def selective(*ops):
    return SelectiveRecomputeConfig(kind="selective", ops=ops)


def budget(num_bytes):
    return BudgetRecomputeConfig(kind="budget", gib=num_bytes / GIB)


def make_layers(count=2, *, kernels=None, dtype=torch.float32, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": C, "intermediate_size": I, "num_heads": H, "num_kv_heads": K, "head_dim": D}
    config = SimpleNamespace(**sizes | {"norm_eps": 1e-5, "sliding_window": None, "parallel_block": False} | options)
    layers = nn.ModuleList(Layer(config, kernels or Kernels()) for _ in range(count))
    for p in layers.parameters():
        nn.init.normal_(p, std=0.1)
    return layers.to(dtype)


def make_context():
    positions = torch.cat([torch.arange(10), torch.arange(T - 10)]).expand(B, T)
    bounds = torch.tensor([0, 10, T, T + 10, 2 * T], dtype=torch.int32)
    cos, sin = rotary_angles(positions, D, 1e4, None)
    return Context(positions_BT=positions, bounds=bounds, longest=T - 10, cos_BTD=cos, sin_BTD=sin)


CONTEXT = make_context()


def make_input(dtype=torch.float32, seed=1):
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def forward(layers, x):
    for layer in layers:
        x = layer(x, CONTEXT)
    return x


def loss_of(out):
    return (out.float() * torch.linspace(-1, 1, C)).square().sum()


def gradients(layers, x):
    loss = loss_of(forward(layers, x))
    return [loss.detach(), *torch.autograd.grad(loss, [x, *layers.parameters()])]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(bool(a.abs().sum() > 0) for a in theirs)


@pytest.mark.parametrize("config", [FULL, *(selective(*ops) for ops in SETS), budget(150_000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", [Kernels(), SDPA], ids=["reference", "torch"])
def test_gradients_are_the_same_bit_for_bit(config, dtype, kernels):
    for options in ({}, {"parallel_block": True}, {"sliding_window": 5}, {"num_kv_heads": H}):
        make = lambda: make_layers(kernels=kernels, dtype=dtype, **options)  # noqa: B023, E731
        layers = make()
        recompute(layers, config)
        assert_same(gradients(layers, make_input(dtype)), gradients(make(), make_input(dtype)))


def count_calls(layers):
    """Count the runs of every leaf module and kernel, those of `rope` by pairs."""
    calls = {}

    def counted(name, function):
        def call(*args):
            calls[name] = calls.get(name, 0) + 1
            return function(*args)

        return call

    for layer in layers:
        for name, module in layer.named_modules():
            if not [*module.children()]:
                module.forward = counted(name.rpartition(".")[2], module.forward)
        for part in (layer.attention, layer.feed_forward):
            part.kernels = Kernels(rope=counted("rope", Kernels().rope), swiglu=counted("swiglu", Kernels().swiglu))
    return calls


@pytest.mark.parametrize("ops", SETS, ids=str)
def test_each_op_runs_again_once_or_not_at_all(ops):
    layers = make_layers(3, kernels=SDPA)
    calls = count_calls(layers)
    recompute(layers, selective(*ops))
    once = {"attention_norm": 3, "feed_forward_norm": 3, "rope": 6, "swiglu": 3}
    once |= dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 3)
    loss = loss_of(forward(layers, make_input()))
    assert calls == once
    loss.backward()
    unused = {"o", "down"}  # their outputs go into a sum, which saves nothing
    if ops == ("q", "k", "v"):
        unused |= {"q", "k"}  # nor does the rotation save its inputs
    again = {name.replace("norms", "attention_norm") for name in set(ops) - unused}
    again |= {"feed_forward_norm"} if "norms" in ops else set()
    assert calls == {name: count * (2 if name in again else 1) for name, count in once.items()}


def allocated(function):
    """Run `function`; return its result and what the allocator has handed out and not got back (bytes)."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        result = function()
        gc.collect()
    events = measured.profiler.kineto_results.events()
    return result, sum(event.nbytes() for event in events if event.name() == "[memory]")


def saved_bytes(layers, config, dtype=torch.float32):
    """What the allocator has handed out in a forward, less the output, and what we measure ourselves."""
    recompute(layers, config)
    x = make_input(dtype)
    forward(layers, x)  # a budget is divided here
    out, total = allocated(lambda: forward(layers, x))
    return total - out.nbytes, measure_saved_bytes(lambda: forward(layers, x))


E_Q, E_KV = TOKENS * H * D, TOKENS * K * D


@pytest.mark.parametrize(
    ("ops", "values"),
    [
        (("norms",), 2 * TOKENS * C),  # both norms' outputs
        (("swiglu",), TOKENS * I),  # input of down
        (("gate", "up"), 2 * TOKENS * I),
        (("norms", "swiglu", "gate", "up"), 2 * TOKENS * C + 3 * TOKENS * I),
        (("rope",), 0),  # keeps the products instead of the rotated
        (("rope", "q", "k"), E_Q + E_KV),
        (("v",), E_KV),
        (("o", "down"), 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_bytes_follow_from_arithmetic(ops, values, dtype):
    make = lambda: make_layers(1, kernels=SDPA, dtype=dtype, num_kv_heads=K)  # noqa: E731
    whole, whole_measured = saved_bytes(make(), NONE, dtype)
    less, less_measured = saved_bytes(make(), selective(*ops), dtype)
    print(ops, whole, whole_measured, less, less_measured)
    assert whole_measured - less_measured == values * dtype.itemsize
    assert abs(whole - whole_measured) < 100 and abs(less - less_measured) < 100  # scalars on the way


def test_full_keeps_the_input_only():
    between = 2 * TOKENS * C * 4  # of three layers
    allocator, measured = saved_bytes(make_layers(3), FULL)
    assert measured == between and abs(allocator - between) < 100
