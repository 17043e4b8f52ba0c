"""Optimizer kernels against torch's AdamW, our LAMB and float64; many tensors at once; steps that are skipped."""

from dataclasses import replace

import pytest
import torch

from shardwright.conf.load import load_config
from shardwright.kernels import optimizer as op
from shardwright.kernels.op import Situation
from shardwright.kernels.triton import optimizer as opt
from shardwright.kernels.triton import optimizer_tables as tables
from shardwright.trainer.optim import Optimizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HYPER = op.Hyper(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
VALUES = ["optim.beta1=0.9", "optim.beta2=0.999", "optim.eps=1e-8", "optim.weight_decay=0.1"]  # the same
LAMB = load_config(["optim=lamb", *VALUES]).optim
SHORT = torch.bfloat16 if DEVICE == "cuda" else torch.float16


def scalars(lr=0.01, step=1.0, multiplier=1.0, skip=False):
    lr, step, multiplier = (torch.tensor(x, dtype=torch.float32, device=DEVICE) for x in (lr, step, multiplier))
    return opt.Scalars(lr=lr, step=step, multiplier=multiplier, skip=torch.tensor(skip, device=DEVICE))


def make_shard(size, seed=0, copy=None):
    generator = torch.Generator().manual_seed(seed)
    param = torch.randn(size, generator=generator).to(DEVICE)
    zeros = torch.zeros(size, device=DEVICE)
    copy = None if copy is None else torch.zeros(size, dtype=copy, device=DEVICE)
    return opt.Shard(param=param, exp_avg=zeros, exp_avg_sq=zeros.clone(), copy=copy)


def gradients(size, count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(99)
    return [(torch.randn(size, generator=generator) * 10.0 ** (i % 3 - 1)).to(DEVICE, dtype) for i in range(count)]


def clones(shard):
    return [x.clone() for x in shard.tensors]


def assert_twice(ours, theirs, truth):
    error, allowed = ((x.double() - truth).norm() for x in (ours, theirs))
    assert error <= 2 * allowed + 1e-7 * truth.norm(), (error, allowed)


def torch_adamw(param, grads, lrs, multiplier, dtype):
    """Parameters and moments after one step per gradient, by torch's AdamW without fusion."""
    p = torch.nn.Parameter(param.to(dtype))
    adamw = torch.optim.AdamW([p], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, foreach=False)
    for grad, lr in zip(grads, lrs, strict=True):
        adamw.param_groups[0]["lr"] = lr
        p.grad = grad.to(dtype) * multiplier
        adamw.step()
    return p.detach(), adamw.state[p]["exp_avg"], adamw.state[p]["exp_avg_sq"]


@pytest.mark.parametrize("config", [None, *opt.CONFIGS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_adamw_is_torchs(dtype, config):
    size = 1000 if config is None else 2 * config.blocks["BLOCK"] + 37
    shard, grads, lrs = make_shard(size), gradients(size, 6, dtype), [0.01 * (i + 1) for i in range(6)]
    start = shard.param.clone()
    for i, (grad, lr) in enumerate(zip(grads, lrs, strict=True)):
        now = scalars(lr=lr, step=i + 1.0, multiplier=0.25)
        opt.launch_adamw(shard.tensors, [grad], now.arguments, HYPER.arguments, config)
    theirs, truth = (torch_adamw(start, grads, lrs, 0.25, d) for d in (torch.float32, torch.float64))
    for three in zip(shard.tensors, theirs, truth, strict=True):
        assert_twice(*three)


@pytest.mark.parametrize("step", [1.0, 30.0, 499.0, 501.0, 1e6])
def test_bias_corrections_lose_no_digits(step):
    shard, grad = make_shard(64), gradients(64, 1)[0]
    before = [x.double() for x in shard.tensors]
    opt.adamw_(shard, grad, scalars(step=step), HYPER)
    m, v = 0.1 * grad.double(), (1 - 0.999) * grad.double().square()
    direction = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    moved = before[0] - 0.01 * (direction + 0.1 * before[0])
    torch.testing.assert_close(shard.param.double(), moved, rtol=2e-7, atol=1e-8 + 1e-8 * direction.abs().max().item())


@pytest.mark.parametrize("size", [7, 1024, 3000])
def test_adamw_writes_the_copy(size):
    shard = make_shard(size, copy=SHORT)
    opt.adamw_(shard, gradients(size, 1)[0], scalars(), HYPER)
    assert torch.equal(shard.copy, shard.param.to(SHORT))


MATRICES = {"a": (3, 500), "b": (1, 1), "c": (40, 70), "zeros": (5, 9)}
ALIGNED = {"a": (8, 160), "b": (4, 4), "c": (40, 70), "zeros": (6, 8)}


def lamb_step(shard, grad, segments, now, hyper):
    opt.lamb_apply_(shard, opt.lamb_moments_(shard, grad, segments, now, hyper), segments, now, hyper)


def lamb_exactly(params, states, grads, lr, step):
    """Algorithm 2 of arXiv 1904.00962, in float64."""
    for p, (m, v), grad in zip(params, states, grads, strict=True):
        m.lerp_(grad.double(), 0.1)
        v.lerp_(grad.double().square(), 1 - 0.999)
        u = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8) + 0.1 * p
        ratio = p.norm() / u.norm() if p.norm() > 0 and u.norm() > 0 else 1.0
        p -= lr * ratio * u


@pytest.mark.parametrize(("shapes", "config"), [(ALIGNED, None), *((MATRICES, config) for config in opt.CONFIGS)])
def test_lamb_is_ours(shapes, config):
    model = torch.nn.ParameterDict({name: torch.randn(shape) for name, shape in shapes.items()}).to(DEVICE)
    torch.nn.init.zeros_(model["zeros"])
    theirs = Optimizer(LAMB, model)
    flat = torch.cat([p.detach().flatten() for p in model.values()])
    zeros = torch.zeros_like(flat)
    copy = torch.zeros_like(flat, dtype=SHORT)
    shard = opt.Shard(param=flat, exp_avg=zeros, exp_avg_sq=zeros.clone(), copy=copy)
    sizes = torch.tensor([p.numel() for p in model.values()])
    segments = opt.Segments([0, *sizes.cumsum(0).tolist()], flat.device, config)
    exact = [p.detach().double() for p in model.values()]
    states = [(torch.zeros_like(p), torch.zeros_like(p)) for p in exact]
    for i, grad in enumerate(gradients(len(flat), 3)):
        parts = [g.view_as(p) for g, p in zip(grad.split(sizes.tolist()), exact, strict=True)]
        for p, g in zip(model.values(), parts, strict=True):
            p.grad = g.clone()
        divisor = torch.tensor(4.0, device=DEVICE)
        theirs.step(lr=0.02 * i, grad_scale=divisor, skip=torch.tensor(False, device=DEVICE))
        lamb_step(shard, grad, segments, scalars(lr=0.02 * i, step=i + 1.0, multiplier=0.25), HYPER)
        lamb_exactly(exact, states, [g / 4 for g in parts], 0.02 * i, i + 1)
    moments = theirs.state_dict()["moments"].values()
    for i, (p, plain, kept) in enumerate(zip(exact, model.values(), moments, strict=True)):
        ours = [x.split(sizes.tolist())[i].view_as(p) for x in shard.tensors[:3]]
        for three in zip(ours, (plain.detach(), *kept.values()), (p, *states[i]), strict=True):
            assert_twice(*three)
    assert torch.equal(shard.copy, shard.param.to(SHORT))


def test_norms_of_a_split_tensor_add_up():
    """The caller sums square norms over processes between the launches."""
    whole, grad = make_shard(5000), gradients(5000, 1)[0]
    halves = [opt.Shard(**{k: getattr(whole, k)[part].clone() for k in ("param", "exp_avg", "exp_avg_sq")})
              for part in (slice(0, 2100), slice(2100, 5000))]  # fmt: skip
    segments = [opt.Segments(offsets, grad.device) for offsets in ([0, 2000, 2100], [0, 2900])]
    squares = [
        opt.lamb_moments_(h, g, s, scalars(), HYPER)
        for h, g, s in zip(halves, grad.split([2100, 2900]), segments, strict=True)
    ]
    squares[0][:, 1:] += squares[1]
    squares[1] = squares[0][:, 1:]
    for half, square, segment in zip(halves, squares, segments, strict=True):
        opt.lamb_apply_(half, square, segment, scalars(), HYPER)
    lamb_step(whole, grad, opt.Segments([0, 2000, 5000], grad.device), scalars(), HYPER)
    torch.testing.assert_close(torch.cat([h.param for h in halves]), whole.param, rtol=1e-6, atol=1e-7)


SKIPS = [dict(skip=True), dict(multiplier=float("nan")), dict(multiplier=float("inf")), dict(multiplier=-float("inf"))]


@pytest.mark.parametrize("why", SKIPS)
def test_a_skipped_step_changes_nothing(why):
    shard, bad = make_shard(3000, copy=SHORT), torch.full((3000,), float("nan"), device=DEVICE)
    segments = opt.Segments([0, 1700, 3000], shard.param.device)
    lamb_step(shard, gradients(3000, 1)[0], segments, scalars(), HYPER)
    before = clones(shard)
    for step in (0.0, 2.0):
        opt.adamw_(shard, bad, scalars(step=step, **why), HYPER)
        lamb_step(shard, bad, segments, scalars(step=step, **why), HYPER)
    assert all(torch.equal(x, old) for x, old in zip(shard.tensors, before, strict=True))


def test_a_vector_under_lamb_is_adamw_without_decay():
    """As in trainer.optim: norms and biases are neither decayed nor scaled by a ratio of norms."""
    bias = torch.nn.ParameterDict({"bias": torch.randn(300), "matrix": torch.randn(2, 2)}).to(DEVICE)
    shard = opt.Shard(param=bias["bias"].detach().clone(), **make_moments(300))
    theirs = Optimizer(LAMB, bias)
    no_decay = op.Hyper(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
    for i, grad in enumerate(gradients(300, 3)):
        bias["bias"].grad, bias["matrix"].grad = grad.clone(), grad[:4].view(2, 2).clone()
        theirs.step(lr=0.1, grad_scale=torch.ones((), device=DEVICE), skip=torch.tensor(False, device=DEVICE))
        opt.adamw_(shard, grad, scalars(lr=0.1, step=i + 1.0), no_decay)
    torch.testing.assert_close(shard.param, bias["bias"].detach(), rtol=1e-6, atol=1e-6)


def train(update, config):
    """Losses of steps with an odd model, clipped by various norms, the fourth skipped; then its weights and state."""
    torch.manual_seed(3)
    layers = torch.nn.Linear(7, 33), torch.nn.LayerNorm(33), torch.nn.GELU(), torch.nn.Linear(33, 1)
    model = torch.nn.Sequential(*layers).to(DEVICE)
    optimizer, losses = Optimizer(config, model, update), []
    for step in range(8):
        x = torch.randn(16, 7).to(DEVICE)  # the same on each device
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        scale = torch.tensor(1.0 + step / 3, device=DEVICE)
        optimizer.step(lr=0.01 * (step + 1), grad_scale=scale, skip=torch.tensor(step == 3, device=DEVICE))
        losses.append(loss.detach())
    state = optimizer.state_dict()
    moments = [x for pair in state["moments"].values() for x in pair.values()]
    return [torch.stack(losses), *(p.detach() for p in model.parameters()), *moments], state["num_updates"]


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_a_run_is_that_of_the_reference(kind):
    config = load_config([f"optim={kind}", *VALUES]).optim
    (ours, updates), (theirs, expected) = (train(update, config) for update in (op.triton, op.reference))
    assert updates == expected == 7
    assert theirs[0][-1] < 0.8 * theirs[0][0], "it learns"
    tolerance = 1e-6 if DEVICE == "cpu" else 1e-5  # products on a GPU may differ from run to run
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sum_squares", [None, lambda squares: squares])
def test_parts_may_be_empty_and_gradients_lie_apart(sum_squares):
    """A process may have no part of a small parameter."""
    now = op.Now(
        lr=0.1,
        step=torch.ones((), device=DEVICE),
        grad_scale=torch.ones((), device=DEVICE),
        skip=torch.tensor(False, device=DEVICE),
    )
    results = []
    for update in (op.triton, op.reference):
        grad = gradients(60, 1)[0]
        parts = [
            op.Part(param=make_shard(size).param.view(shape), grad=g, **make_moments(shape))
            for size, shape, g in ((0, (0, 5), grad[:0].view(0, 5)), (60, (6, 10), grad.view(10, 6).T))
        ]
        if update is op.reference:
            parts[1] = replace(parts[1], grad=parts[1].grad.contiguous())
        update(parts, now, HYPER, sum_squares)
        results.append(parts[1].param)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert not torch.equal(results[0], make_shard(60).param.view(6, 10))


# Elements, and how many of them a tensor starts after a multiple of 16 bytes.
MANY = [(0, 0), (5, 0), (16, 0), (1040, 0), (1040, 1), (1500, 0), (1024, 2), (1, 3), (48, 0)]


@pytest.fixture
def four_per_launch(monkeypatch):
    """Addresses, so that a table takes several launches; interpreted, each takes long."""
    monkeypatch.setattr(tables, "_PER_LAUNCH", 4)
    tables._kept.cache_clear()


def lying(x, offset):
    """A copy that starts so many elements after a multiple of 16 bytes."""
    moved = torch.empty(len(x) + offset, dtype=x.dtype, device=DEVICE)[offset:]
    return moved.copy_(x)


def many_shards(copy=None):
    shards = []
    for i, (size, offset) in enumerate(MANY):
        plain = make_shard(size, seed=i)
        named = {name: lying(getattr(plain, name), offset) for name in ("param", "exp_avg", "exp_avg_sq")}
        extra = None if copy is None else torch.zeros(size, dtype=copy, device=DEVICE)
        shards.append(opt.Shard(**named, copy=extra))
    return shards


def many_gradients(step, short):
    """Of every third tensor in `short`; at odd addresses in the third step."""
    return [
        lying(gradients(size, step + 1, short if i % 3 == 0 else torch.float32)[step], int(step == 2))
        for i, (size, _) in enumerate(MANY)
    ]


def update_all(kind, shards, grads, now):
    tensors = [x for shard in shards for x in shard.tensors]
    if kind == "adamw":
        opt.launch_adamw(tensors, grads, now.arguments, HYPER.arguments, opt.CONFIGS[1])
        return
    tile = [512, 4]
    squares = opt.launch_lamb_moments(tensors, grads, now.arguments, HYPER.arguments, tile)
    assert now.skip or all((x == 0).all() for x, grad in zip(squares.T, grads, strict=True) if not len(grad))
    opt.launch_lamb_apply(tensors, squares, now.arguments, HYPER.arguments, tile)


@pytest.mark.parametrize("copy", [None, SHORT])
@pytest.mark.parametrize("kind", ["adamw", "lamb"])
@pytest.mark.usefixtures("four_per_launch")
def test_all_at_once_is_one_by_one(kind, copy):
    """Bit for bit, with gradients of two dtypes, at other addresses in every step, the second of which is skipped."""
    together, alone, kept = many_shards(copy), many_shards(copy), []
    plain = [op.Part(**{n: getattr(s, n) for n in ("param", "exp_avg", "exp_avg_sq")}, grad=s.param)
             for s in many_shards()[1:]]  # fmt: skip
    for step in range(3):
        grads, now = many_gradients(step, SHORT), scalars(lr=0.02, step=max(step, 1), multiplier=0.25, skip=step == 1)
        kept.append(grads)  # so that the next ones lie elsewhere
        update_all(kind, together, grads, now)
        for shard, grad in zip(alone, grads, strict=True):
            update_all(kind, [shard], [grad], now)
        same = op.Now(lr=0.02, step=now.step, grad_scale=1 / now.multiplier, skip=now.skip)
        parts = [replace(part, grad=grad.float()) for part, grad in zip(plain, grads[1:], strict=True)]
        op.reference(parts, same, HYPER, None if kind == "adamw" else lambda squares: squares)
    for ours, single in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.tensors, single.tensors, strict=True))
        assert copy is None or torch.equal(ours.copy, ours.param.to(copy))
    for ours, part in zip(together[1:], plain, strict=True):
        torch.testing.assert_close(ours.param, part.param, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(ours.exp_avg, part.exp_avg, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(ours.exp_avg_sq, part.exp_avg_sq, rtol=2e-6, atol=2e-6)


@pytest.fixture
def launched(monkeypatch, four_per_launch):
    """Names of the kernels that are launched."""
    names = []

    def launch(kernel, *args, **constants):
        names.append(kernel.fn.__name__)
        plain(kernel, *args, **constants)

    plain = tables.launch_kernel
    for module in (opt, tables):
        monkeypatch.setattr(module, "launch_kernel", launch)
    return names


@pytest.mark.parametrize(
    ("sum_squares", "updates"), [(None, ["adamw"]), (lambda x: x, ["lamb_moments", "segment_sums", "lamb_apply"])]
)
def test_launches_are_as_few_for_many_tensors(sum_squares, updates, launched):
    def part():
        return op.Part(param=make_shard(16).param, grad=gradients(16, 1)[0], **make_moments(16))

    parts, scale = [part() for _ in range(4)], torch.ones((), device=DEVICE)
    now = op.Now(lr=0.1, step=scale, grad_scale=scale, skip=scale < 0)
    expected = [
        (parts, ["write_addresses"] * 4),  # of parameters and moments 3, and 1 of gradients
        (parts, []),
        ([replace(one, grad=one.grad.clone()) for one in parts], ["write_addresses"]),
        (parts, []),
    ]
    for those, writes in expected:
        launched.clear()
        op.triton(those, now, HYPER, sum_squares)
        assert launched == writes + updates


def test_a_parameter_without_gradient_rests():
    """As where a layer is not used in some steps; the tables are then of other tensors."""
    config = load_config(["optim=adamw", *VALUES]).optim
    results = []
    for update in (op.triton, op.reference):
        torch.manual_seed(0)
        model = torch.nn.ParameterList([torch.randn(4, 9), torch.randn(33), torch.randn(5, 16)]).to(DEVICE)
        optimizer = Optimizer(config, model, update)
        for step in range(4):
            before = [p.detach().clone() for p in model]
            for i, p in enumerate(model):
                p.grad = None if i == step else torch.randn(p.shape).to(DEVICE)
            optimizer.step(lr=0.1, grad_scale=torch.ones((), device=DEVICE), skip=torch.tensor(False, device=DEVICE))
            assert [torch.equal(p, old) for p, old in zip(model, before, strict=True)] == [i == step for i in range(3)]
        results.append([p.detach() for p in model])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_tiles_are_in_the_order_of_their_kinds():
    full, half = torch.float32, torch.float16
    flags = (True, True, True, False, True), (True, False, True, True, True)
    tiles = tables.tiles_of((64, 32, 40, 16, 0), (half, half, full, half, half), flags, 16, torch.device("cpu"))
    assert tiles.ranges == {(half, True): (0, 4), (half, False): (4, 3), (full, False): (7, 3)}
    assert tiles.owner.tolist() == [0, 0, 0, 0, 1, 1, 3, 2, 2, 2]
    assert tiles.first.tolist() == [0, 4, 7, 6, 4] and tiles.sizes.tolist() == [64, 32, 40, 16, 0]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("sum_squares", [None, lambda squares: squares])
def test_a_graph_holds_its_addresses(sum_squares):
    """Replayed after steps with gradients elsewhere, whose tables take the place of those of the graph, if any."""
    scale = torch.ones((), device=DEVICE)
    now = op.Now(lr=0.01, step=scale, grad_scale=scale, skip=scale < 0)

    def new_parts():
        return [op.Part(param=make_shard(n, seed=n).param, grad=torch.zeros(n, device=DEVICE), **make_moments(n))
                for n in (2048, 77, 5000)]  # fmt: skip

    ours, theirs = new_parts(), new_parts()
    sources = gradients(5000, 6)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op.triton(new_parts(), now, HYPER, sum_squares)  # what is compiled and made once
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        op.triton(ours, now, HYPER, sum_squares)
    for step, source in enumerate(sources):
        elsewhere = [replace(part, grad=source[: part.grad.numel()].clone()) for part in theirs]
        op.triton(elsewhere, now, HYPER, sum_squares)
        if step % 2:
            op.triton([replace(a, grad=b.grad) for a, b in zip(ours, elsewhere, strict=True)], now, HYPER, sum_squares)
        else:
            for part in ours:
                part.grad.copy_(source[: part.grad.numel()])
            graph.replay()
        tables._kept.cache_clear()
        torch.cuda.empty_cache()
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("param", "exp_avg", "exp_avg_sq"))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_every_stream_has_its_own_table():
    x = torch.ones(16, device=DEVICE)
    here = tables.addresses([x], 1)
    with torch.cuda.stream(torch.cuda.Stream()):
        there = tables.addresses([x], 1)
        torch.cuda.current_stream().synchronize()
    assert here is tables.addresses([x], 1) and here.table.data_ptr() != there.table.data_ptr()
    assert here.table[0] == there.table[0] == x.data_ptr()


def test_the_candidate_is_chosen_on_a_gpu():
    assert op.OP.choose("auto", Situation(device="cuda", dtype=torch.bfloat16)) is op.triton
    assert op.OP.choose("auto", Situation(device="cpu", dtype=torch.float32)) is op.reference


def make_moments(size):
    return {name: torch.zeros(size, device=DEVICE) for name in ("exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("config", opt.SUM_CONFIGS)
@pytest.mark.parametrize("sizes", [[1], [4096, 17], [9000, 0, 5]])
def test_square_sum(sizes, config, monkeypatch):
    monkeypatch.setattr(opt, "_MAX_PARTIALS", 2)  # so that programs have several blocks
    tensors = [
        gradients(n, 1, dtype)[0] for n, dtype in zip(sizes, (torch.float32, torch.float16, SHORT), strict=False)
    ]
    ours = opt.launch_square_sum(tensors, config)
    truth = sum(x.double().square().sum() for x in tensors)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=0)
    assert ours.dtype == torch.float32 and ours.ndim == 0
    assert torch.equal(ours, opt.launch_square_sum(tensors, config))


def test_square_sum_shows_what_is_not_finite():
    fine = torch.ones(10, device=DEVICE)
    assert opt.square_sum([fine]).item() == 10
    for bad in (float("nan"), float("inf")):
        assert not opt.square_sum([fine, torch.full((3,), bad, device=DEVICE)]).isfinite()


def test_operators_keep_the_rules_of_torch():
    shard, grad, now = make_shard(50, copy=SHORT), gradients(50, 1)[0], scalars()
    segments = opt.Segments([0, 20, 50], grad.device)
    tensors, grads = segments.cut(shard.tensors), segments.cut([grad])
    rest = now.arguments, HYPER.arguments, segments.launch
    squares = torch.ones(2, 2, device=DEVICE)
    ops = torch.ops.shardwright
    torch.library.opcheck(ops.adamw_, (shard.tensors, [grad], now.arguments, HYPER.arguments))
    torch.library.opcheck(ops.lamb_moments_, (tensors, grads, *rest))
    torch.library.opcheck(ops.lamb_apply_, (tensors, squares, *rest))
    torch.library.opcheck(ops.square_sum, ([grad, grad[:7].half()],))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compilers_see_no_break(backend):
    grad, now, hyper = gradients(300, 1)[0], scalars(), HYPER.arguments

    def step(shard, grad, scalars):
        clipped = [*scalars[:2], scalars[2] / opt.square_sum([grad]).sqrt().clamp(min=1.0), scalars[3]]
        torch.ops.shardwright.adamw_(shard, [grad], clipped, hyper)

    shards = make_shard(300), make_shard(300)
    torch.compile(step, fullgraph=True, backend=backend)(shards[0].tensors, grad, now.arguments)
    step(shards[1].tensors, grad, now.arguments)
    assert all(torch.equal(a, b) for a, b in zip(shards[0].tensors, shards[1].tensors, strict=True))
