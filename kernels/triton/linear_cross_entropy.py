"""Output projection and cross entropy without the whole logits: chunk by chunk of tokens, gradients with the loss.

A chunk's logits come from the vendor's product, become their own gradient in place, and are used at once for the
gradients of hidden states and weight; the next chunk has the same memory. As the loss is a scalar, backward is left
with one multiplication.

Shapes: N tokens, n tokens of a chunk, C hidden size, V vocabulary.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from shardwright.kernels.triton.cross_entropy import launch_losses
from shardwright.kernels.triton.launch import cdiv, launch_kernel
from shardwright.kernels.triton.operator import operator

LOGITS_BYTES = 1010 * 2**20  # that the logits of a chunk may take: half of 8,192 tokens' over 128,256 words
_SCALED = 8192  # elements that a program scales
_ROUNDED_CHUNKS = 4  # after which the weight's gradient may be rounded
_TILE = 128  # tokens that a chunk is made of where it has more: a product is fastest on whole tiles


def chunk_tokens(num_tokens: int, row_bytes: int, limit_bytes: int) -> int:
    """Return the tokens of a chunk: as few chunks as fit, all about as long, in whole tiles where one fits.

    Args:
        num_tokens: of the batch.
        row_bytes: that a token's logits take.
        limit_bytes: that a chunk's logits may take; a single token's are computed in any case.
    """
    most = max(1, limit_bytes // row_bytes)
    tile = _TILE if most >= _TILE else 1
    most -= most % tile
    num_chunks = max(1, -(-num_tokens // most))
    even = max(1, -(-num_tokens // num_chunks))
    return -(-even // tile) * tile


def launch(
    hidden_NC: torch.Tensor,
    weight_VC: torch.Tensor,
    labels_N: torch.Tensor,
    needs: list[bool],
    logits_bytes: int,
    weight_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the summed loss (float64), and its gradients by hidden states and by the weight, empty if not needed.

    Args:
        hidden_NC: final hidden states.
        weight_VC: output projection.
        labels_N: int64.
        needs: which of the two gradients are needed.
        logits_bytes: that the logits of a chunk may take.
        weight_dtype: in which the chunks' summands of the weight's gradient are added up, and it is returned.
    """
    num_tokens, vocab = hidden_NC.shape[0], weight_VC.shape[0]
    chunk = chunk_tokens(num_tokens, vocab * hidden_NC.element_size(), logits_bytes)
    logits_nV = hidden_NC.new_empty(min(chunk, num_tokens), vocab)
    losses_N = torch.empty(num_tokens, dtype=torch.float32, device=hidden_NC.device)
    grad_hidden, grad_weight = _empty_gradients(hidden_NC, weight_VC, needs, weight_dtype)
    if num_tokens == 0:
        grad_weight.zero_()
    for first in range(0, num_tokens, chunk):
        tokens = slice(first, min(first + chunk, num_tokens))
        hidden_nC = hidden_NC[tokens]
        logits = logits_nV[: len(hidden_nC)]
        torch.mm(hidden_nC, weight_VC.T, out=logits)
        losses_N[tokens] = launch_losses(logits, labels_N[tokens], in_place=any(needs))[0]
        if needs[0]:
            torch.mm(logits, weight_VC, out=grad_hidden[tokens])
        if needs[1]:
            _add_product(grad_weight, logits.T, hidden_nC, keep=first > 0)
    return losses_N.sum(dtype=torch.float64), grad_hidden, grad_weight


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, keep: bool) -> None:
    """Add left @ right to `total`, or write it there unless `keep`; the sum is rounded to the dtype of `total`."""
    if total.dtype != left.dtype and total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=int(keep), out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype), beta=int(keep))


def _empty_gradients(hidden_NC, weight_VC, needs, weight_dtype):
    grad_hidden = torch.empty_like(hidden_NC) if needs[0] else hidden_NC.new_empty(0)
    grad_weight = weight_VC.new_empty(weight_VC.shape if needs[1] else (0,), dtype=weight_dtype)
    return grad_hidden, grad_weight


def _fake(hidden, weight, labels, needs, logits_bytes, weight_dtype):
    return hidden.new_empty((), dtype=torch.float64), *_empty_gradients(hidden, weight, needs, weight_dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.needs, ctx.weight_dtype = inputs[3], inputs[1].dtype
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    by_hidden, by_weight = ctx.saved_tensors
    grad_hidden = _scale(by_hidden, grad, by_hidden.dtype) if ctx.needs[0] else None
    grad_weight = _scale(by_weight, grad, ctx.weight_dtype) if ctx.needs[1] else None
    return grad_hidden, grad_weight, None, None, None, None


def _scale(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return gradient * factor in a dtype, in the gradient's own memory if it has that dtype."""
    if type(gradient) is torch.Tensor and gradient.dtype == dtype:  # a traced backward must not write to its inputs
        blocks = cdiv(gradient.numel(), _SCALED)
        launch_kernel(scale_in_place, (blocks,), gradient, factor.float(), gradient.numel(), BLOCK=_SCALED, num_warps=8)
        torch.autograd.graph.increment_version(gradient)  # so that torch refuses a second backward
        return gradient
    # A factor with dims takes part in type promotion, so that it is not rounded to a short dtype.
    return torch.mul(gradient, factor.float().reshape((1,) * gradient.ndim)).to(dtype)


@triton.jit
def scale_in_place(x, factor, count, BLOCK: tl.constexpr):
    """Multiply by a factor that lies on the device; nothing is read or written if it is 1."""
    by = tl.load(factor)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, at < count, other=0.0).to(tl.float32) * by
        tl.store(x + at, value.to(x.dtype.element_ty), at < count)


_operator = operator(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, bool[] needs, int logits_bytes, "
    "ScalarType weight_dtype) -> (Tensor, Tensor, Tensor)",
    launch,
    _fake,
    backward=_backward,
    setup_context=_setup,
)


def linear_cross_entropy(
    hidden_BTC: torch.Tensor,
    weight_VC: torch.Tensor,
    labels_BT: torch.Tensor,
    *,
    logits_bytes: int = LOGITS_BYTES,
    weight_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the summed negative log-likelihood (nats) of the labels as a float64 scalar.

    Backward can run once: it scales the gradients where they are.

    Args:
        hidden_BTC: final hidden states.
        weight_VC: output projection, in their dtype.
        labels_BT: int64 token ids; `IGNORED` ones add nothing.
        logits_bytes: that the logits of a chunk of tokens may take.
        weight_dtype: in which the weight's gradient is added up over chunks. float32 rounds nothing until the end, and
            keeps 4 bytes per element from forward to backward; the dtype of the weight keeps only the gradient itself,
            and rounds once per chunk. None: the latter for up to 4 chunks, whose roundings are lost in those of the
            products.
    """
    on = torch.is_grad_enabled()
    needs = [on and hidden_BTC.requires_grad, on and weight_VC.requires_grad]
    hidden_NC = hidden_BTC.flatten(0, 1)
    if weight_dtype is None:
        chunk = chunk_tokens(len(hidden_NC), weight_VC.shape[0] * weight_VC.element_size(), logits_bytes)
        weight_dtype = weight_VC.dtype if len(hidden_NC) <= _ROUNDED_CHUNKS * chunk else torch.float32
    return _operator(hidden_NC, weight_VC, labels_BT.flatten(), needs, logits_bytes, weight_dtype)[0]


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield (label, kernel, arguments, keyword arguments) of everything that a GPU would compile."""
    for dtype in (torch.bfloat16, torch.float32):
        args = (torch.empty(16, dtype=dtype), torch.empty(()), 16)
        yield f"scale {str(dtype)[6:]}", scale_in_place, args, {"BLOCK": _SCALED, "num_warps": 8}
