"""FP8 attention for Hopper: as exact as its roundings allow, in every configuration; on a Hopper GPU but for shapes."""

import pytest
import torch
from support_attention import bounds_of, plain, random_inputs, results
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwright.kernels import Kernels, rope
from shardwright.kernels import attention as op
from shardwright.kernels.gluon import attention_fp8
from shardwright.kernels.op import KernelError, Situation
from shardwright.kernels.triton import attention as wide
from shardwright.kernels.triton.attention_forward import Documents
from shardwright.kernels.triton.attention_fp8 import attention as ours
from shardwright.kernels.triton.quantise import TILE, key_of, quantise
from shardwright.models.blocks import Attention, Context, rotary_angles

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
CONFIGS = [(dim, config) for dim, configs in attention_fp8.CONFIGS.items() for config in configs]
LENGTHS = (1, 30, 0, 257, 128, 130, 1, 65)
KINDS = [{}, {"causal": False}, {"window": 2}, {"window": 100}, {"scale": 0.3}]
WEIGHTS = 0.04  # relative error in the norm that weights in e4m3 alone may cause
WHOLE = 0.1  # and with queries, keys and values in it


def name(value):
    return str(value.arguments) if hasattr(value, "arguments") else str(value)


def distance(found, exact):
    return ((found.double().cpu() - exact).norm() / exact.norm()).item()


def angles_of(lengths, dim, device="cpu"):
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    return rotary_angles(positions, dim, 1e4, None)


@needs_hopper
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (3, 1)])
def test_outputs_and_gradients(dim, dtype, kind, heads, kv_heads):
    tensors, bounds = random_inputs(sum(LENGTHS), heads, kv_heads, dim), bounds_of(LENGTHS)
    exact = [x.to(dtype).double() for x in tensors]
    angles = angles_of(LENGTHS, dim)

    def truth(q, k, v, *rest, **options):
        turn = (x.double() for x in rope.reference(q, k, *(a.double() for a in angles)))
        return plain(*turn, v, *rest, **options)

    def found(*args, **options):
        return ours(*args, angles=tuple(a.cuda() for a in angles), **options)

    wanted = results(truth, exact, torch.float64, "cpu", bounds, max(LENGTHS), **kind)
    for label, mine, other in zip(
        ("out", "lse", "dq", "dk", "dv"),
        results(found, exact, dtype, "cuda", bounds, max(LENGTHS), **kind),
        wanted,
        strict=True,
    ):
        assert distance(mine, other) < WHOLE * (2 if label.startswith("d") else 1), label


def case(dim, lengths=(300, 1, 513, 128), window=None, causal=True):
    """Inputs of the launch function."""
    tensors = random_inputs(sum(lengths), 4, 2, dim)[:3]
    q, k, v = (x[0].to("cuda", torch.bfloat16) for x in tensors)
    documents = Documents(bounds=bounds_of(lengths).cuda(), longest=max(lengths), tokens=sum(lengths))
    quantised = quantise(q, k, v, None, documents)[2]
    return quantised, documents, wide.scores_of(max(lengths), window, causal, None, dim**-0.5), torch.bfloat16


def restored(quantised, lengths):
    """What the kernel reads, in float64: queries and keys after the Hadamard matrix, and values."""
    key, tiles = key_of(torch.arange(TILE)), sum(-(-n // TILE) for n in lengths)
    keep = torch.cat([torch.arange(-(-n // TILE) * TILE) < n for n in lengths])
    v_values = torch.empty(quantised.k_values.shape, dtype=torch.float64)
    v_values[:, :, key] = quantised.v_values.double().cpu().transpose(2, 3)
    for values, scales in zip((quantised.q_values, quantised.k_values, v_values), quantised[3:6], strict=True):
        x = values.double().cpu() * scales.double().cpu().T[:, :, None, None]
        yield x[:tiles].transpose(1, 2).flatten(0, 1)[keep][None]


@needs_hopper
@pytest.mark.parametrize("kind", [{}, {"causal": False}, {"window": 100}], ids=str)
@pytest.mark.parametrize(("dim", "config"), CONFIGS, ids=name)
def test_every_configuration(dim, config, kind):
    lengths = (300, 1, 513, 128)
    inputs = case(dim, lengths, **kind)
    out, lse = attention_fp8.forward(*inputs, config)
    wanted, wanted_lse = plain(*restored(inputs[0], lengths), bounds_of(lengths), max(lengths), **kind)
    assert distance(out[None], wanted) < WEIGHTS
    assert (lse.T[None].double().cpu() - wanted_lse).abs().max() < 1e-2


@needs_hopper
@pytest.mark.parametrize(("dim", "config"), CONFIGS, ids=name)
def test_a_thousand_are_alike(dim, config):
    inputs = case(dim, lengths=(2000, 700, 1396))
    out, lse = attention_fp8.forward(*inputs, config)
    for _ in range(1000):
        again = attention_fp8.forward(*inputs, config)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)


@needs_hopper
@pytest.mark.parametrize("kind", [{}, {"causal": False}, {"window": 50}], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_poison_in_another_document_does_not_reach_this_one(dim, kind):
    q, k, v = (x.to("cuda", torch.bfloat16) for x in random_inputs(300, 2, 2, dim)[:3])
    bounds = bounds_of((90, 110, 100)).cuda()
    clean = ours(q, k, v, bounds, 110, **kind)
    for x in (q, k, v):
        x[:, 90:200] = torch.nan
    for before, after in zip(clean, ours(q, k, v, bounds, 110, **kind), strict=True):
        assert torch.equal(before[:, :90], after[:, :90]) and torch.equal(before[:, 200:], after[:, 200:])
        assert after[:, 90:200].isnan().all()


@needs_hopper
def test_outliers_cost_less_than_with_one_scale_for_all():
    """A thousandth of the entries is 10 to 50 times as large; compared with one scale for each of the three tensors."""
    q, k, v = (x[0] for x in random_inputs(1024, 2, 2, 128)[:3])
    generator = torch.Generator().manual_seed(0)
    for x in (q, k, v):
        rare = torch.rand(x.shape, generator=generator) < 1e-3
        x[rare] *= 10 + 40 * torch.rand(int(rare.sum()), generator=generator, dtype=x.dtype)
    q, k, v = (x.bfloat16().double()[None] for x in (q, k, v))
    bounds = bounds_of((1024,))
    exact, _ = plain(q, k, v, bounds, 1024)
    rounded = [(x / x.abs().max() * 448).float().to(torch.float8_e4m3fn).double() / 448 * x.abs().max() for x in (q, k)]
    coarse, _ = plain(*rounded, v, bounds, 1024)
    found, _ = ours(*(x.to("cuda", torch.bfloat16) for x in (q, k, v)), bounds.cuda(), 1024)
    assert distance(found, exact) < 0.85 * distance(coarse, exact)


@needs_hopper
def test_a_model_turns_queries_and_keys_once():
    """Attention that fuses the embedding gives what attention after it does, up to its roundings."""
    torch.manual_seed(0)
    blocks = [Attention(256, 4, 2, 64, None, Kernels(attention=function)) for function in (op.fp8, op.gluon)]
    blocks[1].load_state_dict(blocks[0].state_dict())
    positions = torch.arange(200, device="cuda")[None]
    cos, sin = rotary_angles(positions, 64, 1e4, None)
    context = Context(positions_BT=positions, bounds=bounds_of((200,)).cuda(), longest=200, cos_BTD=cos, sin_BTD=sin)
    x = torch.randn(1, 200, 256, device="cuda", dtype=torch.bfloat16)
    first, second = (block.to("cuda", torch.bfloat16)(x, context) for block in blocks)
    assert distance(first, second.double().cpu()) < WHOLE


@pytest.mark.parametrize("rotates", [True, False])
def test_shapes_for_compilers(rotates):
    angles = angles_of((20,), 64) if rotates else None
    inputs = [x.bfloat16() for x in random_inputs(20, 4, 2, 64)[:3]]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        q, k, v = (mode.from_tensor(x).requires_grad_() for x in inputs)
        out, lse = ours(q, k, v, bounds_of((20,)), 20, angles=angles)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, q.shape[:3], torch.float32)


def test_only_this_attention_fuses_rope():
    assert Kernels(attention=op.fp8).attention_fuses_rope
    assert not any(Kernels(attention=f).attention_fuses_rope for f in (op.reference, op.gluon, op.triton))


def test_is_taken_by_name_only_and_on_hopper_only():
    situation = Situation(device="cpu", dtype=torch.bfloat16, sizes={"head_dim": 64})
    assert op.OP.choose("auto", situation) is not op.fp8
    with pytest.raises(KernelError, match=r"kernels\.attention=fp8 cannot run here: needs a CUDA device"):
        op.OP.choose("fp8", situation)
    q, k, v = (x.half() for x in random_inputs(20, 2, 2, 64)[:3])
    with pytest.raises(KernelError, match=r"compute capability 9.0.*use kernels.attention=auto"):
        ours(q, k, v, bounds_of((20,)), 20)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"window": 0}, "window=0"),
        ({"window": 5, "causal": False}, "needs causal=True"),
        ({"angles": (torch.zeros(1, 20, 32),) * 2}, "give cosines and sines"),
    ],
)
def test_refuses(options, text):
    q, k, v = (x.half() for x in random_inputs(20, 2, 2, 64)[:3])
    with pytest.raises(KernelError, match=text):
        ours(q, k, v, bounds_of((20,)), 20, **options)
    with pytest.raises(KernelError, match="must be contiguous int32"):
        ours(q, k, v, bounds_of((20,)).long(), 20)
