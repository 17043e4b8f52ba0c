import pytest
import torch

from shardwright.kernels import attention
from shardwright.parallel.context import _whole_positions, local_indices, take_local
from shardwright.parallel.mesh import TopologyError
from shardwright.parallel.ring import _merge, block_backward, block_forward, ring_blocks

ALL = 10**9


def test_who_holds_which_tokens():
    assert local_indices(12, "ring", 3, 0).tolist() == [0, 1, 10, 11]
    assert local_indices(12, "ring", 3, 2).tolist() == [4, 5, 6, 7]
    assert local_indices(12, "ulysses", 3, 1).tolist() == [4, 5, 6, 7]
    assert local_indices(12, "ring", 3, 0).dtype == torch.int64


@pytest.mark.parametrize("mode", ["ring", "ulysses"])
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_every_token_is_held_once_and_taken_in_that_order(mode, degree):
    tokens = torch.arange(48).view(2, 24)
    held = [local_indices(24, mode, degree, rank) for rank in range(degree)]
    assert sorted(torch.cat(held).tolist()) == list(range(24))
    for rank, indices in enumerate(held):
        local = take_local(tokens, mode, degree, rank)
        assert torch.equal(local, tokens[:, indices]) and local.is_contiguous()


@pytest.mark.parametrize(
    ("mode", "length", "parts", "remedy"), [("ring", 20, 8, 16), ("ulysses", 10, 4, 8), ("ring", 4, 8, 8)]
)
def test_a_length_that_cannot_be_split_is_an_error(mode, length, parts, remedy):
    text = (
        rf"parallel.context=4 with context_mode={mode} .* {length} tokens: {parts} must divide .* use {remedy} tokens"
    )
    with pytest.raises(TopologyError, match=text):
        local_indices(length, mode, 4, 0)
    with pytest.raises(TopologyError, match=text):
        take_local(torch.zeros(1, length), mode, 4, 0)


def count(degree, rank, length, reach):
    return sum(len([*ring_blocks(degree, rank, source, length, reach)]) for source in range(degree))


@pytest.mark.parametrize("degree", [2, 3, 4, 8, 64])
def test_causality_halves_the_blocks_and_all_ranks_have_the_same(degree):
    for rank in range(degree):
        own, *others = (len([*ring_blocks(degree, rank, (rank - hop) % degree, 5, ALL)]) for hop in range(degree))
        assert own == 3 and others == [2] * (degree - 1), "in every hop the same, so that none waits for another"
    assert count(degree, 0, 5, ALL) * degree == degree * (2 * degree + 1)


def test_a_window_leaves_the_blocks_that_it_touches():
    assert [count(4, rank, 5, 1) for rank in range(4)] == [2, 2, 2, 2], "only a chunk and itself"
    assert [count(4, rank, 5, 2) for rank in range(4)] == [3, 4, 4, 4], "and the chunk before; the first has none"
    assert count(4, 1, 5, 6) == 4 < count(4, 1, 5, 7) == 5, "token 0 of chunk 6 and the last of chunk 4: 6 apart"


@pytest.mark.parametrize("reach", [1, 2, 3, 4, 5, 7, 10, 24, ALL])
@pytest.mark.parametrize("degree", [2, 4])
def test_the_blocks_hold_every_pair_of_tokens_that_see_each_other_once(degree, reach):
    length, found = 3, torch.zeros(6 * degree, 6 * degree, dtype=torch.int64)
    for rank in range(degree):
        mine = local_indices(6 * degree, "ring", degree, rank)
        for source in range(degree):
            theirs = local_indices(6 * degree, "ring", degree, source)
            for rows, keys, offset in ring_blocks(degree, rank, source, length, reach):
                assert offset == mine[rows][0] - theirs[keys][0]
                found[mine[rows][:, None], theirs[keys]] += 1
                distance = mine[rows][:, None] - theirs[keys]
                assert ((distance >= 0) & (distance < reach)).any(), "no block is for nothing"
    distance = torch.arange(len(found))[:, None] - torch.arange(len(found))
    assert (found[(distance >= 0) & (distance < reach)] == 1).all() and (found <= 1).all()


def random_inputs(tokens, heads=4, kv_heads=2):
    torch.manual_seed(3)
    shapes = [(2, tokens, h, 6) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("window", [3, 8, 100])
def test_blocks_merged_are_attention_and_their_gradients_add_up(window):
    q, k, v = random_inputs(12)
    positions = torch.stack([torch.arange(12), torch.tensor([*range(7), 0, *range(4)])])
    before = positions.clamp(max=window - 1)
    expected = attention.reference(q, k, v, positions, torch.empty(0), 12, window=window)
    dout = torch.randn_like(expected)
    exact = torch.autograd.grad(expected, (q, k, v), dout)
    blocks = [(slice(a, a + 4), slice(b, b + 6), a - b) for a in (0, 4, 8) for b in (6, 0)]
    with torch.no_grad():
        out, lse = torch.zeros_like(q), torch.full(q.shape[:3], torch.finfo(torch.float32).min)
        for rows, keys, offset in blocks:
            part = block_forward(q[:, rows], k[:, keys], v[:, keys], before[:, rows], offset)
            _merge(out[:, rows], lse[:, rows], *part)
        torch.testing.assert_close(out, expected)
        found = [torch.zeros_like(x) for x in (q, k, v)]
        delta = (dout * out).sum(-1)
        for rows, keys, offset in blocks:
            local = (x[:, rows] for x in (lse, delta, before))
            grads = block_backward(dout[:, rows], q[:, rows], k[:, keys], v[:, keys], *local, offset)
            for total, part, grad in zip(found, (rows, keys, keys), grads, strict=True):
                total[:, part] += grad
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_query_that_sees_no_key_has_zeros_and_changes_nothing():
    q, k, v = (x.detach() for x in random_inputs(4))
    before = torch.tensor(
        [[9, 0, 1, 0]] * 2
    )  # queries 4 tokens after the keys: 1 and 3 see none of them, 2 none either
    out, lse = block_forward(q, k, v, before, 4)
    assert (lse[:, 1:] == torch.finfo(torch.float32).min).all() and (out[:, 1:] == 0).all()
    assert lse[:, 0].isfinite().all() and (out[:, 0] != 0).all()
    whole, whole_lse = block_forward(q, k, v, torch.tensor([[0, 1, 2, 3]] * 2), 0)
    merged, merged_lse = whole.clone(), whole_lse.clone()
    _merge(merged[:, 1:], merged_lse[:, 1:], out[:, 1:], lse[:, 1:])
    assert torch.equal(merged, whole) and torch.equal(merged_lse, whole_lse)
    zeros = block_backward(torch.ones_like(q), q, k, v, whole_lse, whole.sum(-1), torch.zeros(2, 4).long(), 4)
    assert all((x == 0).all() for x in zeros)


def test_positions_of_the_whole_batch_from_its_bounds():
    bounds = torch.tensor([0, 3, 4, 6, 12], dtype=torch.int32)
    positions = _whole_positions(bounds, 2, 6)
    assert positions.tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]] and positions.dtype == torch.int64
