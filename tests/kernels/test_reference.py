"""Every implementation of an op equals its reference, and the reference its definition."""

import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

from shardwright.kernels import Kernels, attention, linear_cross_entropy, rms_norm, rope, select, swiglu
from shardwright.kernels.op import KernelError, Situation


def packed(lengths, batch_tokens):
    """Positions of a batch of sequences of `batch_tokens`, each cut into documents of the given lengths."""
    rows = [torch.cat([torch.arange(n) for n in row]) for row in lengths]
    assert all(len(row) == batch_tokens for row in rows)
    positions = torch.stack(rows)
    bounds = torch.cat([(positions.flatten() == 0).nonzero().flatten(), torch.tensor([positions.numel()])])
    return positions, bounds.int(), int(bounds.diff().max())


def by_hand(q, k, v, positions, window):
    """Attention one query at a time, in float64."""
    out = torch.zeros_like(q, dtype=torch.float64)
    q, k, v = q.double(), k.double(), v.double()
    batch, tokens, heads, size = q.shape
    groups = heads // k.shape[2]
    for b in range(batch):
        for t in range(tokens):
            first = t - int(positions[b, t])
            if window is not None:
                first = max(first, t - window + 1)
            for h in range(heads):
                scores = k[b, first : t + 1, h // groups] @ q[b, t, h] / math.sqrt(size)
                out[b, t, h] = scores.softmax(0) @ v[b, first : t + 1, h // groups]
    return out


CASES = [
    ([[13]], 13, 4, 2, None),
    ([[5, 8], [13]], 13, 4, 4, None),
    ([[1, 1, 11], [6, 7]], 13, 6, 2, None),
    ([[3, 10], [13]], 13, 4, 1, 4),
    ([[13]], 13, 2, 2, 1),
]


@pytest.mark.parametrize(("lengths", "tokens", "heads", "kv_heads", "window"), CASES)
def test_attention_reference_is_attention(lengths, tokens, heads, kv_heads, window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(len(lengths), tokens, h, 8) for h in (heads, kv_heads, kv_heads))
    positions, bounds, longest = packed(lengths, tokens)
    out = attention.reference(q, k, v, positions, bounds, longest, window=window)
    torch.testing.assert_close(out.double(), by_hand(q, k, v, positions, window), atol=1e-6, rtol=1e-5)


def runnable(op, device, dtype):
    """Candidates that can run and round no more than their dtype does."""
    situation = Situation(device=device, dtype=dtype, sizes={"head_dim": 64})
    return [c for c in op.candidates if c.unsupported(situation) is None and not c.lossy]


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_candidates_equal_the_reference(device, dtype, window, kv_heads):
    """Error against float64 at most twice that of the reference in the same dtype, outputs and all gradients."""
    torch.manual_seed(1)
    lengths = [[17, 1, 30, 65], [113], [50, 63]]
    positions, bounds, longest = packed(lengths, 113)
    shapes = [(3, 113, h, 64) for h in (4, kv_heads, kv_heads)]
    exact_inputs = [torch.randn(s, dtype=torch.float64) for s in shapes]
    weight = torch.randn(shapes[0], dtype=torch.float64)

    def run(function, dtype, device):
        inputs = [x.clone().to(device, dtype).requires_grad_() for x in exact_inputs]
        out = function(*inputs, positions.to(device), bounds.to(device), longest, window=window)
        out.backward(weight.to(device, dtype))
        return [x.detach().cpu().double() for x in (out, *(i.grad for i in inputs))]

    exact = run(attention.reference, torch.float64, "cpu")
    plain = run(attention.reference, dtype, device)
    for candidate in runnable(attention.OP, device, dtype):
        for name, ours, theirs, truth in zip("oqkv", run(candidate.function, dtype, device), plain, exact, strict=True):
            allowed = 2 * (theirs - truth).norm() + 1e-6 * truth.norm()
            assert (ours - truth).norm() <= allowed, f"{candidate.name}: {name}"


@pytest.mark.parametrize("device", DEVICES)
def test_rms_norm(device):
    torch.manual_seed(2)
    x, weight = torch.randn(3, 5, 24, device=device), torch.randn(24, device=device)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    for function in [rms_norm.reference, *(c.function for c in runnable(rms_norm.OP, device, x.dtype))]:
        torch.testing.assert_close(function(x, weight, 1e-5).double(), exact, atol=1e-5, rtol=1e-5)


def test_rope_turns_pairs_and_keeps_relative_positions():
    torch.manual_seed(3)
    from shardwright.models.blocks import rotary_angles

    positions = torch.tensor([[0, 1, 2, 10, 11, 12]])
    cos, sin = rotary_angles(positions, 8, 100.0, None)
    x = torch.randn(1, 1, 1, 8).expand(1, 6, 1, 8)
    y = torch.randn(1, 1, 1, 8).expand(1, 6, 1, 8)
    turned_x, turned_y = (turned[0, :, 0] for turned in rope.reference(x, y, cos, sin))
    torch.testing.assert_close(turned_x[0], x[0, 0, 0])
    torch.testing.assert_close(turned_x.norm(dim=-1), x[0, :, 0].norm(dim=-1))
    torch.testing.assert_close(turned_x[0] @ turned_y[2], turned_x[3] @ turned_y[5], atol=1e-5, rtol=1e-5)
    angle = 2 * 100.0 ** (-2 / 8)
    low, high = x[0, 0, 0, 1], x[0, 0, 0, 5]
    torch.testing.assert_close(turned_x[2, 1], low * math.cos(angle) - high * math.sin(angle))


def test_rope_scaling_stretches_long_wavelengths_only():
    from shardwright.models.blocks import rotary_angles

    scaling = SimpleNamespace(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_tokens=8192)
    one = torch.tensor([[1]])
    plain = torch.atan2(*reversed(rotary_angles(one, 128, 5e5, None)))[0, 0, :64]
    scaled = torch.atan2(*reversed(rotary_angles(one, 128, 5e5, scaling)))[0, 0, :64]
    wavelength = 2 * math.pi / plain
    ratio = plain / scaled
    torch.testing.assert_close(ratio[wavelength < 8192 / 4], torch.ones_like(ratio[wavelength < 8192 / 4]))
    torch.testing.assert_close(ratio[wavelength > 8192], torch.full_like(ratio[wavelength > 8192], 8.0))
    between = ratio[(wavelength > 8192 / 4) & (wavelength < 8192)]
    assert len(between) and ((between > 1) & (between < 8)).all()


def test_swiglu_and_cross_entropy():
    torch.manual_seed(4)
    gate, up = torch.randn(2, 7), torch.randn(2, 7)
    torch.testing.assert_close(swiglu.reference(gate, up), gate * gate.sigmoid() * up)
    hidden, weight = torch.randn(2, 3, 5), torch.randn(11, 5)
    labels = torch.tensor([[1, -100, 3], [0, 10, -100]])
    logp = (hidden.double() @ weight.double().T).log_softmax(-1)
    expected = -(logp[0, 0, 1] + logp[0, 2, 3] + logp[1, 0, 0] + logp[1, 1, 10])
    torch.testing.assert_close(linear_cross_entropy.reference(hidden, weight, labels).double(), expected)


def wanted(**names):
    return SimpleNamespace(**{field.name: "auto" for field in fields(Kernels)} | names)


def test_selection_names_what_cannot_run():
    on_cpu = dict(device="cpu", dtype=torch.float32, sizes={"head_dim": 64})
    assert select(wanted(), **on_cpu).attention is attention.sdpa
    assert select(wanted(attention="reference"), **on_cpu).attention is attention.reference
    with pytest.raises(KernelError, match=r"kernels.attention=varlen cannot run here: needs a CUDA device; use auto"):
        select(wanted(attention="varlen"), **on_cpu)
    assert Kernels().attention is attention.reference
    on_gpu = dict(device="cuda", dtype=torch.bfloat16, sizes={"head_dim": 128})
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    assert select(wanted(), **on_gpu).attention is (attention.gluon if hopper else attention.varlen)
    assert select(wanted(), **{**on_gpu, "dtype": torch.float32}).attention is attention.sdpa
