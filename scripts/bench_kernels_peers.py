"""Implementations of other packages for the kernel benchmark, each loaded when it is needed.

A loader returns a function that is called as the op's reference is, and raises where the package is absent, is of
another version, or cannot run here. Shapes are those of the op's file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from shardwright.kernels.op import KernelError

Implementation = Callable[..., Any]
_IGNORED = -100  # no label of the benchmark is, but liger wants to be told
_CHUNK_TOKENS = 4096  # of quack's fused linear and cross entropy, its own default


@dataclass(frozen=True, kw_only=True)
class Mask:
    """What a token of an attention case sees of its document.

    Attributes:
        causal: only itself and what is before it.
        window: only itself and the `window - 1` before it; None: all before it.
        documents: how many a sequence is packed with.
    """

    causal: bool = True
    window: int | None = None
    documents: int = 1


def compiled(function: Implementation) -> Implementation:
    """Load torch's compiler, for the very shapes of one case."""
    if not torch.cuda.is_available():
        raise KernelError("needs a CUDA device")
    config: Any = import_module("torch._functorch.config")
    config.donated_buffer = False  # a backward is timed many times
    return torch.compile(function, dynamic=False)


def _sdpa(backend: SDPBackend, mask: Mask) -> Implementation:
    def attend(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, *_: object) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
        with sdpa_kernel(backend):
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, is_causal=mask.causal, enable_gqa=grouped).transpose(1, 2)

    return attend


def cudnn(mask: Mask) -> Implementation:
    """Load cuDNN's attention, through torch; causal or full."""
    return _sdpa(SDPBackend.CUDNN_ATTENTION, mask)


def fa2(mask: Mask) -> Implementation:
    """Load FlashAttention-2 as it is in torch; causal or full."""
    return _sdpa(SDPBackend.FLASH_ATTENTION, mask)


def fa4(mask: Mask) -> Implementation:
    """Load FlashAttention-4 (CuTe); compiled kernels stay on disk."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    interface: Any = import_module("flash_attn.cute.interface")
    seen = {"causal": mask.causal, "window_size": (None if mask.window is None else mask.window - 1, None)}

    def attend(q_BTHD, k_BTKD, v_BTKD, positions_BT, bounds, longest):
        if mask.documents == 1:
            out = interface.flash_attn_func(q_BTHD, k_BTKD, v_BTKD, **seen)
        else:
            lengths = {f"cu_seqlens_{x}": bounds for x in "qk"} | {f"max_seqlen_{x}": longest for x in "qk"}
            flat = (x.flatten(0, 1) for x in (q_BTHD, k_BTKD, v_BTKD))
            out = interface.flash_attn_varlen_func(*flat, **lengths, **seen)
        return (out[0] if isinstance(out, tuple) else out).view_as(q_BTHD)

    return attend


def flex(mask: Mask) -> Implementation:
    """Load torch's FlexAttention, compiled, with its block mask."""
    module: Any = import_module("torch.nn.attention.flex_attention")
    function = compiled(module.flex_attention)

    @cache  # by identity: a case has one tensor of positions
    def blocks(positions_BT: torch.Tensor) -> Any:
        tokens = positions_BT.shape[1]
        document_T = (positions_BT[0] == 0).cumsum(0)

        def sees(batch, head, query, key):
            seen = query >= key
            if mask.window is not None:
                seen = seen & (query - key < mask.window)
            return seen & (document_T[query] == document_T[key]) if mask.documents > 1 else seen

        return module.create_block_mask(sees, None, None, tokens, tokens, device=positions_BT.device)

    def attend(q_BTHD, k_BTKD, v_BTKD, positions_BT, *_: object):
        q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
        block_mask = blocks(positions_BT) if mask.causal else None
        return function(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return attend


def flex_blocks() -> Implementation:
    """Load torch's FlexAttention, compiled, over the same blocks."""
    module: Any = import_module("torch.nn.attention.flex_attention")
    function = compiled(module.flex_attention)

    @cache  # by identity
    def blocks(lists: Any) -> Any:
        mask_HMN, size = lists.mask(), lists.block
        tokens = mask_HMN.shape[1] * size

        def sees(batch, head, query, key):
            return mask_HMN[head, query // size, key // size] & (query >= key)

        heads = mask_HMN.shape[0]
        return module.create_block_mask(sees, None, heads, tokens, tokens, device=mask_HMN.device, BLOCK_SIZE=size)

    def attend(q_BTHD, k_BTHD, v_BTHD, bounds, longest, lists):
        q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
        return function(q, k, v, block_mask=blocks(lists)).transpose(1, 2)

    return attend


def _liger(module: str, function: str) -> Callable[..., Any]:
    return getattr(import_module(f"liger_kernel.ops.{module}"), function).apply


def liger_rms_norm() -> Implementation:
    """Load liger-kernel's RMSNorm; the gradient is not written over that of the output."""
    apply = _liger("rms_norm", "LigerRMSNormFunction")
    return lambda x, weight, eps: apply(x, weight, eps, 0.0, "llama", False)


def liger_residual_rms_norm() -> Implementation:
    """Load liger-kernel's addition and RMSNorm."""
    apply = _liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    return lambda x, residual, weight, eps: apply(x, residual, weight, eps, 0.0, "llama", False)


def liger_layer_norm() -> Implementation:
    """Load liger-kernel's LayerNorm."""
    return _liger("layer_norm", "LigerLayerNormFunction")


def liger_swiglu() -> Implementation:
    """Load liger-kernel's SwiGLU."""
    return _liger("swiglu", "LigerSiLUMulFunction")


def liger_geglu() -> Implementation:
    """Load liger-kernel's GeGLU, of the tanh form."""
    return _liger("geglu", "LigerGELUMulFunction")


def liger_rope() -> Implementation:
    """Load liger-kernel's RoPE, which turns contiguous queries and keys in place."""
    apply = _liger("rope", "LigerRopeFunction")

    def turn(q_BTHD, k_BTKD, cos_BTD, sin_BTD):
        q, k = apply(q_BTHD.transpose(1, 2), k_BTKD.transpose(1, 2), cos_BTD, sin_BTD)
        return q.transpose(1, 2), k.transpose(1, 2)

    return turn


def liger_embedding() -> Implementation:
    """Load liger-kernel's embedding."""
    apply = _liger("experimental.embedding", "LigerEmbeddingFunction")
    return lambda ids_BT, weight_VC: apply(weight_VC, ids_BT)


def liger_cross_entropy() -> Implementation:
    """Load liger-kernel's cross entropy, which turns the logits into their gradient in its forward pass."""
    apply = _liger("cross_entropy", "LigerCrossEntropyFunction")
    return lambda logits_NV, labels_N: apply(logits_NV, labels_N, None, _IGNORED, 0.0, 0.0, "sum")[0]


def liger_linear_cross_entropy() -> Implementation:
    """Load liger-kernel's linear and cross entropy."""
    apply = _liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    options = (None, None, _IGNORED, 0.0, 0.0, "sum")  # bias, class weights, ignored label, z-loss, smoothing, sum

    def loss(hidden_BTC, weight_VC, labels_BT):
        out = apply(hidden_BTC.flatten(0, 1), weight_VC, labels_BT.flatten(), *options)
        return out[0] if isinstance(out, tuple) else out

    return loss


def quack_rms_norm() -> Implementation:
    """Load quack's RMSNorm."""
    function: Any = import_module("quack.rmsnorm").rmsnorm
    return lambda x, weight, eps: function(x, weight, eps=eps)


def quack_residual_rms_norm() -> Implementation:
    """Load quack's addition and RMSNorm."""
    function: Any = import_module("quack.rmsnorm").rmsnorm
    return lambda x, residual, weight, eps: function(x, weight, residual=residual, eps=eps, prenorm=True)


def quack_rope() -> Implementation:
    """Load quack's RoPE, which takes queries and keys one after the other, and the first half of the angles."""
    function: Any = import_module("quack.rotary").apply_rotary_emb

    def turn(q_BTHD, k_BTKD, cos_BTD, sin_BTD):
        angles = [x[0, :, : x.shape[-1] // 2] for x in (cos_BTD, sin_BTD)]
        return tuple(function(x, *angles) for x in (q_BTHD, k_BTKD))

    return turn


def quack_cross_entropy() -> Implementation:
    """Load quack's cross entropy."""
    function: Any = import_module("quack.cross_entropy").cross_entropy
    return lambda logits_NV, labels_N: function(logits_NV, labels_N, reduction="sum")


def quack_linear_cross_entropy() -> Implementation:
    """Load quack's linear and cross entropy, which on Hopper needs no tuning."""
    function: Any = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy

    def loss(hidden_BTC, weight_VC, labels_BT):
        return function(hidden_BTC.flatten(0, 1), weight_VC, labels_BT.flatten(), _CHUNK_TOKENS, reduction="sum")

    return loss


class _Products(torch.autograd.Function):
    """The products of a linear layer, and nothing else: the floor of what is fused with them."""

    @staticmethod
    def forward(ctx: Any, hidden_BTC: torch.Tensor, weight_VC: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden_BTC, weight_VC)
        return hidden_BTC @ weight_VC.T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # pyright: ignore
        hidden_BTC, weight_VC = ctx.saved_tensors
        return grad @ weight_VC, grad.flatten(0, 1).T @ hidden_BTC.flatten(0, 1)


def products() -> Implementation:
    """Return the products of an output projection and of its gradients."""
    return lambda hidden_BTC, weight_VC, labels_BT: _Products.apply(hidden_BTC, weight_VC)
