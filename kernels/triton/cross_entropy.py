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
    wanted,
    stride,
    columns,
    first,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its loss and log-sum-exp, then with GRADIENT softmax - one-hot in place of it.

    With `wanted`, of a shard of the vocabulary that begins at `first`: greatest logit (to `losses`), sum of the
    exponentials relative to it (to `lse`), and the label's logit, 0 where it is elsewhere.
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
    if wanted is not None:
        tl.store(losses + row, greatest)
        tl.store(lse + row, total)
        tl.store(wanted + row, target)
    else:
        normaliser = greatest + tl.log(total)
        loss = tl.where(found, normaliser - target, float("nan"))  # a label outside the vocabulary
        tl.store(losses + row, tl.where(counted, loss, 0.0))
        tl.store(lse + row, normaliser)
        if GRADIENT:
            scale = tl.where(counted, 1.0, 0.0)
            blocks = tl.cdiv(columns, BLOCK)
            for back in range(0, blocks):  # what was read last is the likeliest to be in the cache still
                column = (blocks - 1 - back) * BLOCK + lane
                _descend(logits, logits, column, columns, normaliser, label, scale)


@triton.jit
def _descend(logits, out, column, columns, normaliser, label, scale):
    """Write scale * (softmax - one-hot); a scale of 0 gives 0, whatever the logits are."""
    x = tl.load(logits + column, column < columns, other=_PADDING).to(tl.float32)
    excess = tl.exp2((x - normaliser) * _LOG2E) - tl.where(column == label, 1.0, 0.0)
    gradient = tl.where(scale == 0.0, 0.0, excess * scale)
    tl.store(out + column, gradient.to(out.dtype.element_ty), column < columns)


@triton.jit
def gradient_blocks(  # noqa: PLR0913
    logits, labels, lse, grad, out, stride, out_stride, columns, first, BLOCK: tl.constexpr
):
    """One block of columns of one row; `out` may be `logits`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    scale = tl.where(label != _IGNORED, tl.load(grad + row), 0.0)
    normaliser = tl.load(lse + row)
    _descend(logits + row * stride, out + row * out_stride, column, columns, normaliser, label - first, scale)


def launch_losses(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, *, in_place: bool = False, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return losses [N] and log-sum-exps [N]; `in_place` turns the logits into the gradient of the summed losses."""
    losses_N, lse_N = _empty(logits_NV, 2)
    _launch_rows(logits_NV, labels_N, (losses_N, lse_N, None), 0, in_place, config)
    return losses_N, lse_N


def launch_shard(
    logits_Nv: torch.Tensor, labels_N: torch.Tensor, first: int, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `shard_statistics`."""
    greatest_N, total_N, wanted_N = _empty(logits_Nv, 3)
    _launch_rows(logits_Nv, labels_N, (greatest_N, total_N, wanted_N), first, False, config)
    return greatest_N, total_N, wanted_N


def launch_gradient(
    logits_Nv: torch.Tensor,
    labels_N: torch.Tensor,
    lse_N: torch.Tensor,
    grad_N: torch.Tensor,
    out_Nv: torch.Tensor,
    first: int,
    config: Config | None = None,
) -> None:
    """Write the gradient of the logits to `out_Nv`, which may be `logits_Nv`."""
    rows, columns = logits_Nv.shape
    config = config or pick("cross_entropy_gradient", f"columns={columns}", lambda: GRADIENT_CONFIGS, logits_Nv.device)
    launch_kernel(
        gradient_blocks,
        (rows, cdiv(columns, config.blocks["BLOCK"])),
        logits_Nv,
        labels_N.contiguous(),
        lse_N.contiguous(),
        grad_N.contiguous(),
        out_Nv,
        logits_Nv.stride(0),
        out_Nv.stride(0),
        columns,
        first,
        **config.arguments,
    )


def _launch_rows(logits, labels, outs, first, gradient, config):
    columns = logits.shape[1]
    config = config or pick("cross_entropy", f"columns={columns}", lambda: CONFIGS, logits.device)
    launch_kernel(
        loss_rows,
        (logits.shape[0],),
        logits,
        labels.contiguous(),
        *outs,
        logits.stride(0),
        columns,
        first,
        GRADIENT=gradient,
        **config.arguments,
    )


def _empty(logits_NV: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(logits_NV.shape[:1], dtype=torch.float32, device=logits_NV.device) for _ in range(count))


def _dense_rows(logits_NV: torch.Tensor) -> torch.Tensor:
    return logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()


def _losses_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _losses_backward(ctx: Any, grad_N: torch.Tensor, _: Any) -> tuple[torch.Tensor, None]:
    logits_NV, labels_N, lse_N = ctx.saved_tensors
    return gradient(logits_NV, labels_N, lse_N, grad_N), None


def _launch_new_gradient(logits_Nv, labels_N, lse_N, grad_N, first):
    out_Nv = torch.empty_like(logits_Nv)
    launch_gradient(logits_Nv, labels_N, lse_N, grad_N, out_Nv, first)
    return out_Nv


_losses = operator(
    "cross_entropy(Tensor logits, Tensor labels) -> (Tensor, Tensor)",
    launch_losses,
    lambda logits, labels: _empty(logits, 2),
    backward=_losses_backward,
    setup_context=_losses_setup,
)
_shard = operator(
    "cross_entropy_shard(Tensor logits, Tensor labels, int first) -> (Tensor, Tensor, Tensor)",
    launch_shard,
    lambda logits, labels, first: _empty(logits, 3),
)
_gradient = operator(
    "cross_entropy_gradient(Tensor logits, Tensor labels, Tensor lse, Tensor grad, int first) -> Tensor",
    _launch_new_gradient,
    lambda logits, *_: torch.empty_like(logits),
)
_gradient_in_place = operator(
    "cross_entropy_gradient_(Tensor(a!) logits, Tensor labels, Tensor lse, Tensor grad, int first) -> ()",
    lambda logits, labels, lse, grad, first: launch_gradient(logits, labels, lse, grad, logits, first),
    lambda *_: None,
)


def cross_entropy(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negative log-likelihood of each label and the log-sum-exp of each row, in nats, float32 [N].

    Only the losses can be differentiated. Ignored tokens have a loss of 0, labels outside the vocabulary of NaN.

    Args:
        logits_NV: of any floating dtype.
        labels_N: int64; `IGNORED` where none is predicted.
    """
    return _losses(_dense_rows(logits_NV), labels_N)


def shard_statistics(
    logits_Nv: torch.Tensor, labels_N: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what a loss over a vocabulary split over processes needs of one of them, float32 [N] each.

    The greatest logit m, the sum s of exp(logit - m), and the label's logit t, 0 if another process has it. With M the
    maximum of m over processes, the loss is log(sum of s * exp(m - M)) + M - (sum of t), and the log-sum-exp the first
    two summands.

    Args:
        logits_Nv: of the tokens for the vocabulary from `first` on.
        labels_N: int64, in the whole vocabulary.
        first: where this process's part of the vocabulary begins.
    """
    return _shard(_dense_rows(logits_Nv), labels_N, first)


def gradient(
    logits_Nv: torch.Tensor, labels_N: torch.Tensor, lse_N: torch.Tensor, grad_N: torch.Tensor, first: int = 0
) -> torch.Tensor:
    """Return (softmax - one-hot) * grad, 0 for ignored tokens, in the dtype of the logits.

    Args:
        logits_Nv: of the tokens for the vocabulary, or for a process's part of it.
        labels_N: int64, in the whole vocabulary.
        lse_N: log-sum-exp over the whole vocabulary, float32.
        grad_N: gradient of each token's loss, float32.
        first: where this process's part of the vocabulary begins.
    """
    return _gradient(_dense_rows(logits_Nv), labels_N, lse_N, grad_N, first)


def gradient_(
    logits_Nv: torch.Tensor, labels_N: torch.Tensor, lse_N: torch.Tensor, grad_N: torch.Tensor, first: int = 0
) -> torch.Tensor:
    """As `gradient`, in place of the logits, whose rows have to be dense."""
    _gradient_in_place(logits_Nv, labels_N, lse_N, grad_N, first)
    return logits_Nv


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


def _rows_compilation(kind: str, dtype: torch.dtype, columns: int, config: Config):
    logits, labels = torch.empty(16, dtype=dtype), torch.empty(16, dtype=torch.int64)
    per_token = torch.empty(16)
    outs = (per_token, per_token, per_token if kind == "shard" else None)
    args = (logits, labels, *outs, columns, columns, 0)
    kwargs = {"GRADIENT": kind == "losses and gradient", **config.arguments}
    return _label(f"cross_entropy {kind}", dtype, columns, config), loss_rows, args, kwargs


def _gradient_compilation(dtype: torch.dtype, columns: int, config: Config):
    logits, labels, per_token = torch.empty(16, dtype=dtype), torch.empty(16, dtype=torch.int64), torch.empty(16)
    args = (logits, labels, per_token, per_token, logits, columns, columns, columns, 0)
    return _label("cross_entropy_gradient", dtype, columns, config), gradient_blocks, args, config.arguments


def _label(kernel: str, dtype: torch.dtype, columns: int, config: Config) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"{kernel} {name} columns={columns} BLOCK={config.blocks['BLOCK']} warps={config.num_warps}"
