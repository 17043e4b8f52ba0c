"""Attention with a forward in FP8 for Hopper, and a backward in the dtype of its inputs, as an operator of torch.

Shapes: B sequences, T tokens, H query heads, K key/value heads, D head size, N documents.
"""

from __future__ import annotations

from typing import Any

import torch

from shardwright.kernels.op import KernelError
from shardwright.kernels.triton.attention import attention_backward, capability_of, scores_of
from shardwright.kernels.triton.attention_forward import Documents
from shardwright.kernels.triton.operator import operator
from shardwright.kernels.triton.quantise import check, quantise
from shardwright.kernels.triton.rope import rotate


def attention(  # noqa: PLR0913
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    *,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    window: int | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys by their angles, and attend inside each document, with both products in FP8.

    The backward is that of the backend `gluon` of kernels.triton.attention, in the dtype of the queries.

    Args:
        q_BTHD: queries, bfloat16 or float16.
        k_BTKD: keys; query head h reads key head h // (H / K).
        v_BTKD: values.
        bounds: int32 [N + 1], first token of each document in the flattened batch, and B * T. Documents may be empty.
        longest: tokens of the longest document, or more.
        angles: float32 cosines and sines [B, T, D], both halves alike, of the rotary embedding; not differentiated.
            None: queries and keys are turned already.
        window: a token sees itself and the `window - 1` before it; None: all before it.
        causal: False: a token sees all of its document.
        scale: of the products of queries and keys; None: 1 / sqrt(D).

    Returns:
        The attended values [B, T, H, D] in the dtype of the queries, and float32 [B, T, H], the natural logarithm of
        the sum of exponentiated scores. Gradients flow through both.

    Raises:
        KernelError: shapes, dtypes or options that it cannot do.
    """
    check(q_BTHD, k_BTKD, v_BTKD, angles)
    if bounds.dtype != torch.int32 or not bounds.is_contiguous():
        raise KernelError(f"bounds of {bounds.dtype}: they must be contiguous int32; use bounds.int()")
    if window is not None and (window < 1 or not causal):
        raise KernelError(f"window={window} with causal={causal}: a window needs causal=True and at least 1 token")
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    cos, sin = angles or (None, None)
    out_BTHD, lse_HBT, *_ = _attention(q_BTHD, k_BTKD, v_BTKD, cos, sin, bounds, longest, window, causal, scale)
    return out_BTHD, lse_HBT.permute(1, 2, 0)


def _launch(  # noqa: PLR0913
    q_BTHD, k_BTKD, v_BTKD, cos_BTD, sin_BTD, bounds, longest, window, causal, scale
):
    from shardwright.kernels.gluon.attention_fp8 import forward  # Gluon, which an interpreter lacks
    from shardwright.kernels.gluon.hopper import unsupported

    scores = scores_of(longest, window, causal, None, scale)
    capability = capability_of(q_BTHD.device) if q_BTHD.is_cuda else (0, 0)
    if refusal := unsupported(q_BTHD.shape[-1], q_BTHD.dtype, scores, capability):
        raise KernelError(f"FP8 attention cannot run here: {refusal}; use kernels.attention=auto")
    batch, tokens = q_BTHD.shape[:2]
    documents = Documents(bounds=bounds, longest=longest, tokens=batch * tokens)
    q, k, v = (x.flatten(0, 1) for x in (q_BTHD, k_BTKD, v_BTKD))
    angles = None if cos_BTD is None else (cos_BTD.flatten(0, 1), sin_BTD.flatten(0, 1))
    q, k, quantised = quantise(q, k, v, angles, documents)
    out, lse = forward(quantised, documents, scores, q_BTHD.dtype)
    if angles is not None:
        q, k = q.view(q_BTHD.shape), k.view(k_BTKD.shape)
    return out.view(q_BTHD.shape), lse.view(-1, batch, tokens), q, k


def _fake(q_BTHD, k_BTKD, v_BTKD, cos_BTD, *rest):
    batch, tokens, heads, _ = q_BTHD.shape
    turned = (x.new_empty(0 if cos_BTD is None else x.shape) for x in (q_BTHD, k_BTKD))
    return q_BTHD.new_empty(q_BTHD.shape), q_BTHD.new_empty((heads, batch, tokens), dtype=torch.float32), *turned


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    q_BTHD, k_BTKD, v_BTKD, cos_BTD, sin_BTD, bounds, *ctx.options = inputs
    out_BTHD, lse_HBT, *turned = output
    q_BTHD, k_BTKD = (q_BTHD, k_BTKD) if cos_BTD is None else turned
    ctx.save_for_backward(q_BTHD, k_BTKD, v_BTKD, out_BTHD, lse_HBT, bounds, cos_BTD, sin_BTD)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout_BTHD: torch.Tensor | None, dlse_HBT: torch.Tensor | None, *_: None):
    *tensors, cos_BTD, sin_BTD = ctx.saved_tensors
    longest, window, causal, scale = ctx.options
    dout_BTHD = torch.zeros_like(tensors[3]) if dout_BTHD is None else dout_BTHD
    dq, dk, dv = attention_backward(dout_BTHD, dlse_HBT, *tensors, longest, window, causal, None, scale, "gluon")
    if cos_BTD is not None:
        dq, dk = rotate(dq, dk, cos_BTD, sin_BTD, True)
    return dq, dk, dv, *[None] * 7


_attention = operator(
    "attention_fp8(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor bounds, SymInt longest, "
    "int? window, bool causal, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _fake,
    backward=_differentiate,
    setup_context=_keep,
)
