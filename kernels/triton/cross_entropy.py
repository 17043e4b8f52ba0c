"""Cross entropy over rows of logits: the loss in one pass, the gradient in place of the logits if wanted.

Shapes: N tokens, V vocabulary, v the part of it that a process of a tensor group holds. A row is read block by block
with a running maximum and sum (online softmax, arXiv 1805.02867), in float32.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from shardwright.kernels.linear_cross_entropy import IGNORED
from shardwright.kernels.triton.config import Config, pick
from shardwright.kernels.triton.launch import cdiv, launch_kernel
from shardwright.kernels.triton.operator import operator

CONFIGS = tuple(
    Config(blocks={"BLOCK": block}, num_warps=warps)
    for block, warps in ((8192, 16), (4096, 8), (8192, 8), (16384, 16), (16384, 32), (32768, 32))
)
GRADIENT_CONFIGS = tuple(
    Config(blocks={"BLOCK": block}, num_warps=warps) for block, warps in ((2048, 4), (1024, 4), (4096, 8), (8192, 8))
)

_LOG2E = tl.constexpr(1.4426950408889634)
_FLOOR = tl.constexpr(-1e38)  # where the running maximum begins, so that a row of nothing but -inf gives no inf - inf
_PADDING = tl.constexpr(-float("inf"))  # harmless beside a maximum that is finite
_IGNORED = tl.constexpr(IGNORED)


@triton.jit
def loss_rows(  # noqa: PLR0913
    logits,
    labels,
    losses,
    lse,
    stride,
    columns,
    first,
    SHARD: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its loss and log-sum-exp, then with GRADIENT softmax - one-hot in place of it.

    With SHARD, of a part of the vocabulary that begins at `first`: in place of the loss the label's logit, 0 where it
    is elsewhere.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row) - first
    found = (label >= 0) & (label < columns)
    target = tl.load(logits + label, found, other=0.0).to(tl.float32)
    counted = label + first != _IGNORED
    lane = tl.arange(0, BLOCK)
    greatest = tl.full([], _FLOOR, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, columns, BLOCK):
        x = tl.load(logits + start + lane, start + lane < columns, other=_PADDING).to(tl.float32)
        higher = tl.maximum(greatest, tl.max(x, 0))
        total = total * tl.exp2((greatest - higher) * _LOG2E) + tl.sum(tl.exp2((x - higher) * _LOG2E), 0)
        greatest = higher
    normaliser = greatest + tl.log(total)
    tl.store(lse + row, normaliser)
    if SHARD:
        tl.store(losses + row, target)
    else:
        loss = tl.where(found, normaliser - target, float("nan"))  # a label outside the vocabulary
        tl.store(losses + row, tl.where(counted, loss, 0.0))
        if GRADIENT:
            scale = tl.where(counted, 1.0, 0.0)
            blocks = tl.cdiv(columns, BLOCK)
            for back in range(0, blocks):  # what was read last is the likeliest to be in the cache still
                column = (blocks - 1 - back) * BLOCK + lane
                _descend(logits, logits, column, columns, normaliser, label, scale, scale)


@triton.jit
def _descend(logits, out, column, columns, normaliser, label, scale, pull):
    """Write scale * softmax - pull * one-hot; a scale of 0 gives 0 for the first, whatever the logits are."""
    x = tl.load(logits + column, column < columns, other=_PADDING).to(tl.float32)
    pulled = tl.where(column == label, -pull, 0.0)
    gradient = tl.where(scale == 0.0, pulled, tl.exp2((x - normaliser) * _LOG2E) * scale + pulled)
    tl.store(out + column, gradient.to(out.dtype.element_ty), column < columns)


@triton.jit
def gradient_blocks(  # noqa: PLR0913
    logits, labels, lse, grad, grad_wanted, out, stride, out_stride, columns, first, BLOCK: tl.constexpr
):
    """One block of columns of one row; `out` may be `logits`.

    Of a shard, with the gradients of its log-sum-exp and of the label's logit; of a loss without the latter.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    scale = tl.load(grad + row)
    if grad_wanted is not None:
        pull = -tl.load(grad_wanted + row)
    else:
        scale = tl.where(label != _IGNORED, scale, 0.0)
        pull = scale
    normaliser = tl.load(lse + row)
    _descend(logits + row * stride, out + row * out_stride, column, columns, normaliser, label - first, scale, pull)


def launch_losses(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, *, in_place: bool = False, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return losses [N] and log-sum-exps [N]; `in_place` turns the logits into the gradient of the summed losses."""
    return _launch_rows(logits_NV, labels_N, 0, {"SHARD": False, "GRADIENT": in_place}, config)


def launch_shard(
    logits_Nv: torch.Tensor, labels_N: torch.Tensor, first: int, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `shard_statistics`."""
    wanted_N, lse_N = _launch_rows(logits_Nv, labels_N, first, {"SHARD": True, "GRADIENT": False}, config)
    return lse_N, wanted_N


def launch_gradient(
    logits_Nv: torch.Tensor,
    labels_N: torch.Tensor,
    lse_N: torch.Tensor,
    grad_N: torch.Tensor,
    grad_wanted_N: torch.Tensor | None,
    out_Nv: torch.Tensor,
    first: int,
    config: Config | None = None,
) -> torch.Tensor:
    """Write the gradient of the logits to `out_Nv`, which may be `logits_Nv`, and return it."""
    rows, columns = logits_Nv.shape
    config = config or pick("cross_entropy_gradient", f"columns={columns}", lambda: GRADIENT_CONFIGS, logits_Nv.device)
    launch_kernel(
        gradient_blocks,
        (rows, cdiv(columns, config.blocks["BLOCK"])),
        logits_Nv,
        labels_N.contiguous(),
        lse_N.contiguous(),
        grad_N.contiguous(),
        None if grad_wanted_N is None else grad_wanted_N.contiguous(),
        out_Nv,
        logits_Nv.stride(0),
        out_Nv.stride(0),
        columns,
        first,
        **config.arguments,
    )
    return out_Nv


def _launch_rows(logits, labels, first, kind, config):
    rows, columns = logits.shape
    config = config or pick("cross_entropy", f"columns={columns}", lambda: CONFIGS, logits.device)
    outs = _two_per_row(logits)
    args = (logits, labels.contiguous(), *outs, logits.stride(0), columns, first)
    launch_kernel(loss_rows, (rows,), *args, **kind, **config.arguments)
    return outs


def _two_per_row(logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = logits_NV.shape[0]
    return logits_NV.new_empty(rows, dtype=torch.float32), logits_NV.new_empty(rows, dtype=torch.float32)


def _dense_rows(logits_NV: torch.Tensor) -> torch.Tensor:
    return logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()


def _losses_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _losses_backward(ctx: Any, grad_N: torch.Tensor, _: Any) -> tuple[torch.Tensor, None]:
    logits_NV, labels_N, lse_N = ctx.saved_tensors
    return _gradient(logits_NV, labels_N, lse_N, grad_N, None, 0), None


def _shard_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits_Nv, labels_N, ctx.first = inputs
    ctx.save_for_backward(logits_Nv, labels_N, output[0])


def _shard_backward(ctx: Any, grad_N: torch.Tensor, grad_wanted_N: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    logits_Nv, labels_N, lse_N = ctx.saved_tensors
    args = (logits_Nv, labels_N, lse_N, grad_N, grad_wanted_N)
    if logits_Nv.is_leaf or type(logits_Nv) is not torch.Tensor:  # a traced backward must not write to its inputs
        return _gradient(*args, ctx.first), None, None
    launch_gradient(*args, logits_Nv, ctx.first)
    torch.autograd.graph.increment_version(logits_Nv)  # so that torch refuses a second backward
    return logits_Nv, None, None


_losses = operator(
    "cross_entropy(Tensor logits, Tensor labels) -> (Tensor, Tensor)",
    launch_losses,
    lambda logits, labels: _two_per_row(logits),
    backward=_losses_backward,
    setup_context=_losses_setup,
)
_shard = operator(
    "cross_entropy_shard(Tensor logits, Tensor labels, int first) -> (Tensor, Tensor)",
    launch_shard,
    lambda logits, labels, first: _two_per_row(logits),
    backward=_shard_backward,
    setup_context=_shard_setup,
)
_gradient = operator(
    "cross_entropy_gradient(Tensor logits, Tensor labels, Tensor lse, Tensor grad, Tensor? grad_wanted, int first)"
    " -> Tensor",
    lambda *args: launch_gradient(*args[:5], torch.empty_like(args[0]), args[5]),
    lambda logits, *_: torch.empty_like(logits),
)


def cross_entropy(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negative log-likelihood of each label and the log-sum-exp of each row, in nats, float32 [N].

    Only the losses can be differentiated. Ignored tokens have a loss of 0, labels outside the vocabulary of NaN.

    Args:
        logits_NV: of any floating dtype.
        labels_N: int64; `IGNORED` where none is predicted.
    """
    return _losses(_dense_rows(logits_NV), labels_N)


def shard_statistics(logits_Nv: torch.Tensor, labels_N: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-sum-exp of each row and the logit of its label, 0 where that is elsewhere, float32 [N].

    Backward can run once: it turns the logits into their gradient in place, unless they are a leaf of the graph.

    Args:
        logits_Nv: of the tokens for the part of the vocabulary that begins at `first`.
        labels_N: int64, in the whole vocabulary.
        first: where this part of the vocabulary begins.
    """
    return _shard(_dense_rows(logits_Nv), labels_N, first)


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield (label, kernel, arguments, keyword arguments) of everything that a GPU would compile."""
    for config in CONFIGS:
        for kind in ("losses", "losses and gradient", "shard"):
            yield _rows_compilation(kind, torch.bfloat16, 128256, config)
    for config in GRADIENT_CONFIGS:
        yield _gradient_compilation(torch.bfloat16, 128256, config)
    for dtype, columns in ((torch.float16, 128256), (torch.float32, 128256), (torch.bfloat16, 50257)):
        yield _rows_compilation("losses and gradient", dtype, columns, CONFIGS[0])
        yield _gradient_compilation(dtype, columns, GRADIENT_CONFIGS[0])
    yield _gradient_compilation(torch.bfloat16, 16032, GRADIENT_CONFIGS[0], shard=True)


def _rows_compilation(kind: str, dtype: torch.dtype, columns: int, config: Config):
    logits, labels = torch.empty(16, dtype=dtype), torch.empty(16, dtype=torch.int64)
    args = (logits, labels, torch.empty(16), torch.empty(16), columns, columns, 0)
    kwargs = {"SHARD": kind == "shard", "GRADIENT": kind == "losses and gradient", **config.arguments}
    return _label(f"cross_entropy {kind}", dtype, columns, config), loss_rows, args, kwargs


def _gradient_compilation(dtype: torch.dtype, columns: int, config: Config, *, shard: bool = False):
    logits, labels, per_token = torch.empty(16, dtype=dtype), torch.empty(16, dtype=torch.int64), torch.empty(16)
    args = (logits, labels, per_token, per_token, per_token if shard else None, logits, columns, columns, columns, 0)
    kernel = "cross_entropy_gradient shard" if shard else "cross_entropy_gradient"
    return _label(kernel, dtype, columns, config), gradient_blocks, args, config.arguments


def _label(kernel: str, dtype: torch.dtype, columns: int, config: Config) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"{kernel} {name} columns={columns} BLOCK={config.blocks['BLOCK']} warps={config.num_warps}"
