"""What is dropped is made again bit for bit, once, and saves the bytes that arithmetic promises."""

import gc
import itertools
import logging
import random
import re
import weakref
from dataclasses import replace
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
from shardwright.parallel.provenance import Recipe, RecomputedBlock
from shardwright.parallel.recompute import recompute
from shardwright.parallel.recompute_budget import GIB, Choice, _hull, choose, measure_saved_bytes
from shardwright.parallel.tensor import SharedForward, SharedProducts

B, T, C, M, H, K, D = 2, 24, 32, 80, 4, 2, 8  # as in models/blocks.py; M: intermediate size
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
    sizes = {"hidden_size": C, "intermediate_size": M, "num_heads": H, "num_kv_heads": K, "head_dim": D}
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


def fused(reference, hoards=False):
    """A kernel as fused ones are: it saves what it takes, and nothing of what it computes on the way."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, call, *tensors):
            ctx.call, ctx.hoard = call, tensors if hoards else ()  # unseen by hooks
            ctx.save_for_backward(*tensors)
            return call(*tensors)

        @staticmethod
        def backward(ctx, gradient):
            tensors = [x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors]
            with torch.enable_grad():
                out = ctx.call(*tensors)
            wanted = [x for x in tensors if x.requires_grad]
            found = iter(torch.autograd.grad(out, wanted, gradient))
            return None, *(next(found) if x.requires_grad else None for x in tensors)

    def function(*args, **kwargs):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        rest = args[len(tensors) :]
        return Fused.apply(lambda *xs: reference(*xs, *rest, **kwargs), *tensors)

    return function


PLAIN = Kernels()  # its rope saves nothing of its input as it is
FUSED = Kernels(attention=fused(PLAIN.attention), rms_norm=fused(PLAIN.rms_norm), swiglu=fused(PLAIN.swiglu))
HOARDING = replace(FUSED, swiglu=fused(PLAIN.swiglu, hoards=True))


@pytest.fixture(scope="module", autouse=True)
def _small_heap():
    """Collecting garbage takes long only because of all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("config", [FULL, *(selective(*ops) for ops in SETS)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", [PLAIN, SDPA, FUSED], ids=["reference", "torch", "fused"])
def test_gradients_are_the_same_bit_for_bit(config, dtype, kernels):
    for options in ({}, {"parallel_block": True, "sliding_window": 5, "num_kv_heads": H}):
        layers, plain = (make_layers(kernels=kernels, dtype=dtype, **options) for _ in range(2))
        recompute(layers, config)
        assert_same(gradients(layers, make_input(dtype)), gradients(plain, make_input(dtype)))


def count_calls(layers):
    """Count the runs of every leaf module, of rope and of swiglu."""
    calls = {}

    def counted(name, function):
        def call(*args):
            calls[name] = calls.get(name, 0) + 1
            return function(*args)

        return call

    for name, module in layers.named_modules():
        if name and not [*module.children()]:
            module.forward = counted(name.rpartition(".")[2], module.forward)
        module.kernels = replace(FUSED, rope=counted("rope", FUSED.rope), swiglu=counted("swiglu", FUSED.swiglu))
    return calls


@pytest.mark.parametrize("ops", SETS, ids=str)
def test_each_op_runs_again_once_or_not_at_all(ops):
    layers = make_layers(3, kernels=FUSED)
    calls = count_calls(layers)
    recompute(layers, selective(*ops))
    norms = ("attention_norm", "feed_forward_norm")
    once = dict.fromkeys((*norms, *ALL[1:]), 3)
    loss = loss_of(forward(layers, make_input()))
    assert calls == once
    loss.backward()
    # Sums do not save what they add (o and down), nor does the rotation save its inputs.
    again = {*ops, *(norms if "norms" in ops else ())} - {"o", "down", *(() if "rope" in ops else ("q", "k"))}
    assert calls == {name: count * (2 if name in again else 1) for name, count in once.items()}


Q, KV = H * D, K * D
KEPT = 3 * C + 2 * (Q + KV) + 3 * M  # norms; q, k, v and attention's output; gate, up, swiglu


@pytest.mark.parametrize(
    ("ops", "values"),
    [
        ((), 0),
        (("norms",), 2 * C),  # both norms' outputs
        (("swiglu",), M),  # the input of down
        (("gate", "up"), 2 * M),
        (("rope",), 0),  # keeps the products instead of the rotated
        (("rope", "q", "k"), Q + KV),
        (("v",), KV),
        (("o", "down"), 0),
        (ALL, 2 * C + Q + 2 * KV + 3 * M),  # left: what goes into the second norm, and attention's output
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_bytes_follow_from_arithmetic(ops, values, dtype):
    layers, x = make_layers(1, kernels=FUSED, dtype=dtype), make_input(dtype)
    recompute(layers, selective(*ops))
    assert measure_saved_bytes(lambda: forward(layers, x)) == (KEPT - values) * TOKENS * dtype.itemsize


def allocated(function):
    """What the allocator has handed out while `function` ran and not got back, less the result (bytes)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        result = function()
    events = measured.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]") - result.nbytes


@pytest.mark.parametrize(("config", "kept"), [(NONE, 3 * KEPT + 2 * C), (FULL, 2 * C), (selective("swiglu"), None)])
def test_the_allocator_agrees(config, kept):
    layers, x = make_layers(3, kernels=FUSED), make_input()
    recompute(layers, config)
    measured = measure_saved_bytes(lambda: forward(layers, x))
    assert abs(allocated(lambda: forward(layers, x)) - measured) <= 100  # numbers that ops hold
    assert kept is None or measured == kept * TOKENS * 4


def results_of_recipes():
    """All recipes that exist, and how many of them hold results."""
    recipes = [x for x in gc.get_objects() if isinstance(x, Recipe)]
    return len(recipes), sum(recipe.results is not None for recipe in recipes)


def test_nothing_is_left_after_backward():
    def watch(gate, up):
        out = FUSED.swiglu(gate, up)
        watched.extend(weakref.ref(x) for x in (gate, up, out))
        return out

    watched, layers = [], make_layers(kernels=replace(FUSED, swiglu=watch))
    recompute(layers, selective(*ALL))
    gc.disable()  # what would need the collector is a leak
    try:
        loss = loss_of(forward(layers, make_input()))
        assert results_of_recipes() == (18, 0)  # a layer's norms, q, k, v, rope, gate, up, swiglu
        loss.backward()
        assert [ref() for ref in watched] == [None] * 12
        assert results_of_recipes() == (0, 0)
    finally:
        gc.enable()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("config", [FULL, selective(*ALL)], ids=str)
def test_two_microbatches_between_forward_and_backward(config, order):
    plain, layers = make_layers(), make_layers()
    recompute(layers, config)
    inputs = [make_input(seed=3), make_input(seed=4)]
    losses = [loss_of(forward(layers, x)) for x in inputs]
    found = {i: torch.autograd.grad(losses[i], [inputs[i], *layers.parameters()]) for i in order}
    for i, x in enumerate(inputs):
        assert_same(found[i], gradients(plain, x)[1:])


def test_a_graph_that_is_retained_can_be_walked_again():
    layers, x = make_layers(), make_input()
    expected = gradients(layers, x)[1:]
    recompute(layers, selective(*ALL))
    loss = loss_of(forward(layers, x))
    wanted = [x, *layers.parameters()]
    for retain in (True, True, False):
        assert_same(torch.autograd.grad(loss, wanted, retain_graph=retain), expected)
        assert results_of_recipes()[1] == 0
    # in parts, as pipelines that split backward do
    loss = loss_of(forward(layers, x))
    (of_input,) = torch.autograd.grad(loss, [x], retain_graph=True)
    assert_same([of_input, *torch.autograd.grad(loss, wanted[1:])], expected)


def test_without_gradients_nothing_is_recorded():
    layers, x = make_layers(), make_input()
    expected = forward(layers, x)
    recompute(layers, selective(*ALL))
    with torch.no_grad():
        assert torch.equal(forward(layers, x), expected)
        assert measure_saved_bytes(lambda: forward(layers, x)) == 0
    assert results_of_recipes() == (0, 0)


def test_unknown_ops_are_refused():
    with pytest.raises(PlanError, match="has 'attention', which no block has; use any of down, gate, k, norms, o, q"):
        recompute(make_layers(), selective("norms", "attention"))


class Convolutional(nn.Module):
    """A block of a user's: other names and layers, conjugates, storages that follow a freed one, in-place use."""

    def __init__(self, in_place=False):
        super().__init__()
        self.mix, self.scale, self.merge = nn.Conv1d(C, C, 1), nn.LayerNorm(C), nn.Linear(C, C)
        self.turn, self.in_place = nn.Linear(C, C, dtype=torch.complex64), in_place

    def forward(self, x):
        for factor in range(8):
            self.scale(x)
            x = x + (x * factor).square()
        y = self.mix(x.transpose(1, 2)).transpose(1, 2)
        y = F.relu(y, inplace=self.in_place)
        z = self.turn(self.scale(y).to(torch.complex64))
        return x + self.merge((z.conj() * z.conj()).imag)


@pytest.mark.parametrize("in_place", [False, True])
def test_blocks_of_any_kind(in_place):
    def run(config):
        torch.manual_seed(0)
        block, x = Convolutional(in_place), (make_input() * 0.01).detach().requires_grad_()
        recompute([block], config)
        loss = loss_of(block(x))
        return [loss.detach(), *torch.autograd.grad(loss, [x, *block.parameters()])]

    for config in (FULL, selective("mix"), selective("norms", "turn"), selective("mix", "norms", "turn", "merge")):
        assert_same(run(config), run(NONE))


def test_saved_tensors_that_were_overwritten_are_refused():
    def spoil(gate, up):
        out = PLAIN.swiglu(gate, up)
        gate.add_(1)
        return out

    layers = make_layers(1, kernels=replace(PLAIN, swiglu=spoil))
    recompute(layers, selective("swiglu"))
    with pytest.raises(RuntimeError, match="changed in place after it was saved"):
        loss_of(forward(layers, make_input())).backward()


def test_an_op_that_is_not_a_function_is_refused():
    layers, calls = make_layers(1), []
    inner = layers[0].feed_forward.gate.forward

    def fickle(x):
        calls.append(x.shape)
        return inner(x) if len(calls) == 1 else inner(x).double()

    layers[0].feed_forward.gate.forward = fickle
    recompute(layers, selective("gate"))
    with pytest.raises(PlanError, match="must depend on its inputs alone"):
        loss_of(forward(layers, make_input())).backward()


class Joint(nn.Module):
    """A block with one product for three, which are views of one storage."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.linspace(-1, 1, 3 * C * C).view(3 * C, C)), 0

    def products(self, x):
        self.calls += 1
        return F.linear(x, self.weight).split(C, -1)

    def forward(self, x):
        q, k, v = self.products(x)
        return x + q * k.sigmoid() * v


def test_one_call_may_make_several_products():
    def run(ops):
        block, x = Joint(), make_input()
        recomputed = RecomputedBlock(block)
        block.products = recomputed.remember(block.products, "q", "k", "v")
        recomputed.ops = frozenset(ops)
        loss = loss_of(block(x))
        return block, [loss.detach(), *torch.autograd.grad(loss, [x, block.weight])]

    (once, expected), (twice, found) = run(()), run(("k",))
    assert (once.calls, twice.calls) == (1, 2)
    assert_same(found, expected)


def test_shared_products_of_a_tensor_group_run_again_once():
    layers = make_layers(1, kernels=FUSED)
    expected = gradients(layers, make_input())
    linears = [getattr(layers[0].attention, name) for name in ("q", "k", "v")]
    shared = SharedProducts(linears, Unsplit(None), WeightGradients())
    calls, inner = [], shared.products
    shared.products = lambda x: (calls.append(1), inner(x))[1]
    for index, linear in enumerate(linears):
        linear.forward = SharedForward(shared, index)
    recompute(layers, selective("norms", "rope", "q", "k", "v"))
    x = make_input()
    loss_of(forward(layers, x)).backward()
    assert len(calls) == 2
    for a, b in zip([x.grad, *(p.grad for p in layers.parameters())], expected[1:], strict=True):
        torch.testing.assert_close(a, b)


def sharded_gradients(config):
    """Gradients of this process's shards; weights are freed between forward and backward."""
    from torch import distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    layers = make_layers(kernels=SDPA)
    recompute(layers, config)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, reshard_after_forward=True, mp_policy=policy)
    for _ in range(2):
        x = make_input(torch.bfloat16, seed=dist.get_rank())
        loss_of(forward(layers, x)).backward()
    return [x.grad.float().numpy(), *(p.grad.to_local().numpy() for p in layers.parameters())]


def all_sharded_gradients():
    return [sharded_gradients(config) for config in (NONE, FULL, selective(*ALL), budget(60_000))]


@pytest.mark.parametrize("processes", [1, 2])
def test_weights_may_be_freed_and_gathered_again(processes):
    for expected, *others in fork(processes, all_sharded_gradients):
        for found in others:
            assert all((a == b).all() for a, b in zip(found, expected, strict=True))


def plan_of(caplog):
    (line,) = [record.message for record in caplog.records if record.message.startswith("recompute of")]
    saved, of = map(float, re.search(r"activations (\S+) of (\S+) GiB", line).groups())
    return line, saved * GIB, of * GIB


@pytest.mark.parametrize("kernels", [PLAIN, SDPA, FUSED, HOARDING], ids=["reference", "torch", "fused", "hoarding"])
@pytest.mark.parametrize(("part", "dtype"), [(0.45, torch.float32), (0.7, torch.bfloat16), (1.0, torch.float32)])
def test_a_budget_is_kept_and_used(caplog, kernels, dtype, part):
    x = make_input(dtype)
    embedded = lambda: forward(layers, x * 1)  # noqa: E731
    caplog.set_level(logging.INFO, "shardwright.parallel")
    layers = make_layers(6, kernels=kernels, dtype=dtype)
    whole = measure_saved_bytes(embedded)
    recompute(layers, budget(part * whole))
    embedded()
    saved = allocated(embedded)
    _, predicted, allowed = plan_of(caplog)
    assert abs(saved - predicted) <= 0.02 * predicted  # three digits are logged
    assert 0.75 * allowed <= saved <= 1.01 * allowed


def test_blocks_may_differ(caplog):
    caplog.set_level(logging.INFO, "shardwright.parallel")

    def make():
        wide = make_layers(1, kernels=FUSED, intermediate_size=2 * M)
        return nn.ModuleList([*make_layers(3, kernels=FUSED), *wide])

    expected = gradients(make(), make_input())
    for num_bytes, words in ((1e9, "4 keep everything"), (4 * TOKENS * C * 4, "4 keep inputs only")):
        caplog.clear()
        layers = make()
        recompute(layers, budget(num_bytes))
        for _ in range(2):
            assert_same(gradients(layers, make_input()), expected)
        assert plan_of(caplog)[0].startswith(f"recompute of 4 blocks: {words}; saved activations")


def test_microbatches_that_are_live_at_once_count(caplog):
    caplog.set_level(logging.INFO, "shardwright.parallel")
    one = (KEPT + C) * TOKENS * 4
    for count, words in ((5, "2 keep everything"), (4.9, "1 keep everything")):
        caplog.clear()
        recompute(layers := make_layers(2, kernels=FUSED), budget(count * one), [4, 1])
        forward(layers, make_input())
        line, saved, _ = plan_of(caplog)
        assert words in line and 4 * one < saved <= 1.01 * count * one


def test_a_budget_below_the_inputs_is_refused():
    layers = make_layers(4)
    recompute(layers, budget(3 * TOKENS * C * 4))
    with pytest.raises(PlanError, match=r"recompute.gib=\S+ is less than what 4 blocks keep at least") as caught:
        forward(layers, make_input())
    least = float(re.search(r"raise it to (\S+) or", str(caught.value))[1])
    assert 1 <= least * GIB / (4 * TOKENS * C * 4) <= 1.02
    recompute(layers := make_layers(4), budget(least * GIB))
    forward(layers, make_input())


def total(choices):
    return sum(choice.saved_bytes for choice in choices), sum(choice.price for choice in choices)


def test_choices_are_near_the_best():
    rng = random.Random(0)
    for _ in range(300):
        options, steps = [], []
        for _ in range(rng.randint(1, 5)):
            count = rng.randint(1, 4)
            sizes = sorted(rng.sample(range(1, 60), count), reverse=True)
            prices = [0, *sorted(rng.sample(range(1, 60), count - 1))]
            options.append([Choice(ops=None, saved_bytes=s, price=p) for s, p in zip(sizes, prices, strict=True)])
            steps += [b.price - a.price for a, b in itertools.pairwise(_hull(options[-1]))]
        totals = [total(combination) for combination in itertools.product(*options)]
        limit = rng.randint(min(size for size, _ in totals), max(size for size, _ in totals))
        chosen = choose(options, limit)
        assert all(choice in block for choice, block in zip(chosen, options, strict=True))
        assert total(chosen)[0] <= limit
        assert total(chosen)[1] <= min(price for size, price in totals if size <= limit) + max(steps, default=0)
