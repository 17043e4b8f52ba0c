"""Quantisation for FP8 attention: what its tiles stand for are the rotated queries and keys, and the values."""

import itertools

import pytest
import torch
from support_attention import bounds_of

from shardwright.kernels.op import KernelError
from shardwright.kernels.rope import reference
from shardwright.kernels.triton import quantise as ours
from shardwright.kernels.triton.attention_forward import Documents
from shardwright.kernels.triton.quantise import TILE, quantise
from shardwright.models.blocks import rotary_angles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
DTYPES = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
LENGTHS = (1, 130, 0, 128, 30)
HALF_STEP = 2.0**-4  # of e4m3, relative to a value
pytest_plugins = ["support_fp8"]
pytestmark = [
    pytest.mark.skipif(not FP8, reason="needs a GPU that has FP8"),
    pytest.mark.usefixtures("casts_as_on_a_gpu"),
]


def case(lengths=LENGTHS, heads=3, kv_heads=1, dim=64, dtype=torch.float16):
    """Queries, keys, values, angles and documents."""
    generator = torch.Generator().manual_seed(sum(lengths) + dim)
    tokens = sum(lengths)
    tensors = [torch.randn(tokens, n, dim, generator=generator) for n in (heads, kv_heads, kv_heads)]
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(DEVICE)
    angles = [x[0] for x in rotary_angles(positions, dim, 1e4, None)]
    documents = Documents(bounds=bounds_of(lengths).to(DEVICE), longest=max(lengths), tokens=tokens)
    return [x.to(DEVICE, dtype) for x in tensors], angles, documents


def rotated(x, angles):
    return reference(x[None], x[None], *(angle[None] for angle in angles))[0][0]


def order_of_columns(dim):
    """Sums and differences of halves alternate; a thread of the tensor cores has, and writes, four of every 16."""
    alternating = torch.arange(dim).unflatten(0, (2, -1)).T
    return alternating.reshape(-1, 4, 4, 4).transpose(1, 2).flatten()


def spread(x, dim):
    """What the Hadamard matrix makes of rows, in float64, written out: signs, then sums and differences."""
    words = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    signs = torch.tensor([1 - 2 * (words[i // 32] >> i % 32 & 1) for i in range(dim)], dtype=torch.float64)
    x, step = x.double().cpu() * signs, 1
    while step < dim:
        low, high = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x, step = torch.stack((low + high, low - high), -2).flatten(-3), 2 * step
    return x[..., order_of_columns(dim)] * dim**-0.5


def tiles_of(x_PHD, lengths):
    """Tiles [M, heads, TILE, D] padded with zeros, of documents in their order."""
    parts = [part for part in x_PHD.split(lengths) if len(part)]
    padded = [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, -len(part) % TILE)) for part in parts]
    return torch.cat(padded).unflatten(0, (-1, TILE)).transpose(1, 2)


def meant(values, scales):
    """What quantised tiles stand for."""
    return values.double().cpu() * scales.double().cpu().T[:, :, None, None]


def assert_rounded(found, exact):
    """Values are off by half a step of e4m3 at most; or, for the smallest, of its fixed point, 2^-10 of a unit of it."""
    largest = exact.abs().amax((-1, -2), keepdim=True)
    assert ((found - exact).abs() <= HALF_STEP * exact.abs() * 1.01 + largest / 448 * 2.0**-10 * 1.01).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 64), (4, 2, 128), (5, 5, 64)])
def test_tiles_stand_for_what_was_given(heads, kv_heads, dim, dtype):
    (q, k, v), angles, documents = case(heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    q_turned, k_turned, found = quantise(q, k, v, angles, documents)
    # The kernel's products and sums may be fused, so that a turned value is now and then rounded the other way.
    for mine, x in ((q_turned, q), (k_turned, k)):
        torch.testing.assert_close(mine, rotated(x, angles), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    used = sum(-(-length // TILE) for length in LENGTHS)
    for x, values, scales in ((q_turned, found.q_values, found.q_scales), (k_turned, found.k_values, found.k_scales)):
        assert_rounded(meant(values, scales)[:used], tiles_of(spread(x, dim), LENGTHS))
    key = ours.key_of(torch.arange(TILE))
    assert sorted(key.tolist()) == list(range(TILE))
    exact = tiles_of(v.double().cpu(), LENGTHS)[:, :, key].transpose(2, 3)
    assert_rounded(meant(found.v_values, found.v_scales)[:used], exact)


def test_first_tiles_of_documents():
    (q, k, v), angles, documents = case()
    _, _, found = quantise(q, k, v, angles, documents)
    first = 0
    for (start, _), length in zip(itertools.pairwise(documents.bounds.tolist()), LENGTHS, strict=True):
        assert not length or found.firsts[start] == first
        first += -(-length // TILE)


def test_order_of_keys_is_that_of_the_tensor_cores():
    """A thread has keys 2c and 2c + 1 of each 8, and wants four places from 4c of each 16."""
    for thread, group in itertools.product(range(4), range(0, TILE, 16)):
        has = [group + half + 2 * thread + i for half in (0, 8) for i in range(2)]
        assert has == [ours.key_of(group + 4 * thread + i) for i in range(4)]


@pytest.mark.parametrize("config", ours.CONFIGS, ids=str)
def test_every_configuration_gives_the_same(config):
    (q, k, v), angles, documents = case((130,), heads=3, kv_heads=3)
    first = quantise(q, k, v, angles, documents, ours.CONFIGS[0])
    again = quantise(q, k, v, angles, documents, config)
    for a, b in zip((*first[:2], *first[2][:6]), (*again[:2], *again[2][:6]), strict=True):
        assert torch.equal(a.float(), b.float())


def test_products_are_kept_and_outliers_spread():
    (q, k, v), _, documents = case((128,), heads=1, dim=128)
    q[:, :, 5] *= 40
    *_, found = quantise(q, k, v, None, documents)
    q_found, k_found = meant(found.q_values, found.q_scales)[0, 0], meant(found.k_values, found.k_scales)[0, 0]
    exact = q[:, 0].double().cpu() @ k[:, 0].double().cpu().T
    assert (q_found @ k_found.T - exact).norm() < 0.05 * exact.norm()
    assert q_found.abs().max() < 0.5 * q.abs().max()


def test_queries_and_keys_that_are_turned_already():
    (q, k, v), angles, documents = case()
    q_turned, k_turned, found = quantise(q, k, v, angles, documents)
    *empty, again = quantise(q_turned, k_turned, v, None, documents)
    assert [x.numel() for x in empty] == [0, 0]
    used = sum(-(-length // TILE) for length in LENGTHS)
    for a, b in zip(found[:3], again[:3], strict=True):
        assert torch.equal(a[:used].float(), b[:used].float())


def test_views_of_a_fused_projection():
    (q, k, v), angles, documents = case((140,), heads=2, kv_heads=1)
    wanted = quantise(q, k, v, angles, documents)
    found = quantise(*torch.cat([q, k, v], 1).split([2, 1, 1], 1), angles, documents)
    for a, b in zip((*wanted[:2], *wanted[2][:6]), (*found[:2], *found[2][:6]), strict=True):
        assert torch.equal(a.float(), b.float())


def test_nothing_of_a_neighbour_is_read():
    (q, k, v), angles, documents = case((100, 28, 100))
    clean = quantise(q, k, v, angles, documents)[2]
    for x in (q, k, v):
        x[100:128] = torch.nan
    dirty = quantise(q, k, v, angles, documents)[2]
    for a, b in zip(clean[:3], dirty[:3], strict=True):
        assert torch.equal(a[0::2].float(), b[0::2].float()) and b[1].isnan().any()
    for a, b in zip(clean[3:6], dirty[3:6], strict=True):
        assert torch.equal(a[:, 0::2], b[:, 0::2])


def test_zeros_have_a_scale_that_sums_survive():
    (q, k, v), angles, documents = case((64,))
    *_, found = quantise(q, k, v * 0, angles, documents)
    assert (found.v_scales == 1).all() and not found.v_values.float().any()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda q, k, v, cos: (q, k[:, :, :32], v, cos), "must be alike"),
        (lambda q, k, v, cos: (q[..., :32], k[..., :32], v[..., :32], cos[:, :32]), "head_dim=32"),
        (lambda q, k, v, cos: (q.float(), k.float(), v.float(), cos), "takes bf16 or fp16"),
        (lambda q, k, v, cos: (q, k, v, cos.half()), "in float32"),
        (lambda q, k, v, cos: (q, k, v, cos[:, :32]), "in float32"),
    ],
)
def test_refuses(change, text):
    (q, k, v), (cos, sin), documents = case()
    q, k, v, cos = change(q, k, v, cos)
    with pytest.raises(KernelError, match=text):
        quantise(q, k, v, (cos, sin), documents)
