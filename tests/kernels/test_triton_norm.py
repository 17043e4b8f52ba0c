"""RMSNorm and LayerNorm in Triton: as exact as plain torch in the same dtype, for every configuration and width."""

import pytest
import torch
import torch.nn.functional as F

from shardwright.kernels import rms_norm as op
from shardwright.kernels.op import KernelError, Situation
from shardwright.kernels.triton import norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [
    torch.float32,
    pytest.param(torch.float16, marks=pytest.mark.slow),
    *([torch.bfloat16] if DEVICE == "cuda" else []),
]
EPS = 1e-5
KINDS = [
    (centered, residual, biased)
    for centered in (False, True)
    for residual in (False, True)
    for biased in ((False, True) if centered else (False,))
]


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def plain(x, residual, weight, bias, eps, centered):
    """Norm, and the sum of x and residual, by torch in the dtype of x."""
    total = x if residual is None else x + residual
    if not centered:
        return op.reference(total, weight, eps) if x.dtype != torch.float64 else exact_rms_norm(
            total, weight, eps
        ), total
    return F.layer_norm(total, weight.shape, weight, bias, eps), total


def exact_rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def ours(x, residual, weight, bias, eps, centered):
    if residual is None:
        y = norm.layer_norm(x, weight, bias, eps) if centered else norm.rms_norm(x, weight, eps)
        return y, x
    if centered:
        return norm.residual_layer_norm(x, residual, weight, bias, eps)
    return norm.residual_rms_norm(x, residual, weight, eps)


def inputs(rows, columns, dtype, residual, biased):
    """x, residual, weight, bias and the gradients of norm and sum; a mean and a scale that are not 0 and 1."""
    x = (random(*rows, columns) * 2 + 0.5).to(dtype)
    other = random(*rows, columns, dtype=dtype) if residual else None
    weight, bias = random(columns, dtype=dtype), random(columns, dtype=dtype) if biased else None
    return (x, other, weight, bias), tuple(random(*rows, columns, dtype=dtype) for _ in range(2))


def run(function, tensors, grads, centered, dtype=None):
    """Outputs and gradients of all inputs in float64."""
    tensors = [x if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    outputs = function(*tensors, EPS, centered)
    given = [x for x in tensors if x is not None]
    found = torch.autograd.grad(outputs, given, [g.to(dtype or g.dtype) for g in grads])
    return [x.detach().double() for x in (*outputs, *found)]


def check(mine, theirs, truth):
    for index, (a, b, c) in enumerate(zip(mine, theirs, truth, strict=True)):
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-7 * c.norm(), f"output or gradient {index}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("centered", "residual", "biased"), KINDS)
@pytest.mark.parametrize(("rows", "columns"), [((3, 7), 1000), ((37,), 64), ((1,), 129)])
def test_outputs_and_gradients(rows, columns, centered, residual, biased, dtype):
    torch.manual_seed(0)
    tensors, grads = inputs(rows, columns, dtype, residual, biased)
    truth = run(plain, tensors, grads, centered, torch.float64)
    check(run(ours, tensors, grads, centered), run(plain, tensors, grads, centered), truth)


@pytest.mark.parametrize("columns", [3000, *([16384] if DEVICE == "cuda" else [])])
def test_wide_rows(columns):
    torch.manual_seed(1)
    tensors, grads = inputs((5,), columns, torch.float16, True, False)
    truth = run(plain, tensors, grads, True, torch.float64)
    check(run(ours, tensors, grads, True), run(plain, tensors, grads, True), truth)


def test_widest_row():
    x, weight = random(2, norm.MAX_COLUMNS), random(norm.MAX_COLUMNS)
    torch.testing.assert_close(norm.rms_norm(x, weight, EPS), op.reference(x, weight, EPS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", norm.CONFIGS, ids=lambda config: str(config.arguments))
def test_every_configuration(config):
    """Every program of backward has several tiles, the last not full."""
    torch.manual_seed(2)
    programs = norm._num_programs(config.num_warps, torch.device(DEVICE))
    rows = (programs + 1) * config.blocks["ROWS"] + 1
    for centered in (False, True):
        tensors, grads = inputs((rows,), 72, torch.float32, True, centered)
        x, residual, weight, bias = tensors
        y, total, statistics = norm.launch_forward(x, residual, weight, bias, EPS, centered, config)
        assert total is not None
        grad_x, grad_parameters = norm.launch_backward(*grads, total, weight, statistics, centered, config)
        mine = [x.double() for x in (y, total, grad_x, grad_x, *grad_parameters)]
        truth = run(plain, tensors, grads, centered, torch.float64)
        check(mine, run(plain, tensors, grads, centered), truth)


def test_float32_weight_of_half_precision_input():
    torch.manual_seed(3)
    x, weight, grad = (
        random(6, 40, dtype=torch.float16),
        random(40).requires_grad_(),
        random(6, 40, dtype=torch.float16),
    )
    y = norm.rms_norm(x, weight, EPS)
    (found,) = torch.autograd.grad(y, weight, grad)
    assert y.dtype == torch.float16 and found.dtype == torch.float32
    truth = (grad.double() * exact_rms_norm(x.double(), torch.ones_like(weight).double(), EPS)).sum(0)
    torch.testing.assert_close(found.double(), truth, atol=1e-5, rtol=1e-5)


def test_residual_sum_is_what_torch_adds_and_either_output_may_go_unused():
    torch.manual_seed(4)
    x, residual, weight, grad = (random(4, 48, dtype=torch.float16) for _ in range(4))
    x, weight = x.requires_grad_(), weight[0].clone().requires_grad_()
    y, total = norm.residual_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, norm.rms_norm(total, weight, EPS))
    assert torch.equal(torch.autograd.grad(total, x, grad, retain_graph=True)[0], grad)
    (alone,) = torch.autograd.grad(y, x, grad)
    (direct,) = torch.autograd.grad(norm.rms_norm(total.detach().requires_grad_(), weight, EPS), weight, grad)
    assert direct.shape == weight.shape
    leaf = total.detach().requires_grad_()
    assert torch.equal(alone, torch.autograd.grad(norm.rms_norm(leaf, weight, EPS), leaf, grad)[0])


def test_same_bits_every_time():
    torch.manual_seed(5)
    tensors, grads = inputs((97,), 80, torch.float32, True, True)
    first, second = (run(ours, tensors, grads, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_other_layouts():
    torch.manual_seed(6)
    tensors, _ = inputs((9,), 24, torch.float32, True, True)
    x, residual, weight, bias = tensors
    tensors = (x.T.contiguous().T, torch.cat((residual, residual), -1)[:, :24], weight, bias)
    grads = (random(1, 1).expand(9, 24), random(24, 9).T)
    truth = run(plain, tensors, grads, True, torch.float64)
    check(run(ours, tensors, grads, True), run(plain, tensors, grads, True), truth)


def test_no_rows():
    x = torch.empty(0, 16, device=DEVICE, requires_grad=True)
    weight = torch.ones(16, device=DEVICE, requires_grad=True)
    norm.rms_norm(x, weight, EPS).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 16)
    assert weight.grad is not None and not weight.grad.any()


def test_padding_reads_nothing():
    """Rows and columns beyond the end are NaN here; a kernel that reads them shows it."""
    poisoned = torch.full((8, 24), float("nan"), device=DEVICE)
    x = poisoned.flatten()[: 3 * 24].view(3, 24).copy_(random(3, 24)).requires_grad_()
    weight = torch.full((64,), float("nan"), device=DEVICE)[:24].copy_(random(24)).requires_grad_()
    y = norm.rms_norm(x, weight, EPS)
    assert all(g.isfinite().all() for g in (y, *torch.autograd.grad(y, (x, weight), random(3, 24))))


def test_operators_and_graph():
    torch.manual_seed(7)
    (x, residual, weight, bias), grads = inputs((2, 3), 24, torch.float32, True, True)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    torch.library.opcheck(torch.ops.shardwright.norm, (x, weight, None, EPS, False))
    torch.library.opcheck(torch.ops.shardwright.residual_norm, (*leaves, EPS, True))
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    both = (run(function, leaves, grads, True) for function in (compiled, ours))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_graph_of_the_candidate():
    torch._dynamo.reset()
    x, weight = random(3, 24), random(24)
    compiled = torch.compile(op.triton, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, weight, EPS), op.triton(x, weight, EPS))


def test_refusals():
    with pytest.raises(KernelError, match="norm of 16385 columns: the triton kernels hold up to 16384"):
        norm.rms_norm(random(1, 16385), random(16385), EPS)
    with pytest.raises(
        KernelError, match=r"residual is torch.float16 \[2, 8\], x torch.float32 \[2, 8\]; give both alike"
    ):
        norm.residual_rms_norm(random(2, 8), random(2, 8, dtype=torch.float16), random(8), EPS)
    (refuse,) = (c.unsupported for c in op.OP.candidates if c.name == "triton")
    assert refuse(Situation(device="cpu", dtype=torch.float32)) == "needs a CUDA device"
    assert refuse(Situation(device="cuda", dtype=torch.float64)) == "needs bf16, fp16 or fp32"
    assert (
        refuse(Situation(device="cuda", dtype=torch.bfloat16, sizes={"hidden_size": 32768}))
        == "needs a hidden size up to 16384"
    )
    assert refuse(Situation(device="cuda", dtype=torch.bfloat16, sizes={"hidden_size": 8192})) is None
