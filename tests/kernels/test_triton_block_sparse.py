"""Attention over listed blocks equals attention under a mask of tokens in float64, and visits nothing else."""

import functools
import itertools

import pytest
import torch
import triton.language as tl
from support_attention import assert_as_exact_as_plain, bounds_of, random_inputs, results
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwright.kernels import block_sparse as op
from shardwright.kernels.block_sparse import BlockLists
from shardwright.kernels.op import KernelError, Situation
from shardwright.kernels.triton import attention_backward as backward
from shardwright.kernels.triton import attention_forward as forward
from shardwright.kernels.triton import block_sparse
from shardwright.kernels.triton.attention import attention, scores_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16, torch.float32]
MANY = (1, 129, 0, 30)  # tokens of documents


def plain(q, k, v, bounds, longest, *, mask, block, window=None, causal=True, softcap=None, scale=None):  # noqa: PLR0913
    """Attention of one document after the other; the softmax in float32 or more."""
    groups = q.shape[2] // k.shape[2]
    packed = (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2))
    q_HPD, k_HPD, v_HPD = (x.flatten(0, 1).transpose(0, 1) for x in packed)
    listed = mask.to(q.device).repeat_interleave(block, 1).repeat_interleave(block, 2)
    outs, lses = [], []
    for first, last in itertools.pairwise(bounds.tolist()):
        scores = q_HPD[:, first:last] @ k_HPD[:, first:last].transpose(1, 2)
        scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * (scale or q.shape[-1] ** -0.5)
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        index = torch.arange(last - first, device=q.device)
        distance = index[:, None] - index
        seen = listed[:, : last - first, : last - first] & ~((distance < 0) & causal)
        seen = (seen & (distance < (window or last))).expand_as(scores)
        lses.append(scores.masked_fill(~seen, -torch.inf).logsumexp(-1))
        weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).where(seen, 0)
        outs.append(weights.to(v.dtype) @ v_HPD[:, first:last])
    out, lse = torch.cat(outs, 1).transpose(0, 1), torch.cat(lses, 1).transpose(0, 1)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def listed_attention(q, k, v, bounds, longest, *, mask, block, function=attention, **options):
    lists = BlockLists.from_mask(mask.to(q.device), block)
    return function(q, k, v, bounds, longest, lists=lists, **options)


def random_mask(*shape, density=0.6):
    """With a query block that sees nothing, and one that sees only keys after it."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < density
    mask[0, 1] = False
    mask[-1, 0] = torch.arange(shape[2]) > 0
    return mask


def comparable(found):
    """Results without the infinite log-sum-exps, after a look that nothing else is infinite, and where those were."""
    assert not any(x.isnan().any() for x in found) and not any(x.isinf().any() for x in (found[0], *found[2:]))
    empty = found[1] == -torch.inf
    assert (found[0][empty] == 0).all() and (found[2][empty] == 0).all()
    return [found[0], found[1].masked_fill(empty, 0), *found[2:]], empty


def check(tensors, bounds, dtype, function=attention, **options):
    longest = int(bounds.diff().max())
    exact = [x.to(dtype).double() for x in tensors]
    truth, empty = comparable(results(plain, exact, torch.float64, "cpu", bounds, longest, **options))
    theirs, _ = comparable(results(plain, exact, dtype, DEVICE, bounds, longest, **options))
    ours = functools.partial(listed_attention, function=function)
    ours, ours_empty = comparable(results(ours, exact, dtype, DEVICE, bounds, longest, **options))
    assert torch.equal(ours_empty, empty)
    assert_as_exact_as_plain(ours, theirs, truth)
    return int(empty.sum())


KINDS = [
    {},
    {"window": 20},
    {"window": 100},
    {"causal": False},
    {"softcap": 2.0},
    {"softcap": 2.0, "window": 70, "scale": 0.3},
    {"softcap": 2.0, "causal": False},
]


@pytest.mark.parametrize(
    ("dtype", "kind"), [*((DTYPES[-1], kind) for kind in KINDS), (DTYPES[0], KINDS[0]), (DTYPES[0], KINDS[-2])], ids=str
)
def test_packed_documents(dtype, kind):
    assert check(random_inputs(160, 1, 1, 16), bounds_of(MANY), dtype, mask=random_mask(1, 4, 5), block=64, **kind)


@pytest.mark.parametrize(("heads", "kv_heads", "mask_heads"), [(4, 2, 4), (2, 1, 1)])
def test_grouped_queries_and_masks_of_heads(heads, kv_heads, mask_heads):
    tensors, mask = random_inputs(130, heads, kv_heads, 16), random_mask(mask_heads, 3, 3)
    check(tensors, bounds_of((130,)), DTYPES[-1], mask=mask, block=64)


@pytest.mark.parametrize(("dim", "block"), [(64, 128), (96, 64), (128, 192), (256, 64)])
def test_head_sizes_and_blocks(dim, block):
    check(
        random_inputs(200, 1, 1, dim), bounds_of((200,)), DTYPES[-1], mask=random_mask(1, 4, 4), block=block, window=90
    )


def test_sequences_hold_several_documents():
    tensors, bounds = random_inputs(80, 2, 1, 16, batch=2), bounds_of((80, 10, 70))
    check(tensors, bounds, DTYPES[-1], mask=random_mask(2, 2, 2), block=64, window=50)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_reference(kind):
    tensors, mask = random_inputs(160, 2, 1, 16), random_mask(2, 4, 5)
    check(tensors, bounds_of(MANY), DTYPES[-1], op.reference, mask=mask, block=64, **kind)


def test_nothing_listed():
    tensors, mask = random_inputs(100, 2, 1, 16), torch.zeros((1, 2, 2), dtype=torch.bool)
    found = results(listed_attention, tensors, DTYPES[-1], DEVICE, bounds_of((100,)), 100, mask=mask, block=64)
    assert all((x == 0).all() for x in (found[0], *found[2:])) and (found[1] == -torch.inf).all()


def test_gradients_of_an_infinite_log_sum_exp_go_nowhere():
    tensors, mask = random_inputs(100, 1, 1, 16), torch.tensor([[[True, True], [False, False]]])
    wanted = results(listed_attention, tensors, DTYPES[-1], DEVICE, bounds_of((100,)), 100, mask=mask, block=64)
    tensors[4][:, 64:] = torch.nan
    found = results(listed_attention, tensors, DTYPES[-1], DEVICE, bounds_of((100,)), 100, mask=mask, block=64)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def blocks_with_nan(x, block):
    """Of one sequence [1, T, H, ...], by head and block."""
    return torch.tensor([[bool(tokens.isnan().any()) for tokens in head.split(block)] for head in x[0].transpose(0, 1)])


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize("causal", [False, True])
def test_exactly_the_listed_blocks_are_visited(causal):
    """NaN in a block of keys reaches the queries that list it, and NaN in a block of queries the keys that they list.

    The first heads have it in one block of keys each, the others in one of queries.
    """
    block, blocks = 64, 2 if causal else 3
    tokens = block * blocks - 10
    mask = torch.tensor([[[True, True, True], [True, False, True], [False, True, False]]])[:, :blocks, :blocks]
    q, k, v, *rest = random_inputs(tokens, 2 * blocks, 2 * blocks, 16)
    for index in range(blocks):
        poisoned = slice(index * block, (index + 1) * block)
        k[:, poisoned, index], v[:, poisoned, index] = torch.nan, torch.nan
        q[:, poisoned, blocks + index] = torch.nan
    options = {"mask": mask, "block": block, "causal": causal}
    bounds = bounds_of((tokens,))
    out, lse, dq, dk, dv = results(listed_attention, [q, k, v, *rest], DTYPES[0], DEVICE, bounds, tokens, **options)
    visited = mask[0].tril() if causal else mask[0]
    for found in (out, lse, dq):
        assert torch.equal(blocks_with_nan(found, block)[:blocks], visited.T)
    for found in (dk, dv):
        assert torch.equal(blocks_with_nan(found, block)[blocks:], visited)


def test_lists_longer_than_what_is_read_at_once(monkeypatch):
    """The last queries see all keys, and all queries see the first keys."""
    blocks = 140
    if DEVICE == "cpu":  # to interpret as many takes a minute
        monkeypatch.setattr(block_sparse, "CHUNK", tl.constexpr(2))
        blocks = 5
    mask = torch.zeros((1, blocks, blocks), dtype=torch.bool)
    mask[0, -1], mask[0, :, 0] = True, True
    tokens = 64 * blocks - 7
    check(random_inputs(tokens, 1, 1, 16), bounds_of((tokens,)), DTYPES[-1], mask=mask, block=64, causal=False)


@functools.cache
def case(window, causal):
    """Inputs of the launch functions, on the device, what they give, and attention in float64 and plainly."""
    tokens, dim, block = 170, 16, 128
    mask = torch.tensor([[[True, False], [True, True]]])
    kind = {"mask": mask, "block": block, "window": window, "causal": causal}
    tensors, bounds = random_inputs(tokens, 1, 1, dim), bounds_of((tokens - 20, 20))
    exact = [x.to(DTYPES[0]).double() for x in tensors]
    truth, _ = comparable(results(plain, exact, torch.float64, "cpu", bounds, tokens, **kind))
    theirs, _ = comparable(results(plain, exact, DTYPES[0], DEVICE, bounds, tokens, **kind))
    q, k, v, dout = (x[0].to(DEVICE, DTYPES[0]) for x in tensors[:4])
    dlse = tensors[4][0].T.to(DEVICE, torch.float32)
    documents = forward.Documents(bounds=bounds.to(DEVICE), longest=tokens, tokens=tokens)
    lists = BlockLists.from_mask(kind["mask"].to(DEVICE), block)
    scores = scores_of(tokens, window, causal, None, dim**-0.5, lists.keys, lists.queries, block)
    outputs = forward.forward(q, k, v, documents, scores)
    delta = backward.backward_queries((q, k, v), outputs, (dout, dlse), documents, scores)[1]
    return (q, k, v), outputs, (dout, dlse), delta, documents, scores, theirs, truth


def assert_close(ours, theirs, truth, which):
    for mine, index in zip(ours, which, strict=True):
        mine = mine.cpu().double().nan_to_num(neginf=0).view(truth[index].shape)
        assert (mine - truth[index]).norm() <= 2 * (theirs[index] - truth[index]).norm() + 1e-6 * truth[index].norm()


CASES = [(100, True), (None, False)]


def first_and_slow(configs):
    """All tiles are tried without lists in every run; with lists, each night."""
    return [configs[0], *(pytest.param(config, marks=pytest.mark.slow) for config in configs[1:])]


@pytest.mark.parametrize("kind", CASES, ids=str)
@pytest.mark.parametrize("config", first_and_slow(forward.CONFIGS), ids=forward.describe)
def test_every_forward_configuration(config, kind):
    inputs, _, _, _, documents, scores, theirs, truth = case(*kind)
    out, lse = forward.forward(*inputs, documents, scores, config)
    assert_close((out, lse.T), theirs, truth, (0, 1))


@pytest.mark.parametrize("kind", CASES, ids=str)
@pytest.mark.parametrize("config", first_and_slow(backward.QUERY_CONFIGS), ids=forward.describe)
def test_every_configuration_of_the_queries_gradients(config, kind):
    inputs, outputs, gradients, _, documents, scores, theirs, truth = case(*kind)
    dq, _ = backward.backward_queries(inputs, outputs, gradients, documents, scores, config)
    assert_close((dq,), theirs, truth, (2,))


@pytest.mark.parametrize("kind", CASES, ids=str)
@pytest.mark.parametrize("config", first_and_slow(backward.KEY_CONFIGS), ids=forward.describe)
def test_every_configuration_of_the_keys_gradients(config, kind):
    inputs, outputs, gradients, delta, documents, scores, theirs, truth = case(*kind)
    found = backward.backward_keys(inputs, gradients[0], outputs[1], delta, documents, scores, config)
    assert_close(found, theirs, truth, (3, 4))


@pytest.mark.parametrize("shared_kib", [99, 163, 227])
@pytest.mark.parametrize("block", [64, 128, 192])
def test_some_configuration_fits_every_block(block, shared_kib):
    needs = (
        (forward.CONFIGS, forward.need),
        (backward.QUERY_CONFIGS, backward.query_need),
        (backward.KEY_CONFIGS, backward.key_need),
    )
    for (configs, need), dim in itertools.product(needs, range(16, 257, 16)):
        fits = forward.fitting(configs, lambda c, need=need, dim=dim: need(c, dim), shared_kib * 1024, block)
        assert fits and all(block % size == 0 for config in fits for size in config.blocks.values())


def test_lists_of_a_mask():
    mask = random_mask(2, 5, 7)
    lists = BlockLists.from_mask(mask.to(DEVICE), 64)
    for listed, wanted in ((lists.keys, mask), (lists.queries, mask.mT)):
        assert listed.dtype == torch.int32 and listed.is_contiguous()
        for row, flags in zip(listed.flatten(0, 1).tolist(), wanted.flatten(0, 1), strict=True):
            assert row[1 : 1 + row[0]] == flags.nonzero()[:, 0].tolist()
    assert torch.equal(lists.mask().cpu(), mask)


def test_lists_are_made_without_the_host():
    with FakeTensorMode():  # raises where the host asks for a value
        lists = BlockLists.from_mask(torch.ones((2, 3, 5), dtype=torch.bool, device=DEVICE), 64)
    assert lists.keys.shape == (2, 3, 6) and lists.queries.shape == (2, 5, 4)


def test_same_bits_each_time():
    """On a GPU, in a shape with many programs at once."""
    tokens, heads, repeats = (4000, 16, 20) if DEVICE == "cuda" else (130, 1, 1)
    tensors, blocks = random_inputs(tokens, heads, heads, 16), tokens // 64 + 1
    options = {"mask": random_mask(heads, blocks, blocks), "block": 64, "window": tokens // 2}
    bounds = bounds_of((tokens // 3, tokens - tokens // 3))
    first, *others = (
        results(listed_attention, tensors, DTYPES[0], DEVICE, bounds, tokens, **options) for _ in range(1 + repeats)
    )
    assert all(torch.equal(a, b) for found in others for a, b in zip(first, found, strict=True))


def test_the_operator_keeps_its_promises_to_torch():
    q, k, v = (x.to(DEVICE, DTYPES[0]).requires_grad_() for x in random_inputs(70, 1, 1, 16)[:3])
    lists = BlockLists.from_mask(torch.ones((1, 2, 2), dtype=torch.bool, device=DEVICE), 64)
    options = (None, True, None, 0.25, "triton", lists.keys, lists.queries, 64)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    bounds = bounds_of((70,)).to(DEVICE)
    torch.library.opcheck(torch.ops.shardwright.attention, (q, k, v, bounds, 70, *options), test_utils=tests)


def test_compiles_without_a_graph_break():
    tensors, mask, bounds = random_inputs(80, 1, 1, 16), random_mask(1, 2, 2), bounds_of((70, 10))
    lists = BlockLists.from_mask(mask.to(DEVICE), 64)
    compiled = torch.compile(op.triton, fullgraph=True, backend="aot_eager")
    ours = results(compiled, tensors, DTYPES[0], DEVICE, bounds, 70, lists=lists, window=15)
    theirs = results(op.triton, tensors, DTYPES[0], DEVICE, bounds, 70, lists=lists, window=15)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_auto_takes_the_kernel_where_it_runs():
    sizes = {"head_dim": 128}
    assert op.OP.choose("auto", Situation(device="cpu", dtype=torch.bfloat16, sizes=sizes)) is op.reference
    with pytest.raises(KernelError, match="needs a CUDA device"):
        op.OP.choose("triton", Situation(device="cpu", dtype=torch.bfloat16, sizes=sizes))


@pytest.mark.parametrize(
    ("mask", "block", "text"),
    [
        (torch.ones(1, 2, 2), 64, r"float32 \[1, 2, 2\].*use mask\.bool"),
        (torch.ones(2, 2, dtype=torch.bool), 64, r"bool \[2, 2\].*mask\[None\]"),
        (torch.ones(1, 2, 2, dtype=torch.bool), 96, "block=96.*multiple of 64"),
        (torch.ones(1, 2, 2, dtype=torch.bool), 0, "block=0"),
    ],
    ids=str,
)
def test_refuses_masks(mask, block, text):
    with pytest.raises(KernelError, match=text):
        BlockLists.from_mask(mask, block)


@pytest.mark.parametrize("function", [op.reference, op.triton])
def test_refuses_lists_of_other_shapes(function):
    q, k, v = (x.to(DEVICE, DTYPES[0]) for x in random_inputs(130, 4, 2, 16)[:3])
    bounds = bounds_of((130,)).to(DEVICE)
    for shape, text in (
        ((1, 2, 3), "longest=130: a mask of 2 x 3 blocks of 64 tokens is for documents of up to 128"),
        ((1, 3, 2), "longest=130"),
        ((2, 3, 3), "mask for 2 heads, queries of 4: make it for 1 or 4"),
    ):
        lists = BlockLists.from_mask(torch.ones(shape, dtype=torch.bool, device=DEVICE), 64)
        with pytest.raises(KernelError, match=text):
            function(q, k, v, bounds, 130, lists)
    lists = BlockLists.from_mask(torch.ones((1, 3, 3), dtype=torch.bool, device="meta"), 64)
    with pytest.raises(KernelError, match="lists on meta"):
        function(q, k, v, bounds, 130, lists)


def test_gluon_takes_no_lists():
    q, k, v = (x.to(DEVICE, DTYPES[0]) for x in random_inputs(64, 1, 1, 64)[:3])
    lists = BlockLists.from_mask(torch.ones((1, 1, 1), dtype=torch.bool, device=DEVICE), 64)
    with pytest.raises(KernelError, match="takes no lists of blocks; use backend=triton"):
        attention(q, k, v, bounds_of((64,)).to(DEVICE), 64, lists=lists, backend="gluon")
