"""Gated activations in Triton: as exact as plain torch in the same dtype, for every configuration and layout."""

import pytest
import torch
import torch.nn.functional as F

from shardwright.kernels import swiglu
from shardwright.kernels.op import KernelError, Situation
from shardwright.kernels.triton import gated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [
    torch.float32,
    pytest.param(torch.float16, marks=pytest.mark.slow),
    *([torch.bfloat16] if DEVICE == "cuda" else []),
]
OURS = {
    "silu": gated.swiglu,
    "gelu": gated.geglu,
    "gelu_tanh": lambda gate, up: gated.geglu(gate, up, approximate="tanh"),
}
PLAIN = {
    "silu": swiglu.reference,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
}


def run(function, inputs, grad):
    """Output and gradients in float64."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [x.double() for x in (out.detach(), *torch.autograd.grad(out, inputs, grad))]


ROUNDINGS = 2 * torch.finfo(torch.float32).eps  # of the GPU's exp2, where float32 itself is compared


def check(ours, plain, exact):
    for name, mine, theirs, truth in zip(("out", "gate", "up"), ours, plain, exact, strict=True):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + ROUNDINGS * truth.norm(), name


def random(*shape, dtype=torch.float32, scale=3.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", gated.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 7, 333), (2, 2048), (1, 33)])
def test_output_and_gradients(activation, dtype, shape):
    torch.manual_seed(0)
    gate, up, grad = (random(*shape, dtype=dtype) for _ in range(3))
    exact = run(PLAIN[activation], (gate.double(), up.double()), grad.double())
    check(run(OURS[activation], (gate, up), grad), run(PLAIN[activation], (gate, up), grad), exact)


@pytest.mark.parametrize("config", gated.CONFIGS, ids=str)
def test_every_configuration(config):
    torch.manual_seed(1)
    fused, grad = random(3, 2 * 4099), random(3, 4099)
    gate, up = fused.chunk(2, -1)
    exact = run(swiglu.reference, (gate.double(), up.double()), grad.double())
    plain = run(swiglu.reference, (gate, up), grad)
    out = gated.launch_forward(gate, up, "silu", config)
    check([x.double() for x in (out, *gated.launch_backward(grad, gate, up, "silu", config))], plain, exact)


def forbid_copies(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("copied")

    monkeypatch.setattr(torch.Tensor, "contiguous", refuse)


@pytest.mark.parametrize("activation", gated.ACTIVATIONS)
def test_halves_of_a_fused_projection_are_read_in_place(monkeypatch, activation):
    torch.manual_seed(2)
    fused, grad = random(2, 5, 2 * 77), random(2, 5, 77)
    gate, up = fused.chunk(2, -1)
    forbid_copies(monkeypatch)
    out = gated.gated(gate, up, activation)
    assert out.is_contiguous()
    assert torch.equal(out, gated.gated(gate.clone(), up.clone(), activation))
    split = gated.launch_backward(grad, gate, up, activation)
    whole = gated.launch_backward(grad, gate.clone(), up.clone(), activation)
    assert all(torch.equal(a, b) for a, b in zip(split, whole, strict=True))


def test_other_layouts():
    torch.manual_seed(3)
    gate, up = random(33, 6).T, random(6, 33)
    grad = random(1, 1).expand(6, 33)
    ours = run(gated.swiglu, (gate, up), grad)
    exact = run(swiglu.reference, (gate.double(), up.double()), grad.double())
    check(ours, run(swiglu.reference, (gate, up), grad), exact)


@pytest.mark.parametrize("activation", gated.ACTIVATIONS)
def test_large_inputs_saturate(activation):
    gate = torch.tensor([-3e4, -200.0, -20.0, 0.0, 20.0, 200.0, 3e4], device=DEVICE)
    ours = run(OURS[activation], (gate, torch.ones_like(gate)), torch.ones_like(gate))
    exact = run(PLAIN[activation], (gate.double(), torch.ones_like(gate).double()), torch.ones_like(gate).double())
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, truth, atol=1e-6, rtol=1e-6)


def test_no_tokens():
    gate = torch.empty(0, 16, device=DEVICE, requires_grad=True)
    gated.swiglu(gate, gate).sum().backward()
    assert gate.grad is not None and gate.grad.shape == (0, 16)


def test_operator_and_graph():
    gate, up = (random(2, 40).requires_grad_() for _ in range(2))
    torch.library.opcheck(torch.ops.shardwright.gated, (gate, up, "gelu"))
    torch._dynamo.reset()
    compiled = torch.compile(swiglu.triton, fullgraph=True, backend="aot_eager")
    grad = random(2, 40)
    both = (run(function, (gate, up), grad) for function in (compiled, swiglu.triton))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_refusals():
    with pytest.raises(KernelError, match=r"\[\[2, 4\], \[2, 5\]\]: give both of one shape"):
        gated.swiglu(random(2, 4), random(2, 5))
    with pytest.raises(KernelError, match="approximate=erf"):
        gated.geglu(random(2, 4), random(2, 4), approximate="erf")
    refuse = swiglu.OP.candidates[-1].unsupported
    assert refuse(Situation(device="cpu", dtype=torch.float32)) == "needs a CUDA device"
    assert refuse(Situation(device="cuda", dtype=torch.float64)) == "needs bf16, fp16 or fp32"
    assert refuse(Situation(device="cuda", dtype=torch.bfloat16)) is None
