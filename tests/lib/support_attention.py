"""Attention written out, and what tests of kernels compare with it."""

import itertools

import torch


def bounds_of(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def plain(q, k, v, bounds, longest, *, window=None, causal=True, softcap=None, scale=None):  # noqa: PLR0913
    """Attention of packed documents, one at a time, with the softmax in float32 or more: values and log-sum-exp."""
    groups = q.shape[2] // k.shape[2]
    packed = (
        x.flatten(0, 1).transpose(0, 1) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2))
    )
    q_HPD, k_HPD, v_HPD = packed
    outs, lses = [], []
    for first, last in itertools.pairwise(bounds.tolist()):
        scores = q_HPD[:, first:last] @ k_HPD[:, first:last].transpose(1, 2)
        scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * (scale or q.shape[-1] ** -0.5)
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        index = torch.arange(last - first)
        distance = (index[:, None] - index).to(q.device)
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        hidden |= (distance < 0) & causal
        hidden |= distance >= (window or len(index))
        scores = scores.masked_fill(hidden, -torch.inf)
        lses.append(scores.logsumexp(-1))
        outs.append(scores.softmax(-1).to(v.dtype) @ v_HPD[:, first:last])
    out, lse = torch.cat(outs, 1).transpose(0, 1), torch.cat(lses, 1).transpose(0, 1)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def random_inputs(tokens, heads, kv_heads, dim, batch=1):
    generator = torch.Generator().manual_seed(tokens + heads * dim)
    shapes = [(batch, tokens, h, dim) for h in (heads, kv_heads, kv_heads, heads)] + [(batch, tokens, heads)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def results(function, tensors, dtype, device, bounds, longest, **options):
    """Both outputs, and the gradients of all inputs through both of them."""
    q, k, v = (x.to(device, dtype, copy=True).requires_grad_() for x in tensors[:3])
    out, lse = function(q, k, v, bounds.to(device), longest, **options)
    loss = (out.double() * tensors[3].to(device)).sum() + (lse.double() * tensors[4].to(device)).sum()
    loss.backward()
    return [x.detach().cpu().double() for x in (out, lse, q.grad, k.grad, v.grad)]


def assert_as_exact_as_plain(ours, theirs, truth):
    for name, mine, other, exact in zip(("out", "lse", "dq", "dk", "dv"), ours, theirs, truth, strict=True):
        assert (mine - exact).norm() <= 2 * (other - exact).norm() + 1e-6 * exact.norm(), name
