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


def run(function, pair, grads, *angles):
    """Queries and keys turned, and their gradients, in float64."""
    pair = [x.detach().requires_grad_() for x in pair]
    outs = function(*pair, *angles)
    return [y.double() for y in (*(out.detach() for out in outs), *torch.autograd.grad(outs, pair, grads))]


def in_float64(q, k, cos, sin):
    """The definition: a complex number per pair, times exp(i * angle)."""
    half = cos.shape[-1] // 2
    turns = torch.complex(cos.double(), sin.double())[:, :, None, :half]
    turned = (torch.complex(*x.double().chunk(2, -1)) * turns for x in (q, k))
    return [torch.cat((x.real, x.imag), -1) for x in turned]


def check(ours, plain, exact):
    for name, mine, theirs, truth in zip(("q", "k", "dq", "dk"), ours, plain, exact, strict=True):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + 1e-7 * truth.norm(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim"),
    [(2, 13, (6, 2), 64), (1, 37, (32, 8), 128), (1, 5, (7, 7), 96), (3, 1, (1, 1), 6)],
)
def test_outputs_and_gradients(batch, tokens, heads, head_dim, dtype):
    torch.manual_seed(0)
    turns = angles(batch, tokens, head_dim)
    pair, grads = ([random(batch, tokens, n, head_dim, dtype=dtype) for n in heads] for _ in range(2))
    exact = run(in_float64, [x.double() for x in pair], [x.double() for x in grads], *turns)
    check(run(op.triton, pair, grads, *turns), run(op.reference, pair, grads, *turns), exact)


@pytest.mark.parametrize("config", rope.CONFIGS, ids=str)
def test_every_configuration(config):
    torch.manual_seed(1)
    cos, sin = angles(2, 7, 128)
    q, k = random(2, 7, 20, 128), random(2, 7, 3, 128)
    for inverse in (False, True):
        turns = (cos, -sin) if inverse else (cos, sin)
        turned = rope.launch(q, k, cos, sin, inverse, config)
        for mine, truth, theirs in zip(turned, in_float64(q, k, *turns), op.reference(q, k, *turns), strict=True):
            assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + 1e-7 * truth.norm()


def test_views_of_a_fused_projection_are_read_in_place(monkeypatch):
    torch.manual_seed(3)
    turns = angles(2, 9, 64)
    q, k, _ = random(2, 9, 10, 64).split((6, 2, 2), 2)
    by_head = random(2, 4, 9, 64).transpose(1, 2)
    dense = [x.clone(memory_format=torch.contiguous_format) for x in (q, k, by_head)]

    def refuse(*args, **kwargs):
        raise AssertionError("copied")

    monkeypatch.setattr(torch.Tensor, "contiguous", refuse)
    for views, copies in (((q, k), dense[:2]), ((q, by_head), (dense[0], dense[2]))):
        for out, wanted in zip(rope.rope(*views, *turns), rope.rope(*copies, *turns), strict=True):
            assert out.is_contiguous() and torch.equal(out, wanted)


def test_other_layouts():
    torch.manual_seed(4)
    cos, sin = (x.expand(2, -1, -1) for x in angles(1, 9, 8))
    pair = random(2, 9, 8, 3).transpose(2, 3), random(2, 9, 8, 1).transpose(2, 3)
    grads = random(1, 1, 1, 1).expand(2, 9, 3, 8), random(2, 9, 1, 8)
    exact = run(in_float64, [x.double() for x in pair], [x.double() for x in grads], cos, sin)
    check(run(op.triton, pair, grads, cos, sin), run(op.reference, pair, grads, cos, sin), exact)


def test_no_tokens():
    q, k = (torch.empty(1, 0, heads, 8, device=DEVICE, requires_grad=True) for heads in (2, 1))
    sum(out.sum() for out in op.triton(q, k, *angles(1, 0, 8))).backward()
    assert q.grad is not None and q.grad.shape == (1, 0, 2, 8) and k.grad.shape == (1, 0, 1, 8)


def test_queries_without_keys_gradient():
    torch.manual_seed(6)
    turns = angles(1, 5, 8)
    q, k, grad = random(1, 5, 2, 8).requires_grad_(), random(1, 5, 1, 8), random(1, 5, 2, 8)
    (found,) = torch.autograd.grad(op.triton(q, k, *turns)[0], q, grad)
    (wanted,) = torch.autograd.grad(op.reference(q, k, *turns)[0], q, grad)
    torch.testing.assert_close(found, wanted)


def test_operators_and_graph():
    torch.manual_seed(5)
    turns = angles(1, 5, 8)
    pair, grads = ([random(1, 5, heads, 8) for heads in (3, 2)] for _ in range(2))
    torch.library.opcheck(torch.ops.shardwright.rope, (*(x.clone().requires_grad_() for x in pair), *turns, False))
    torch._dynamo.reset()
    compiled = torch.compile(op.triton, fullgraph=True, backend="aot_eager")
    both = (run(function, pair, grads, *turns) for function in (compiled, op.triton))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_refusals():
    cos, sin = angles(1, 5, 8)
    x = random(1, 5, 3, 8)
    with pytest.raises(KernelError, match=r"give both in float32 \[1, 5, 8\]"):
        rope.rope(x, x, cos.half(), sin.half())
    with pytest.raises(KernelError, match="give both"):
        rope.rope(x, x, cos[:, :4], sin[:, :4])
    with pytest.raises(KernelError, match="only the number of heads may differ"):
        rope.rope(x, random(1, 4, 3, 8), cos, sin)
    with pytest.raises(KernelError, match="use an even head size"):
        rope.rope(random(1, 5, 3, 7), random(1, 5, 1, 7), cos[..., :7], sin[..., :7])
    refuse = op.OP.candidates[-1].unsupported
    assert refuse(Situation(device="cpu", dtype=torch.float32)) == "needs a CUDA device"
    assert refuse(Situation(device="cuda", dtype=torch.float64)) == "needs bf16, fp16 or fp32"
    assert refuse(Situation(device="cuda", dtype=torch.bfloat16, sizes={"head_dim": 7})) == "needs an even head size"
    assert refuse(Situation(device="cuda", dtype=torch.bfloat16, sizes={"head_dim": 128})) is None
