"""Attention over split sequences is attention over whole ones: results and all gradients, for rings and all-to-alls."""

import pytest
import torch
import torch.distributed as dist
from support import fork

from shardwright.kernels import attention
from shardwright.parallel import ring
from shardwright.parallel.context import context_attention, local_indices, take_local
from shardwright.parallel.mesh import TopologyError

# (lengths of the documents in each sequence, query heads, key/value heads, head size, window)
CASES = {
    "causal": ([[48]], 4, 4, 8, None),
    "batch of 3, groups of 2": ([[48], [48], [48]], 8, 4, 8, None),
    "groups of 4, odd head size": ([[40], [40]], 8, 2, 13, None),
    "one key head": ([[40]], 4, 1, 12, None),
    "12 heads on 3": ([[24]], 12, 3, 12, None),
    "12 heads on 6": ([[24]], 12, 6, 4, None),
    "chunks of few tokens": ([[8], [8]], 4, 2, 12, None),
    "window of itself": ([[48]], 4, 2, 12, 1),
    "window of 2": ([[8]], 4, 2, 12, 2),
    "window in a chunk": ([[48], [48]], 4, 2, 12, 4),
    "window of a chunk and one": ([[48]], 4, 2, 12, 7),
    "window of several chunks": ([[48]], 4, 2, 12, 17),
    "window of all but one": ([[48]], 4, 2, 12, 47),
    "window beyond all": ([[48]], 4, 2, 12, 1000),
    "documents across chunks": ([[5, 8, 20, 15], [48], [30, 17, 1]], 4, 2, 12, None),
    "documents of one token": ([[1] * 40, [39, 1]], 4, 1, 12, None),
    "nothing but documents of one token": ([[1] * 16, [1] * 16], 4, 4, 12, None),
    "documents of a chunk": ([[6] * 8, [12] * 4], 4, 2, 12, None),
    "short documents, wide window": ([[6] * 8], 4, 2, 12, 40),
    "documents and window": ([[5, 8, 20, 15], [1, 1, 46], [30, 17, 1]], 4, 2, 12, 9),
    "documents and window of all": ([[23, 25], [1, 47]], 4, 1, 7, 48),
}


def packed(lengths):
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    bounds = torch.tensor([0, *(n for row in lengths for n in row)]).cumsum(0).int()
    return positions, bounds, max(n for row in lengths for n in row)


def random_case(lengths, heads, kv_heads, size):
    torch.manual_seed(len(lengths) + heads)
    batch, tokens = len(lengths), sum(lengths[0])
    return [torch.randn(batch, tokens, h, size) for h in (heads, kv_heads, kv_heads, heads)]


def attend(function, inputs, positions, bounds, longest, window):
    """Return the result and the gradients of queries, keys and values."""
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    out = function(q, k, v, positions, bounds, longest, window=window)
    out.backward(inputs[3])
    return [out.detach(), q.grad, k.grad, v.grad]


def differences(lengths, heads, kv_heads, size, window, mode, dtype):
    """Distance from the reference in fp32 of this rank's share of out, dq, dk and dv.

    It is relative to the reference's norm, or to that of the incoming gradient where the reference is 0: queries and
    keys have no gradient if a token sees only itself.
    """
    rank, degree = dist.get_rank(), dist.get_world_size()
    inputs, (positions, bounds, longest) = random_case(lengths, heads, kv_heads, size), packed(lengths)
    exact = attend(attention.reference, inputs, positions, bounds, longest, window)
    split = context_attention(attention.reference, mode, dist.group.WORLD)
    local = [take_local(x, mode, degree, rank).to(dtype) for x in inputs]
    found = attend(split, local, take_local(positions, mode, degree, rank), bounds, longest, window)
    assert all(x.dtype == dtype and x.isfinite().all() for x in found)
    mine = local_indices(positions.shape[1], mode, degree, rank)
    shares = [x[:, mine] for x in exact]
    norms = [float(x.norm() or local[3].float().norm()) for x in shares]
    return [float((a - b).norm()) / norm for a, b, norm in zip(found, shares, norms, strict=True)]


def all_differences(mode, dtype):
    dist.init_process_group("gloo")
    return {name: differences(*case, mode, dtype) for name, case in CASES.items()}


@pytest.mark.parametrize("mode", ["ring", "ulysses"])
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_split_is_whole(mode, processes, dtype, tolerance):
    for rank, found in enumerate(fork(processes, all_differences, mode, dtype)):
        assert found.keys() == CASES.keys()
        for name, values in found.items():
            assert max(values) <= tolerance, f"{name}: rank {rank}, out, dq, dk, dv: {values}"


def traces():
    """The steps of a forward and of its backward: b for a block, > for a send that begins, < for a wait."""
    dist.init_process_group("gloo")
    steps = []

    def noted(function, mark):
        return lambda *args: (steps.append(mark), function(*args))[1]

    ring._pass_on = noted(lambda *args, begin=ring._pass_on: noted(begin(*args), "<"), ">")
    ring.block_forward, ring.block_backward = (noted(f, "b") for f in (ring.block_forward, ring.block_backward))
    split, rank = context_attention(attention.reference, "ring", dist.group.WORLD), dist.get_rank()
    found = {}
    for name in ("causal", "window in a chunk", "documents of a chunk", "short documents, wide window"):
        lengths, *sizes, window = CASES[name]
        positions, bounds, longest = packed(lengths)
        q, k, v, _ = (take_local(x, "ring", 4, rank).requires_grad_() for x in random_case(lengths, *sizes))
        out = split(q, k, v, take_local(positions, "ring", 4, rank), bounds, longest, window=window)
        forward = "".join(steps)
        steps.clear()
        out.sum().backward()
        found[name] = forward, "".join(steps)
        steps.clear()
    return found


def test_the_ring_works_while_it_sends_and_only_where_it_must():
    found = fork(4, traces)
    for rank in range(4):
        forward, backward = found[rank]["causal"]
        assert forward == ">bbb<>bb<>bb<bb", "9 of 36 blocks, every rank as many in every hop"
        assert backward == ">bbb><>bb<><>bb<><bb<><", "gradients follow one hop behind"
    # Chunks have 6 tokens: a reach of 4 or 6 leaves a chunk itself and the one before, one of 12 those two before.
    fewer = {
        "window in a chunk": [3, 4, 4, 4],
        "documents of a chunk": [4, 5, 6, 6],
        "short documents, wide window": [3, 4, 4, 4],
    }
    for name, counts in fewer.items():
        for direction in (0, 1):
            assert [found[rank][name][direction].count("b") for rank in range(4)] == counts


def refusal():
    dist.init_process_group("gloo")
    q = torch.zeros(1, 4, 6, 8)
    split = context_attention(attention.reference, "ulysses", dist.group.WORLD)
    with pytest.raises(TopologyError) as caught:
        split(q, q, q, torch.arange(4)[None], torch.tensor([0, 16], dtype=torch.int32), 16)
    dist.barrier()  # or the first would be gone before the others had found it
    return str(caught.value)


def test_heads_that_the_degree_does_not_divide_are_refused():
    for text in fork(4, refusal):
        assert text.startswith("parallel.context=4 does not divide the 6 query heads") and "context_mode=ring" in text
