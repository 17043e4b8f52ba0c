"""FlashAttention in Triton equals attention written out in float64, forward and backward."""

import functools
import itertools

import pytest
import torch
from support_attention import assert_as_exact_as_plain, bounds_of, plain, random_inputs, results

from shardwright.kernels import attention as op
from shardwright.kernels.op import KernelError, Situation
from shardwright.kernels.triton import attention_backward as backward
from shardwright.kernels.triton import attention_forward as forward
from shardwright.kernels.triton.attention import attention, scores_of
from shardwright.parallel.ring import _merge, block_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16, torch.float32]
MANY = (1, 30, 1, 65, 16)  # tokens of documents


def check(tensors, bounds, dtype, **options):
    longest = int(bounds.diff().max())
    exact = [x.to(dtype).double() for x in tensors]
    truth = results(plain, exact, torch.float64, "cpu", bounds, longest, **options)
    theirs = results(plain, exact, dtype, DEVICE, bounds, longest, **options)
    assert_as_exact_as_plain(results(attention, exact, dtype, DEVICE, bounds, longest, **options), theirs, truth)


KINDS = [
    {},
    {"window": 1},
    {"window": 20},
    {"window": 64},
    {"causal": False},
    {"softcap": 2.0},
    {"softcap": 2.0, "window": 20, "scale": 0.3},
    {"softcap": 2.0, "causal": False},
]


@pytest.mark.parametrize(
    ("dtype", "kind"), [*((DTYPES[-1], kind) for kind in KINDS), (DTYPES[0], KINDS[0]), (DTYPES[0], KINDS[-2])], ids=str
)
def test_one_document_and_many(dtype, kind):
    tensors = random_inputs(113, 1, 1, 32)
    for lengths in ((113,), MANY):
        check(tensors, bounds_of(lengths), dtype, **kind)


@pytest.mark.parametrize("dim", [16, 64, 96, 128, 256])
def test_head_sizes(dim):
    check(random_inputs(37, 1, 1, dim), bounds_of((20, 17)), DTYPES[-1], window=9)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_grouped_queries(groups):
    check(random_inputs(25, 8, 8 // groups, 16), bounds_of((25,)), DTYPES[-1])


def test_a_window_has_tiles_without_a_mask():
    check(random_inputs(390, 1, 1, 16), bounds_of((390,)), DTYPES[-1], window=300)


def test_empty_documents_and_a_bound_that_is_no_limit():
    tensors, bounds = random_inputs(40, 2, 2, 16), bounds_of((0, 13, 0, 27, 0))
    check(tensors, bounds, DTYPES[-1])
    q, k, v = (x.to(DEVICE, DTYPES[-1]) for x in tensors[:3])
    for ours, theirs in zip(
        attention(q, k, v, bounds.to(DEVICE), 27), attention(q, k, v, bounds.to(DEVICE), 4000), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_documents_cross_no_sequence_and_inputs_need_not_be_contiguous():
    tensors = random_inputs(30, 4, 2, 16, batch=2)
    bounds = bounds_of((30, 11, 19))
    check(tensors, bounds, DTYPES[-1])
    q, k, v = (x.to(DEVICE, DTYPES[-1]) for x in tensors[:3])
    wanted, _ = attention(q, k, v, bounds.to(DEVICE), 30)
    fused = torch.cat([q, k, v], 2)
    for views in (fused.split([4, 2, 2], 2), [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]):
        assert torch.equal(attention(*views, bounds.to(DEVICE), 30)[0], wanted)


@functools.cache
def case(window, causal, tokens):
    """Inputs of the launch functions, on the device, and what comes out of attention, plainly and in float64."""
    dim, kind = 16, {"window": window, "causal": causal}
    tensors, bounds = random_inputs(tokens, 1, 1, dim), bounds_of((tokens - 21, 1, 20))
    truth = results(plain, [x.to(DTYPES[0]).double() for x in tensors], torch.float64, "cpu", bounds, tokens, **kind)
    theirs = results(plain, tensors, DTYPES[0], DEVICE, bounds, tokens, **kind)
    q, k, v, dout = (x[0].to(DEVICE, DTYPES[0]) for x in tensors[:4])
    dlse = tensors[4][0].T.to(DEVICE, torch.float32)
    documents = forward.Documents(bounds=bounds.to(DEVICE), longest=tokens, tokens=tokens)
    scores = scores_of(tokens, window, causal, None, dim**-0.5)
    return (q, k, v), (dout, dlse), documents, scores, theirs, truth


@functools.cache
def outputs_and_delta(window, causal, tokens):
    inputs, gradients, documents, scores, *_ = case(window, causal, tokens)
    outputs = forward.forward(*inputs, documents, scores)
    return *outputs, backward.backward_queries(inputs, outputs, gradients, documents, scores)[1]


def assert_close(ours, theirs, truth, which):
    for mine, index in zip(ours, which, strict=True):
        mine = mine.cpu().double().view(truth[index].shape)
        assert (mine - truth[index]).norm() <= 2 * (theirs[index] - truth[index]).norm() + 1e-6 * truth[index].norm()


CASES = [(None, True), (80, True), (None, False)]


def tokens_for(config):
    """As many as it takes for some tiles to need no mask."""
    return 220 if 128 in config.blocks.values() else 120


@pytest.mark.parametrize("kind", CASES, ids=str)
@pytest.mark.parametrize("config", forward.CONFIGS, ids=forward.describe)
def test_every_forward_configuration(config, kind):
    inputs, _, documents, scores, theirs, truth = case(*kind, tokens_for(config))
    out, lse = forward.forward(*inputs, documents, scores, config)
    assert_close((out, lse.T), theirs, truth, (0, 1))


@pytest.mark.parametrize("kind", CASES, ids=str)
@pytest.mark.parametrize("config", backward.QUERY_CONFIGS, ids=forward.describe)
def test_every_configuration_of_the_queries_gradients(config, kind):
    inputs, gradients, documents, scores, theirs, truth = case(*kind, tokens_for(config))
    dq, _ = backward.backward_queries(
        inputs, outputs_and_delta(*kind, tokens_for(config))[:2], gradients, documents, scores, config
    )
    assert_close((dq,), theirs, truth, (2,))


@pytest.mark.parametrize("kind", CASES, ids=str)
@pytest.mark.parametrize("config", backward.KEY_CONFIGS, ids=forward.describe)
def test_every_configuration_of_the_keys_gradients(config, kind):
    inputs, gradients, documents, scores, theirs, truth = case(*kind, tokens_for(config))
    _, lse, delta = outputs_and_delta(*kind, tokens_for(config))
    dk, dv = backward.backward_keys(inputs, gradients[0], lse, delta, documents, scores, config)
    assert_close((dk, dv), theirs, truth, (3, 4))


@pytest.mark.parametrize("shared_kib", [99, 163, 227])
def test_some_configuration_fits_every_gpu(shared_kib):
    needs = (
        (forward.CONFIGS, forward.need),
        (backward.QUERY_CONFIGS, backward.query_need),
        (backward.KEY_CONFIGS, backward.key_need),
    )
    for (configs, need), dim in itertools.product(needs, range(16, 257, 16)):
        assert forward.fitting(configs, lambda config, need=need, dim=dim: need(config, dim), shared_kib * 1024)


@pytest.mark.parametrize("block", [16, 128])
def test_tiles_cover_every_token_once(block):
    lengths = [0, 1, 127, 128, 129, 0, *range(5, 200, 19), 300, 0]
    bounds, tokens = bounds_of(lengths), sum(lengths)
    for longest in (300, tokens):
        documents = forward.Documents(bounds=bounds.to(DEVICE), longest=longest, tokens=tokens)
        tiles = documents.tiles(block).cpu().tolist()
        wanted = [
            [begin, first, last]
            for first, last in itertools.pairwise(bounds.tolist())
            for begin in range(first, last, block)
        ]
        assert tiles[: len(wanted)] == wanted
        assert all(begin >= end for begin, _, end in tiles[len(wanted) :])


def test_poison_after_a_document_does_not_reach_it():
    q, k, v = (x.to(DEVICE, DTYPES[0]) for x in random_inputs(40, 1, 1, 16)[:3])
    bounds = bounds_of((19, 21)).to(DEVICE)
    wanted = results(attention, [q, k, v, *random_inputs(40, 1, 1, 16)[3:]], DTYPES[0], DEVICE, bounds, 21)
    for x in (q, k, v):
        x[:, 19:] = torch.nan
    got = results(attention, [q, k, v, *random_inputs(40, 1, 1, 16)[3:]], DTYPES[0], DEVICE, bounds, 21)
    for before, after in zip(wanted, got, strict=True):
        assert torch.equal(before[:, :19], after[:, :19])


def test_the_log_sum_exp_is_what_the_ring_merges():
    q, k, v = (x.to(DEVICE, DTYPES[0]) for x in random_inputs(32, 4, 2, 16)[:3])
    before = torch.full((1, 16), 100, device=DEVICE)
    whole = torch.tensor([0, 16], dtype=torch.int32, device=DEVICE)
    late = slice(16, 32)
    near = attention(q[:, late], k[:, late], v[:, late], whole, 16)
    far = attention(q[:, late], k[:, :16], v[:, :16], whole, 16, causal=False)
    theirs = block_forward(q[:, late], k, v, before, 16)
    out, lse = near[0].float(), near[1].clone()
    _merge(out, lse, far[0].float(), far[1])
    torch.testing.assert_close(out, theirs[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse, theirs[1], atol=2e-3, rtol=2e-3)
    assert near[1].dtype == torch.float32


def test_the_operator_keeps_its_promises_to_torch():
    q, k, v = (x.to(DEVICE, DTYPES[0]).requires_grad_() for x in random_inputs(20, 2, 1, 16)[:3])
    bounds = bounds_of((7, 13)).to(DEVICE)
    options = (None, True, None, 0.25, "triton")  # window, causal, softcap, scale, backend
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.shardwright.attention, (q, k, v, bounds, 13, *options), test_utils=tests)


def test_compiles_without_a_graph_break():
    tensors, bounds = random_inputs(20, 2, 1, 16), bounds_of((7, 13))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    ours = results(compiled, tensors, DTYPES[0], DEVICE, bounds, 13, window=5)
    theirs = results(attention, tensors, DTYPES[0], DEVICE, bounds, 13, window=5)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_one_output_is_enough_for_gradients():
    tensors, bounds = random_inputs(20, 1, 1, 16), bounds_of((7, 13))
    for index in (0, 1):
        grads = []
        for function, dtype, device in ((attention, DTYPES[-1], DEVICE), (plain, torch.float64, "cpu")):
            q = tensors[0].to(device, dtype, copy=True).requires_grad_()
            k, v = (x.to(device, dtype) for x in tensors[1:3])
            function(q, k, v, bounds.to(device), 13)[index].sum().backward()
            grads.append(q.grad.cpu().double())
        torch.testing.assert_close(*grads, atol=1e-2 if DEVICE == "cuda" else 1e-5, rtol=1e-2)


def test_candidate_has_the_signature_of_the_reference():
    q, k, v = (x.to(DEVICE, DTYPES[0]) for x in random_inputs(20, 2, 1, 16)[:3])
    bounds = bounds_of((7, 13)).to(DEVICE)
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None].to(DEVICE)
    function = next(c.function for c in op.OP.candidates if c.name == "triton")
    for window in (None, 4):
        ours = function(q, k, v, positions, bounds, 13, window=window)
        theirs = op.reference(q, k, v, positions, bounds, 13, window=window)
        torch.testing.assert_close(ours, theirs, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        (dict(device="cpu", dtype=torch.bfloat16, sizes={"head_dim": 64}), "needs a CUDA device"),
        (dict(device="cuda", dtype=torch.float32, sizes={"head_dim": 64}), "needs bf16 or fp16"),
        (dict(device="cuda", dtype=torch.bfloat16, sizes={"head_dim": 264}), "needs a head size up to 256 that 16"),
    ],
)
def test_candidate_refuses(situation, reason):
    with pytest.raises(KernelError, match=reason):
        op.OP.choose("triton", Situation(**situation))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"window": 0}, "window=0"),
        ({"window": 3, "causal": False}, "needs causal=True"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"scale": -1.0}, "scale=-1.0"),
    ],
)
def test_refuses_options(change, text):
    q, k, v = (x.to(DEVICE, DTYPES[0]) for x in random_inputs(20, 2, 1, 16)[:3])
    with pytest.raises(KernelError, match=text):
        attention(q, k, v, bounds_of((20,)).to(DEVICE), 20, **change)


def test_refuses_tensors():
    q, k, v = (x.to(DEVICE, DTYPES[0]) for x in random_inputs(20, 3, 2, 24)[:3])
    bounds = bounds_of((20,)).to(DEVICE)
    with pytest.raises(KernelError, match="number of heads"):
        attention(q, k, v, bounds, 20)
    with pytest.raises(KernelError, match="head_dim=24"):
        attention(k, k, v, bounds, 20)
    q = q[..., :16]
    with pytest.raises(KernelError, match="must all be"):
        attention(q, q, q.double(), bounds, 20)
    with pytest.raises(KernelError, match=r"use bounds\.int"):
        attention(q, q, q, bounds.long(), 20)
