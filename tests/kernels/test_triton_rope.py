"""Rotary embedding in Triton: as exact as plain torch in the same dtype, for every configuration and layout."""

import pytest
import torch

from shardwright.kernels import rope as op
from shardwright.kernels.op import KernelError, Situation
from shardwright.kernels.triton import rope
from shardwright.models.blocks import rotary_angles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [
    torch.float32,
    pytest.param(torch.float16, marks=pytest.mark.slow),
    *([torch.bfloat16] if DEVICE == "cuda" else []),
]


def angles(batch, tokens, head_dim):
    positions = torch.randint(0, 4096, (batch, tokens), device=DEVICE)
    return rotary_angles(positions, head_dim, 1e4, None)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def run(function, x, grad, *angles):
    """Output and gradient in float64."""
    x = x.detach().requires_grad_()
    out = function(x, *angles)
    return [y.double() for y in (out.detach(), *torch.autograd.grad(out, x, grad))]


def in_float64(x, cos, sin):
    """The definition: a complex number per pair, times exp(i * angle)."""
    low, high = x.double().chunk(2, -1)
    half = cos.shape[-1] // 2
    turned = torch.complex(low, high) * torch.complex(cos.double(), sin.double())[:, :, None, :half]
    return torch.cat((turned.real, turned.imag), -1)


def check(ours, plain, exact):
    for name, mine, theirs, truth in zip(("out", "grad"), ours, plain, exact, strict=True):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + 1e-7 * truth.norm(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim"), [(2, 13, 3, 64), (1, 37, 32, 128), (1, 5, 7, 96), (3, 1, 1, 6)]
)
def test_output_and_gradient(batch, tokens, heads, head_dim, dtype):
    torch.manual_seed(0)
    turns = angles(batch, tokens, head_dim)
    x, grad = (random(batch, tokens, heads, head_dim, dtype=dtype) for _ in range(2))
    exact = run(in_float64, x.double(), grad.double(), *turns)
    check(run(op.triton, x, grad, *turns), run(op.reference, x, grad, *turns), exact)


@pytest.mark.parametrize("config", rope.CONFIGS, ids=str)
def test_every_configuration(config):
    torch.manual_seed(1)
    cos, sin = angles(2, 7, 128)
    q, k = random(2, 7, 20, 128), random(2, 7, 3, 128)
    for inverse in (False, True):
        turned = rope.launch(q, k, cos, sin, inverse, config)
        for x, mine in zip((q, k), turned, strict=True):
            turns = (cos, -sin) if inverse else (cos, sin)
            truth, theirs = in_float64(x, *turns), op.reference(x, *turns)
            assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + 1e-7 * truth.norm()


def test_queries_and_keys_in_one_launch_equal_two():
    torch.manual_seed(2)
    turns = angles(2, 9, 64)
    q, k = random(2, 9, 6, 64).requires_grad_(), random(2, 9, 2, 64).requires_grad_()
    grad_q, grad_k = random(2, 9, 6, 64), random(2, 9, 2, 64)
    together = rope.rope_qk(q, k, *turns)
    apart = rope.rope(q, *turns), rope.rope(k, *turns)
    grads = (torch.autograd.grad(pair, (q, k), (grad_q, grad_k)) for pair in (together, apart))
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_views_of_a_fused_projection_are_read_in_place(monkeypatch):
    torch.manual_seed(3)
    turns = angles(2, 9, 64)
    q, k, _ = random(2, 9, 10, 64).split((6, 2, 2), 2)
    by_head = random(2, 4, 9, 64).transpose(1, 2)

    def refuse(*args, **kwargs):
        raise AssertionError("copied")

    monkeypatch.setattr(torch.Tensor, "contiguous", refuse)
    pair = rope.rope_qk(q, k, *turns)
    for x, out in zip((q, k, by_head), (*pair, rope.rope(by_head, *turns)), strict=True):
        assert out.is_contiguous()
        assert torch.equal(out, rope.rope(x.clone(memory_format=torch.contiguous_format), *turns))


def test_other_layouts():
    torch.manual_seed(4)
    cos, sin = (x.expand(2, -1, -1) for x in angles(1, 9, 8))
    x, grad = random(2, 9, 8, 3).transpose(2, 3), random(1, 1, 1, 1).expand(2, 9, 3, 8)
    exact = run(in_float64, x.double(), grad.double(), cos, sin)
    check(run(op.triton, x, grad, cos, sin), run(op.reference, x, grad, cos, sin), exact)


def test_no_tokens():
    x = torch.empty(1, 0, 2, 8, device=DEVICE, requires_grad=True)
    op.triton(x, *angles(1, 0, 8)).sum().backward()
    assert x.grad is not None and x.grad.shape == (1, 0, 2, 8)


def test_operators_and_graph():
    torch.manual_seed(5)
    turns = angles(1, 5, 8)
    q, k, grad = random(1, 5, 3, 8).requires_grad_(), random(1, 5, 2, 8).requires_grad_(), random(1, 5, 3, 8)
    torch.library.opcheck(torch.ops.shardwright.rope, (q, *turns, False))
    torch.library.opcheck(torch.ops.shardwright.rope_qk, (q, k, *turns, False))
    torch._dynamo.reset()
    compiled = torch.compile(op.triton, fullgraph=True, backend="aot_eager")
    both = (run(function, q, grad, *turns) for function in (compiled, op.triton))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_refusals():
    cos, sin = angles(1, 5, 8)
    x = random(1, 5, 3, 8)
    with pytest.raises(KernelError, match=r"give both in float32 \[1, 5, 8\]"):
        rope.rope(x, cos.half(), sin.half())
    with pytest.raises(KernelError, match="give both"):
        rope.rope(x, cos[:, :4], sin[:, :4])
    with pytest.raises(KernelError, match="only the number of heads may differ"):
        rope.rope_qk(x, random(1, 4, 3, 8), cos, sin)
    with pytest.raises(KernelError, match="use an even head size"):
        rope.rope(random(1, 5, 3, 7), cos[..., :7], sin[..., :7])
    refuse = op.OP.candidates[-1].unsupported
    assert refuse(Situation(device="cpu", dtype=torch.float32)) == "needs a CUDA device"
    assert refuse(Situation(device="cuda", dtype=torch.float64)) == "needs bf16, fp16 or fp32"
    assert refuse(Situation(device="cuda", dtype=torch.bfloat16, sizes={"head_dim": 7})) == "needs an even head size"
    assert refuse(Situation(device="cuda", dtype=torch.bfloat16, sizes={"head_dim": 128})) is None
