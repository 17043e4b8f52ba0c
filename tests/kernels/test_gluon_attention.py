"""FlashAttention for Hopper equals attention written out in float64, in every configuration; on a Hopper GPU only."""

import functools

import pytest
import torch
from support_attention import assert_as_exact_as_plain, bounds_of, plain, random_inputs, results

from shardwright.kernels import attention as op
from shardwright.kernels.op import KernelError, Situation
from shardwright.kernels.triton.attention import attention, scores_of
from shardwright.kernels.triton.attention_forward import Documents

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
if HOPPER:
    from shardwright.kernels.gluon import attention_backward, attention_forward

    FORWARD_CONFIGS = [(dim, config) for dim, configs in attention_forward.CONFIGS.items() for config in configs]
    BACKWARD_CONFIGS = [(dim, config) for dim, configs in attention_backward.CONFIGS.items() for config in configs]
else:
    FORWARD_CONFIGS = BACKWARD_CONFIGS = []

ours = functools.partial(attention, backend="gluon")
LENGTHS = (1, 30, 0, 257, 128, 130, 1, 65)
KINDS = [{}, {"causal": False}, {"window": 2}, {"window": 100}, {"scale": 0.3}]


def name(value):
    return str(value.arguments) if hasattr(value, "arguments") else str(value)


@needs_hopper
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (3, 1)])
def test_outputs_and_gradients(dim, dtype, kind, heads, kv_heads):
    tensors, bounds = random_inputs(sum(LENGTHS), heads, kv_heads, dim), bounds_of(LENGTHS)
    exact = [x.to(dtype).double() for x in tensors]
    truth = results(plain, exact, torch.float64, "cpu", bounds, max(LENGTHS), **kind)
    theirs = results(plain, exact, dtype, "cuda", bounds, max(LENGTHS), **kind)
    assert_as_exact_as_plain(results(ours, exact, dtype, "cuda", bounds, max(LENGTHS), **kind), theirs, truth)


def case(dim, lengths=(300, 1, 513, 128), window=None, causal=True, heads=4, kv_heads=2):
    """Inputs of the launch functions, and what comes out of attention, plainly and in float64."""
    tensors, bounds = random_inputs(sum(lengths), heads, kv_heads, dim), bounds_of(lengths)
    kind = {"window": window, "causal": causal}
    exact = [x.bfloat16().double() for x in tensors]
    truth = results(plain, exact, torch.float64, "cpu", bounds, max(lengths), **kind)
    theirs = results(plain, exact, torch.bfloat16, "cuda", bounds, max(lengths), **kind)
    q, k, v, dout = (x[0].to("cuda", torch.bfloat16) for x in tensors[:4])
    dlse = tensors[4][0].T.to("cuda", torch.float32).contiguous()
    documents = Documents(bounds=bounds.cuda(), longest=max(lengths), tokens=sum(lengths))
    return (q, k, v), (dout, dlse), documents, scores_of(max(lengths), window, causal, None, dim**-0.5), theirs, truth


def shaped(found, truth):
    return [mine.cpu().double().view(exact.shape) for mine, exact in zip(found, truth, strict=True)]


@needs_hopper
@pytest.mark.parametrize("kind", [{}, {"causal": False}, {"window": 100}], ids=str)
@pytest.mark.parametrize(("dim", "config"), FORWARD_CONFIGS, ids=name)
def test_every_forward_configuration(dim, config, kind):
    inputs, gradients, documents, scores, theirs, truth = case(dim, **kind)
    outputs = attention_forward.forward(*inputs, documents, scores, config)
    found = attention_backward.backward(inputs, outputs, gradients, documents, scores)
    assert_as_exact_as_plain(shaped((outputs[0], outputs[1].T.contiguous(), *found), truth), theirs, truth)


@needs_hopper
@pytest.mark.parametrize("kind", [{}, {"causal": False}, {"window": 100}], ids=str)
@pytest.mark.parametrize(("dim", "config"), BACKWARD_CONFIGS, ids=name)
def test_every_backward_configuration(dim, config, kind):
    inputs, gradients, documents, scores, theirs, truth = case(dim, **kind)
    outputs = attention_forward.forward(*inputs, documents, scores)
    found = attention_backward.backward(inputs, outputs, gradients, documents, scores, config)
    assert_as_exact_as_plain(shaped((outputs[0], outputs[1].T.contiguous(), *found), truth), theirs, truth)


@needs_hopper
@pytest.mark.parametrize(("dim", "config"), FORWARD_CONFIGS, ids=name)
def test_a_thousand_forwards_are_alike(dim, config):
    inputs, _, documents, scores, *_ = case(dim, lengths=(2000, 700, 1396))
    out, lse = attention_forward.forward(*inputs, documents, scores, config)
    for _ in range(1000):
        again = attention_forward.forward(*inputs, documents, scores, config)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)


@needs_hopper
@pytest.mark.parametrize(("dim", "config"), BACKWARD_CONFIGS, ids=name)
def test_a_thousand_backwards_are_alike_but_for_the_order_of_sums(dim, config):
    inputs, gradients, documents, scores, *_ = case(dim, lengths=(2000, 700, 1396))
    outputs = attention_forward.forward(*inputs, documents, scores)
    dq, dk, dv = attention_backward.backward(inputs, outputs, gradients, documents, scores, config)
    for _ in range(1000):
        again = attention_backward.backward(inputs, outputs, gradients, documents, scores, config)
        assert torch.equal(again[1], dk) and torch.equal(again[2], dv)
        assert (again[0] - dq).norm() <= 1e-3 * dq.norm()


@needs_hopper
@pytest.mark.parametrize("dim", [64, 128])
def test_documents_of_a_single_block_go_by_in_time(dim, monkeypatch):
    inputs, gradients, documents, scores, theirs, truth = case(dim, lengths=tuple(range(1, 65)))
    monkeypatch.setattr(attention_backward, "processors", lambda device: 16)  # eight units a program
    outputs = attention_forward.forward(*inputs, documents, scores)
    for _ in range(200):
        found = attention_backward.backward(inputs, outputs, gradients, documents, scores)
    assert_as_exact_as_plain(shaped((outputs[0], outputs[1].T.contiguous(), *found), truth), theirs, truth)


@needs_hopper
@pytest.mark.parametrize("kind", [{}, {"causal": False}, {"window": 100}], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("programs", [1, 5, 9])
def test_sums_are_cleared_before_their_heads_come(dim, kind, programs, monkeypatch):
    inputs, gradients, documents, scores, theirs, truth = case(dim, heads=6, kv_heads=3, **kind)
    outputs = attention_forward.forward(*inputs, documents, scores)
    monkeypatch.setattr(attention_backward, "processors", lambda device: programs)  # so few go by one head at a time
    torch.use_deterministic_algorithms(True)  # so that new memory is NaN
    try:
        for _ in range(100):
            found = attention_backward.backward(inputs, outputs, gradients, documents, scores)
            assert_as_exact_as_plain(shaped((outputs[0], outputs[1].T.contiguous(), *found), truth), theirs, truth)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_hopper
@pytest.mark.parametrize("dim", [64, 128])
def test_in_a_cuda_graph(dim):
    inputs, gradients, documents, scores, *_ = case(dim)

    def step():
        outputs = attention_forward.forward(*inputs, documents, scores)
        return *outputs, *attention_backward.backward(inputs, outputs, gradients, documents, scores)

    wanted = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(20):
        for x in found:
            x.fill_(torch.nan)
        graph.replay()
        for mine, eager in zip(found, wanted, strict=True):
            assert (mine - eager).norm() <= 1e-3 * eager.norm()


@needs_hopper
@pytest.mark.parametrize("dim", [64, 128])
def test_deterministic_on_demand(dim):
    tensors, bounds = random_inputs(1000, 4, 2, dim), bounds_of((600, 400))
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (results(ours, tensors, torch.bfloat16, "cuda", bounds, 600) for _ in range(20))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@needs_hopper
@pytest.mark.parametrize("kind", [{}, {"causal": False}, {"window": 50}], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_poison_in_another_document_does_not_reach_this_one(dim, kind):
    tensors, bounds = random_inputs(300, 2, 2, dim), bounds_of((90, 110, 100))
    clean = results(ours, tensors, torch.bfloat16, "cuda", bounds, 110, **kind)
    poisoned = [x.clone() for x in tensors[:3]] + tensors[3:]
    for x in poisoned[:3]:
        x[:, 90:200] = torch.nan
    for before, after in zip(clean, results(ours, poisoned, torch.bfloat16, "cuda", bounds, 110, **kind), strict=True):
        for tokens in (slice(0, 90), slice(200, 300)):
            assert (before[:, tokens] - after[:, tokens]).norm() <= 1e-3 * before[:, tokens].norm()


@needs_hopper
def test_views_of_a_fused_projection():
    q, k, v = (x.to("cuda", torch.bfloat16) for x in random_inputs(300, 4, 2, 64)[:3])
    bounds = bounds_of((170, 130)).cuda()
    wanted, _ = ours(q, k, v, bounds, 170)
    views = torch.cat([q, k, v], 2).split([4, 2, 2], 2)
    assert torch.equal(ours(*views, bounds, 170)[0], wanted)


@needs_hopper
@pytest.mark.parametrize(
    ("dim", "options", "text"), [(96, {}, "head_dim=96"), (64, {"softcap": 3.0}, "softcap=3.0: it has none")]
)
def test_refuses(dim, options, text):
    q, k, v = (x.to("cuda", torch.bfloat16) for x in random_inputs(20, 2, 2, dim)[:3])
    with pytest.raises(KernelError, match=f"{text}.*use backend=triton"):
        ours(q, k, v, bounds_of((20,)).cuda(), 20, **options)


def test_is_refused_without_a_gpu():
    with pytest.raises(KernelError, match="needs a CUDA device"):
        op.OP.choose("gluon", Situation(device="cpu", dtype=torch.bfloat16, sizes={"head_dim": 64}))
    q, k, v = (x.half() for x in random_inputs(20, 2, 2, 64)[:3])
    with pytest.raises(KernelError, match="it needs a GPU; use backend=triton"):
        ours(q, k, v, bounds_of((20,)), 20)
