"""Linear maps in FP8: as exact as the format allows, forward and backward, whatever the shapes and values."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from shardwright.kernels import Kernels, linear, op
from shardwright.kernels.op import KernelError, Situation
from shardwright.kernels.triton import fp8, launch
from shardwright.models.blocks import FeedForward
from shardwright.parallel.recompute_budget import FLOPS_PER_BYTE, Meter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
ROUNDING = 2**-4  # of e4m3, relative, at most
STEP = 2**-10 / fp8.LARGEST  # of values near zero, relative to the largest that shares their scale, at most
SUM = 2**-8 if DEVICE == "cuda" else 2**-22  # of tensor cores, which add 32 products with 13 bits below the largest
RECIPES = {"rowwise": linear.fp8_rowwise, "blockwise": linear.fp8_blockwise}
SCALINGS = ("rows", "lines", "squares")
pytest_plugins = ["support_fp8"]
pytestmark = pytest.mark.usefixtures("casts_as_on_a_gpu")


@pytest.fixture(autouse=True)
def products_as_on_a_gpu(monkeypatch):
    """Older releases of torch have no product with scales of rows on the CPU."""

    def multiply(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum):
        assert a.is_contiguous() and b.T.is_contiguous() and not use_fast_accum
        return (a.double() * scale_a @ (b.double() * scale_b)).to(out_dtype)

    if DEVICE == "cpu" and torch.__version__ < (2, 13):
        monkeypatch.setattr(torch, "_scaled_mm", multiply)


def random(*shape, dtype=torch.float32, spread=0.0):
    """Normal values times log-normal ones."""
    return (torch.randn(shape, device=DEVICE) * (spread * torch.randn(shape, device=DEVICE)).exp()).to(dtype)


def run(function, x, weight, grad):
    """Output and gradients in float64."""
    inputs = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    out = function(*inputs)
    return [y.double() for y in (out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype)))]


def errors(function, x, weight, grad):
    """Relative errors, in the norm, of output and gradients."""
    exact = run(linear.reference, *(y.double() for y in (x, weight, grad)))
    found = run(function, x, weight, grad)
    return torch.stack([(a - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)])


def operands(x, weight, grad):
    """The operands of the three products, each with the summed dimension last, and whether it has scales of squares."""
    x, weight, grad = (y.double().flatten(0, -2) for y in (x, weight, grad))
    return [((x, False), (weight, True)), ((grad, False), (weight.T, True)), ((grad.T, False), (x.T, False))]


def rounding(operand, shares_with_rows):
    """An upper bound of the error of each value: relative to it, or to the largest with which it may share its scale."""
    size = operand.abs()
    return ROUNDING * size + STEP * (size.max() if shares_with_rows else size.amax(1, keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", [(3, 7, 80, 304), (1, 130, 272, 48), (2, 128, 128, 128)])
def test_no_value_is_off_by_more_than_its_roundings(recipe, dtype, shape):
    """Output and gradients, element by element, of values of all sizes."""
    torch.manual_seed(0)
    batch, tokens, depth, width = shape
    x = random(batch, tokens, depth, dtype=dtype, spread=1.0)
    weight = random(width, depth, dtype=dtype, spread=1.0)
    grad = random(batch, tokens, width, dtype=dtype, spread=1.0)
    exact = run(linear.reference, *(y.double() for y in (x, weight, grad)))
    found = run(RECIPES[recipe], x, weight, grad)
    for name, ours, truth, ((a, _), (b, square)) in zip(
        ("output", "x", "weight"), found, exact, operands(x, weight, grad), strict=True
    ):
        da, db = rounding(a, False), rounding(b, square and recipe == "blockwise")
        whole = (a.abs() + da) @ (b.abs() + db).T
        allowed = whole - a.abs() @ b.abs().T + SUM * whole + torch.finfo(dtype).eps * truth.flatten(0, -2).abs()
        assert ((ours - truth).flatten(0, -2).abs() <= allowed).all(), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_errors_of_normal_values(recipe):
    """Independent roundings of both operands, each uniform up to 2^-4: below sqrt(2 / 3) * 2^-4 = 5.1 %; 3.7 % found."""
    torch.manual_seed(1)
    found = errors(RECIPES[recipe], random(300, 400), random(208, 400), random(300, 208))
    assert ((found > 0.02) & (found < (2 / 3) ** 0.5 * ROUNDING)).all(), found


def test_outliers_of_one_feature_spoil_only_their_block():
    """Output and gradient of the input; a row-wise scale leaves few steps for all other features of a token."""
    torch.manual_seed(2)
    x, weight, grad = random(128, 512), random(512, 512), random(128, 512)
    x[:, 3] *= 3e5
    grad[:, 5] *= 3e5
    weight[:, 3] = weight[5] = 0
    rowwise, blockwise = (errors(RECIPES[recipe], x, weight, grad)[:2] for recipe in ("rowwise", "blockwise"))
    assert (rowwise > 0.15).all() and (blockwise < 0.6 * rowwise).all(), (rowwise, blockwise)


def dequantised(q, depth):
    """What a quantised matrix stands for, in float64."""
    values = q.values[:, :depth].double()
    if q.scaling == "rows":
        return values * q.scales[:, None]
    by_value = q.scales.repeat_interleave(fp8.BLOCK, 0)[:depth]
    if q.scaling == "squares":
        by_value = by_value.repeat_interleave(fp8.BLOCK, 1)[:, : len(values)]
    return values * by_value.T


@pytest.mark.parametrize("config", fp8.QUANTISE_CONFIGS, ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("shape", [(150, 309), (128, 256), (1, 5)])
def test_quantised(shape, scaling, config):
    """Either side alone as with the other; padded with zeros; the largest of each scale becomes 448."""
    torch.manual_seed(3)
    x = random(*shape, spread=2.0)
    both = fp8.quantise(x, scaling, columns=True, config=config)
    alone = fp8.quantise(x, scaling, config=config)[0], fp8.quantise(x, scaling, rows=False, columns=True)[1]
    for found, again, matrix in zip(both, alone, (x, x.T), strict=True):
        assert torch.equal(found.values.view(torch.uint8), again.values.view(torch.uint8))
        assert torch.equal(found.scales, again.scales)
        assert found.values.shape == (len(matrix), -(-matrix.shape[1] // 16) * 16)
        assert not found.values[:, matrix.shape[1] :].double().any()
        error = (dequantised(found, matrix.shape[1]) - matrix.double()).abs()
        assert (error <= rounding(matrix.double(), scaling == "squares") * (1 + 1e-6)).all()
        tops = {"rows": matrix.abs().amax(1), "squares": None, "lines": None}[scaling]
        if tops is None:
            blocks = F.pad(matrix.abs(), (0, -matrix.shape[1] % 128, 0, -len(matrix) % 128)).unfold(1, 128, 128)
            lines = blocks.amax(2).T
            tops = lines[:, : len(matrix)] if scaling == "lines" else lines.unfold(1, 128, 128).amax(2)
        torch.testing.assert_close(found.scales, tops / fp8.LARGEST)


@pytest.mark.parametrize("config", fp8.PRODUCT_CONFIGS, ids=str)
@pytest.mark.parametrize("scaling", ["lines", "squares"])
@pytest.mark.parametrize("shape", [(150, 309, 333), (128, 128, 256), (1, 1, 16)])
def test_products_of_every_configuration(shape, scaling, config):
    torch.manual_seed(4)
    rows, columns, depth = shape
    left, _ = fp8.quantise(random(rows, depth, spread=1.0), "lines")
    right, _ = fp8.quantise(random(columns, depth, spread=1.0), scaling)
    a, b = dequantised(left, depth), dequantised(right, depth)
    out = fp8.multiply(left, right, torch.float32, config).double()
    assert ((out - a @ b.T).abs() <= SUM * (a.abs() @ b.abs().T)).all()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(bad, recipe):
    """A step that skips when something is not finite must see it."""
    torch.manual_seed(5)
    x, weight, grad = random(40, 48), random(32, 48), random(40, 32)
    x[7, 9] = bad
    out, by_x, by_weight = run(RECIPES[recipe], x, weight, grad)
    assert out[7].isnan().all() and out[:7].isfinite().all() and out[8:].isfinite().all()
    assert by_x.isfinite().all() and by_weight[:, 9].isnan().all() and by_weight[:, :9].isfinite().all()
    grad[7, 9] = bad
    _, by_x, by_weight = run(RECIPES[recipe], x.nan_to_num(1, 1, 1), weight, grad)
    assert by_x[7].isnan().all() and by_weight[9].isnan().all() and by_weight[:9].isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-30, 1e30])
def test_values_at_the_ends_of_float32(scale, recipe):
    torch.manual_seed(6)
    x, weight, grad = random(40, 48) * scale, random(32, 48), random(40, 32)
    found = run(RECIPES[recipe], x, weight, grad)
    assert all(y.isfinite().all() for y in found)
    assert scale or not found[0].any()
    if scale >= 1e-30:
        assert (errors(RECIPES[recipe], x, weight, grad) < 0.06).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_layouts_and_single_gradients(recipe):
    torch.manual_seed(7)
    function, x, weight, grad = RECIPES[recipe], random(48, 40), random(48, 32), random(1, 1).expand(40, 32)
    views = run(function, x.T, weight.T, grad)
    dense = run(function, x.T.contiguous(), weight.T.contiguous(), grad.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(views, dense, strict=True))
    for index in (0, 1):
        inputs = [x.T.clone(), weight.T.clone()]
        inputs[index].requires_grad_()
        (only,) = torch.autograd.grad(function(*inputs), [inputs[index]], grad)
        assert torch.equal(only.double(), dense[1 + index])


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_tokens(recipe):
    x, weight = random(0, 32).requires_grad_(), random(16, 32).requires_grad_()
    out = RECIPES[recipe](x, weight)
    out.sum().backward()
    assert out.shape == (0, 16) and x.grad.shape == (0, 32) and not weight.grad.any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_its_arguments_are_kept_for_backward(recipe):
    """So that recomputation and sharding may free them."""
    x, weight, kept = random(32, 32).requires_grad_(), random(32, 32).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        RECIPES[recipe](x, weight)
    assert [y.data_ptr() for y in kept] == [x.data_ptr(), weight.data_ptr()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_operator_and_graph(recipe):
    torch.manual_seed(8)
    x, weight, grad = random(2, 24, 32), random(48, 32), random(2, 24, 48)
    arguments = x.clone().requires_grad_(), weight.clone().requires_grad_(), recipe
    torch.library.opcheck(torch.ops.shardwright.fp8_linear, arguments)
    torch._dynamo.reset()
    compiled = torch.compile(RECIPES[recipe], fullgraph=True, backend="aot_eager")
    both = (run(function, x, weight, grad) for function in (compiled, RECIPES[recipe]))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputation_knows_their_price(recipe):
    x, weight = random(2, 24, 32), random(48, 32)
    with Meter() as meter:
        out = RECIPES[recipe](x, weight)
    assert meter.price == 2 * 48 * 32 * 48 + FLOPS_PER_BYTE * out.nbytes


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_block_of_a_model(recipe):
    torch.manual_seed(9)
    ours, plain = (FeedForward(64, 160, kernels).to(DEVICE) for kernels in (Kernels(linear=RECIPES[recipe]), Kernels()))
    plain.load_state_dict(ours.state_dict())
    x = random(2, 40, 64)
    results = []
    for block in (ours, plain):
        x_ = x.clone().requires_grad_()
        out = block(x_)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), [x_, *block.parameters()])])
    for a, b in zip(*results, strict=True):
        assert 1e-3 < (a - b).norm() / b.norm() < 0.12


def test_they_are_taken_by_name_only(monkeypatch):
    ranked = {"order": {"linear": ["fp8_rowwise", "reference"]}, "configs": {}}
    monkeypatch.setattr(op, "measured", lambda gpu: ranked)
    on_gpu = Situation(device="cuda", dtype=torch.bfloat16, sizes={"head_dim": 128, "hidden_size": 4096})
    assert linear.OP.choose("auto", on_gpu) is linear.reference
    assert Kernels().linear is linear.reference
    rowwise, blockwise = linear.OP.candidates
    assert all(candidate.lossy for candidate in linear.OP.candidates)
    assert blockwise.unsupported(Situation(device="cpu", dtype=torch.float32)) == "needs a CUDA device"
    odd = Situation(device="cuda", dtype=torch.bfloat16, sizes={"head_dim": None, "hidden_size": 1000})
    assert (DEVICE == "cuda") <= (blockwise.unsupported(odd) is None)
    assert rowwise.unsupported(odd) == "needs sizes that 16 divides, not hidden_size=1000"
    with pytest.raises(KernelError, match=r"fp8_rowwise .*\[24, 32\].* multiples of 16; .*fp8_blockwise"):
        linear.fp8_rowwise(random(2, 32), random(24, 32))


def test_products_run_on_fp8_tensor_cores():
    table = json.loads(Path(__file__).with_name("compiled.json").read_text())["kernels"]["90"]
    rows = {label: found for label, found in table.items() if label.startswith("fp8 multiply")}
    assert len(rows) == 2 * len(fp8.PRODUCT_CONFIGS)
    for label, found in rows.items():
        assert found["matrix"] == ["QGMMA"] and not found["spill_bytes"] and not found["warnings"], label


def test_a_launch_tells_descriptors_apart():
    values = torch.zeros(32, 256, device=DEVICE)
    kinds = {launch._kind(fp8._describe(x, rows)) for x in (values, values.half(), values[1:]) for rows in (64, 128)}
    assert len(kinds) == 4


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program after the other")
@pytest.mark.parametrize("config", fp8.PRODUCT_CONFIGS, ids=str)
@pytest.mark.parametrize("scaling", ["lines", "squares"])
def test_repeated_products_have_the_same_bits(scaling, config):
    torch.manual_seed(10)
    left, _ = fp8.quantise(random(1000, 2000), "lines")
    right, _ = fp8.quantise(random(1500, 2000), scaling)
    first = fp8.multiply(left, right, torch.bfloat16, config)
    assert all(torch.equal(first, fp8.multiply(left, right, torch.bfloat16, config)) for _ in range(1000))
