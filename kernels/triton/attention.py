"""FlashAttention over packed documents, as operators of torch.

Shapes: B sequences, T tokens, P = B * T, H query heads, K key/value heads (H a multiple of K), D head size, N
documents.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from shardwright.kernels.block_sparse import BlockLists
from shardwright.kernels.op import KernelError
from shardwright.kernels.triton.attention_backward import backward_keys, backward_queries
from shardwright.kernels.triton.attention_forward import Documents, Scores, forward
from shardwright.kernels.triton.operator import operator

_LARGEST_HEAD = 256


def attention(  # noqa: PLR0913
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    *,
    window: int | None = None,
    causal: bool = True,
    softcap: float | None = None,
    scale: float | None = None,
    lists: BlockLists | None = None,
    backend: str = "triton",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend inside each document, in tiles.

    All results are the same bits each time, but for the gradient of the queries from the backend `gluon`; under
    `torch.use_deterministic_algorithms` its backward is that of `triton`.

    Args:
        q_BTHD: queries, bfloat16 or float16 (and float32 where Triton interprets, on the CPU). A tensor whose heads do
            not lie side by side in memory is copied; strides between tokens cost nothing.
        k_BTKD: keys; query head h reads key head h // (H / K).
        v_BTKD: values.
        bounds: int32 [N + 1], first token of each document in the flattened batch, and B * T. Documents may be empty.
        longest: tokens of the longest document, or more.
        window: a token sees itself and the `window - 1` before it; None: all before it.
        causal: False: a token sees all of its document.
        softcap: scores become softcap * tanh(scores / softcap); None: they stay.
        scale: of the products of queries and keys; None: 1 / sqrt(D).
        lists: blocks of keys that may be seen; no other is visited. None: all. A query that sees no key has zeros and
            -inf, and gives and gets no gradient.
        backend: `triton` for any GPU from Ampere on; `gluon` for Hopper, head sizes 64 and 128, no softcap, no lists.

    Returns:
        The attended values [B, T, H, D] in the dtype of the queries, and float32 [B, T, H], the natural logarithm of
        the sum of exponentiated scores, by which results over several sets of keys are merged. Gradients flow through
        both.

    Raises:
        KernelError: shapes, dtypes or options that it cannot do.

    Source: arXiv 2307.08691, 2407.08608.
    """
    _check_tensors(q_BTHD, k_BTKD, v_BTKD, bounds)
    _check_scores(window, causal, softcap, scale)
    blocks: tuple[Any, ...] = (None, None, 0)
    if lists is not None:
        lists.check(q_BTHD, longest)
        blocks = (lists.keys, lists.queries, lists.block)
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    options = (longest, window, causal, softcap, scale, backend)
    out_BTHD, lse_HBT = _attention(q_BTHD, k_BTKD, v_BTKD, bounds, *options, *blocks)
    return out_BTHD, lse_HBT.permute(1, 2, 0)


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor) -> None:
    (heads, dim), kv_heads = q.shape[2:], k.shape[2]
    if k.shape != v.shape or k.shape != (*q.shape[:2], kv_heads, dim) or heads % kv_heads:
        raise KernelError(
            f"queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)}: keys and values must be alike, "
            f"and equal the queries but for the number of heads, which must divide theirs"
        )
    if dim % 16 or dim > _LARGEST_HEAD:
        raise KernelError(f"head_dim={dim}: the kernel needs a multiple of 16 up to {_LARGEST_HEAD}; use the reference")
    dtypes = (torch.bfloat16, torch.float16) if q.is_cuda else (torch.float16, torch.float32)
    if q.dtype not in dtypes or not q.dtype == k.dtype == v.dtype:
        allowed = " or ".join(str(dtype)[6:] for dtype in dtypes)
        raise KernelError(f"{q.dtype}, {k.dtype}, {v.dtype}: queries, keys and values must all be {allowed} here")
    if bounds.dtype != torch.int32 or not bounds.is_contiguous():
        raise KernelError(f"bounds of {bounds.dtype}: they must be contiguous int32; use bounds.int()")


def _check_scores(window: int | None, causal: bool, softcap: float | None, scale: float | None) -> None:
    if window is not None and (window < 1 or not causal):
        raise KernelError(f"window={window} with causal={causal}: a window needs causal=True and at least 1 token")
    if (softcap is not None and softcap <= 0) or (scale is not None and scale <= 0):
        raise KernelError(f"softcap={softcap}, scale={scale}: both must be above 0, or None")


@cache
def _gluon() -> tuple[Any, Any]:
    from shardwright.kernels.gluon import attention_backward, attention_forward  # Gluon, which an interpreter lacks

    return attention_forward, attention_backward


def _gluon_refusal(q: torch.Tensor, scores: Scores) -> str | None:
    if scores.lists is not None:
        return "it takes no lists of blocks"
    if not q.is_cuda:
        return "it needs a GPU"
    from shardwright.kernels.gluon.hopper import unsupported

    return unsupported(q.shape[-1], q.dtype, scores, capability_of(q.device))


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)


def scores_of(
    longest: int,
    window: int | None,
    causal: bool,
    softcap: float | None,
    scale: float,
    keys: torch.Tensor | None = None,
    queries: torch.Tensor | None = None,
    block: int = 0,
) -> Scores:
    """Return how scores are made, from arguments as operators have them; a window as long as a document is none."""
    narrow = window if window is not None and window < longest else None
    lists = None if keys is None or queries is None else BlockLists(block=block, keys=keys, queries=queries)
    return Scores(scale=scale, softcap=softcap, causal=causal, window=narrow, lists=lists)


def _documents(bounds: torch.Tensor, longest: int, q_BTHD: torch.Tensor) -> Documents:
    return Documents(bounds=bounds, longest=longest, tokens=q_BTHD.shape[0] * q_BTHD.shape[1])


def _forward(  # noqa: PLR0913
    q_BTHD, k_BTKD, v_BTKD, bounds, longest, window, causal, softcap, scale, backend, *blocks
):
    documents, scores = _documents(bounds, longest, q_BTHD), scores_of(longest, window, causal, softcap, scale, *blocks)
    q, k, v = (x.flatten(0, 1) for x in (q_BTHD, k_BTKD, v_BTKD))
    if backend == "gluon" and (refusal := _gluon_refusal(q_BTHD, scores)):
        raise KernelError(f"backend=gluon cannot do this attention: {refusal}; use backend=triton")
    function = _gluon()[0].forward if backend == "gluon" else forward
    out, lse = function(q, k, v, documents, scores)
    return out.view(q_BTHD.shape), lse.view(-1, *q_BTHD.shape[:2])


def _forward_fake(q_BTHD, *rest):
    batch, tokens, heads, _ = q_BTHD.shape
    return q_BTHD.new_empty(q_BTHD.shape), q_BTHD.new_empty((heads, batch, tokens), dtype=torch.float32)


def _backward(  # noqa: PLR0913
    dout_BTHD,
    dlse_HBT,
    q_BTHD,
    k_BTKD,
    v_BTKD,
    out_BTHD,
    lse_HBT,
    bounds,
    longest,
    window,
    causal,
    softcap,
    scale,
    backend,
    *blocks,
):
    documents, scores = _documents(bounds, longest, q_BTHD), scores_of(longest, window, causal, softcap, scale, *blocks)
    q, k, v, out, dout = (x.flatten(0, 1) for x in (q_BTHD, k_BTKD, v_BTKD, out_BTHD, dout_BTHD))
    lse, dlse = lse_HBT.flatten(1, 2), None if dlse_HBT is None else dlse_HBT.flatten(1, 2)
    if backend == "gluon" and not torch.are_deterministic_algorithms_enabled():
        dq, dk, dv = _gluon()[1].backward((q, k, v), (out, lse), (dout, dlse), documents, scores)
    else:
        dq, delta = backward_queries((q, k, v), (out, lse), (dout, dlse), documents, scores)
        dk, dv = backward_keys((q, k, v), dout, lse, delta, documents, scores)
    return dq.view(q_BTHD.shape), dk.view(k_BTKD.shape), dv.view(k_BTKD.shape)


def _backward_fake(dout_BTHD, dlse_HBT, q_BTHD, k_BTKD, v_BTKD, *rest):
    return tuple(x.new_empty(x.shape) for x in (q_BTHD, k_BTKD, v_BTKD))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    q_BTHD, k_BTKD, v_BTKD, bounds, *ctx.options, keys, queries, ctx.block = inputs
    ctx.save_for_backward(q_BTHD, k_BTKD, v_BTKD, *output, bounds, keys, queries)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout_BTHD: torch.Tensor | None, dlse_HBT: torch.Tensor | None) -> tuple[Any, ...]:
    *tensors, keys, queries = ctx.saved_tensors
    dout_BTHD = torch.zeros_like(tensors[3]) if dout_BTHD is None else dout_BTHD
    gradients = attention_backward(dout_BTHD, dlse_HBT, *tensors, *ctx.options, keys, queries, ctx.block)
    return *gradients, *[None] * 10


_OPTIONS = "SymInt longest, int? window, bool causal, float? softcap, float scale, str backend"
_LISTS = "Tensor? key_blocks=None, Tensor? query_blocks=None, int block=0"
attention_backward = operator(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor bounds, {_OPTIONS}, {_LISTS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_attention = operator(
    f"attention(Tensor q, Tensor k, Tensor v, Tensor bounds, {_OPTIONS}, {_LISTS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_differentiate,
    setup_context=_keep,
)
