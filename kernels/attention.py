"""Causal attention inside packed documents.

Shapes: B sequences, T tokens, H query heads, K key/value heads (H a multiple of K), D head size, N documents.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F

from shardwright.kernels.op import Candidate, Op, Situation, lacks_triton


def attention_mask(positions_BT: torch.Tensor, window: int | None) -> torch.Tensor:
    """Return the boolean mask [B, 1, T, T] of who sees whom: earlier tokens of one document, within the window.

    A document starts where its position is 0.
    """
    document_BT = (positions_BT == 0).cumsum(1)
    same = document_BT[:, :, None] == document_BT[:, None, :]
    index = torch.arange(positions_BT.shape[1], device=positions_BT.device)
    distance = index[:, None] - index[None, :]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return (same & near)[:, None]


def reference(
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    positions_BT: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    *,
    window: int | None = None,
) -> torch.Tensor:
    """Attend causally inside each document; softmax in float32.

    float32 inputs are computed in float64 throughout, so that any way to split the sum over keys, such as a ring's,
    rounds to the same float32 result.

    Args:
        q_BTHD: queries.
        k_BTKD: keys; query head h reads key head h // (H / K).
        v_BTKD: values.
        positions_BT: int64, position of each token in its document; 0 starts a document.
        bounds: int32 [N + 1], first token of each document in the flattened batch, and B * T; says the same as
            `positions_BT` in the form that fused kernels read.
        longest: tokens of the longest document.
        window: a token sees itself and the `window - 1` before it; None: all before it.

    Returns:
        [B, T, H, D] in the dtype of the queries.
    """
    groups = q_BTHD.shape[2] // k_BTKD.shape[2]
    q_BHTD, k_BKTD, v_BKTD = (widen(x).transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    k_BHTD, v_BHTD = (x.repeat_interleave(groups, dim=1) for x in (k_BKTD, v_BKTD))
    scores = (q_BHTD @ k_BHTD.transpose(-1, -2)).to(softmax_dtype(q_BHTD)) * q_BTHD.shape[-1] ** -0.5
    scores = scores.masked_fill(~attention_mask(positions_BT, window), -torch.inf)
    weights = scores.softmax(-1).to(v_BHTD.dtype)
    return (weights @ v_BHTD).transpose(1, 2).to(q_BTHD.dtype)


def widen(x: torch.Tensor) -> torch.Tensor:
    """Return float32 as float64, and anything else as it is."""
    return x.double() if x.dtype == torch.float32 else x


def softmax_dtype(scores: torch.Tensor) -> torch.dtype:
    """Return float64 for float64, and else float32."""
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def sdpa(q_BTHD, k_BTKD, v_BTKD, positions_BT, bounds, longest, *, window=None):
    """As `reference`, through torch's scaled_dot_product_attention with a mask of T * T booleans per sequence."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    mask = attention_mask(positions_BT, window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def varlen(q_BTHD, k_BTKD, v_BTKD, positions_BT, bounds, longest, *, window=None):
    """As `reference`, through torch's FlashAttention-2 over variable-length documents."""
    from torch.nn.attention.varlen import varlen_attn  # loads the compiler, which the CPU does without

    # torch 2.12 asks to be told of grouped queries, 2.11 takes them as they are.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    q, k, v = (x.flatten(0, 1) for x in (q_BTHD, k_BTKD, v_BTKD))
    seen = (-1 if window is None else window - 1, 0)
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=seen, **grouped)
    return out.view_as(q_BTHD)  # type: ignore[union-attr]


def _varlen_unsupported(situation: Situation) -> str | None:
    if situation.device != "cuda":
        return "needs a CUDA device"
    if situation.dtype not in (torch.bfloat16, torch.float16):
        return "needs bf16 or fp16"
    head_dim = situation.sizes["head_dim"] or 0
    return None if head_dim <= 256 and head_dim % 8 == 0 else "needs a head size up to 256 that 8 divides"


def triton(q_BTHD, k_BTKD, v_BTKD, positions_BT, bounds, longest, *, window=None):
    """As `reference`, through this project's FlashAttention in Triton."""
    from shardwright.kernels.triton.attention import attention  # needs triton, which may not be installed

    return attention(q_BTHD, k_BTKD, v_BTKD, bounds, longest, window=window)[0]


def gluon(q_BTHD, k_BTKD, v_BTKD, positions_BT, bounds, longest, *, window=None):
    """As `reference`, through this project's FlashAttention for Hopper."""
    from shardwright.kernels.triton.attention import attention

    return attention(q_BTHD, k_BTKD, v_BTKD, bounds, longest, window=window, backend="gluon")[0]


def fp8(q_BTHD, k_BTKD, v_BTKD, positions_BT, bounds, longest, *, window=None, angles=None):
    """As `reference`, with both products in FP8 and the backward in the dtype of the queries; for Hopper.

    Args:
        angles: cosines and sines [B, T, D], as of `rope`, by which queries and keys are turned first; None: they are.
    """
    from shardwright.kernels.triton.attention_fp8 import attention

    return attention(q_BTHD, k_BTKD, v_BTKD, bounds, longest, angles=angles, window=window)[0]


def _triton_unsupported(situation: Situation) -> str | None:
    if refusal := lacks_triton(situation):
        return refusal
    if situation.dtype not in (torch.bfloat16, torch.float16):
        return "needs bf16 or fp16"
    head_dim = situation.sizes["head_dim"] or 0
    if head_dim > 256 or head_dim % 16:
        return "needs a head size up to 256 that 16 divides"
    from shardwright.kernels.triton.ptxas import hazard

    return hazard(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def _gluon_unsupported(situation: Situation) -> str | None:
    if refusal := _triton_unsupported(situation):
        return refusal
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return "needs a Hopper GPU"
    return None if situation.sizes["head_dim"] in (64, 128) else "needs head size 64 or 128"


OP = Op(
    name="attention",
    reference=reference,
    candidates=(
        Candidate(name="gluon", function=gluon, unsupported=_gluon_unsupported),
        Candidate(name="varlen", function=varlen, unsupported=_varlen_unsupported),
        Candidate(name="sdpa", function=sdpa, unsupported=lambda situation: None),
        Candidate(name="triton", function=triton, unsupported=_triton_unsupported),
        Candidate(name="fp8", function=fp8, unsupported=_gluon_unsupported, lossy=True),
    ),
)
