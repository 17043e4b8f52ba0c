"""Gradient of an embedding: each row of the table is written once, by one program, with the sum over its tokens.

The tokens are sorted by id, stably, so that those of a row lie side by side in a fixed order. A row that has many would
keep its one program busy for long: wherever a whole run of RUN sorted tokens is of one row, it is added up beforehand.

Shapes: N tokens, V rows of the table, C columns.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from shardwright.kernels.triton.config import Config, pick
from shardwright.kernels.triton.launch import cdiv, launch_kernel
from shardwright.kernels.triton.operator import operator

CONFIGS = tuple(
    Config(blocks={"ROWS": rows, "BLOCK": block}, num_warps=warps)
    for rows, block, warps in ((8, 1024, 4), (4, 1024, 4), (4, 2048, 8), (8, 512, 4), (4, 4096, 8))
)
RUN = 64  # sorted tokens


@triton.jit
def _add_tokens(total, grad, order, begin, end, column, inside, stride, ROWS: tl.constexpr):  # noqa: PLR0913
    """Add the gradients of the sorted tokens begin .. end."""
    for first in range(begin, end, ROWS):
        token = first + tl.arange(0, ROWS)
        row = tl.load(order + token, token < end, other=0)
        found = (token < end)[:, None] & inside[None, :]
        value = tl.load(grad + row[:, None] * stride + column[None, :], found, other=0.0)
        total += tl.sum(value.to(tl.float32), 0)
    return total


@triton.jit
def sum_runs(  # noqa: PLR0913
    grad, ids, order, partials, columns, stride, RUN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add up BLOCK columns of a run of tokens, if all have one id."""
    blocks = tl.cdiv(columns, BLOCK)
    run = tl.program_id(0) // blocks
    begin = run * RUN
    if tl.load(ids + begin) == tl.load(ids + begin + RUN - 1):
        column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        total = tl.zeros([BLOCK], tl.float32)
        total = _add_tokens(total, grad, order, begin, begin + RUN, column, inside, stride, ROWS)
        tl.store(partials + run.to(tl.int64) * columns + column, total, inside)


@triton.jit
def sum_rows(  # noqa: PLR0913
    grad, order, bounds, partials, out, columns, stride, RUN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write BLOCK columns of a row: its first tokens, its whole runs, its last tokens; zeros if it has none."""
    blocks = tl.cdiv(columns, BLOCK)
    row = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    begin = tl.load(bounds + row)
    end = tl.load(bounds + row + 1)
    first_run = tl.cdiv(begin, RUN)
    last_run = end // RUN
    head = tl.minimum(first_run * RUN, end)
    tail = tl.maximum(last_run * RUN, head)
    total = tl.zeros([BLOCK], tl.float32)
    total = _add_tokens(total, grad, order, begin, head, column, inside, stride, ROWS)
    for first in range(first_run, last_run, ROWS):
        run = first + tl.arange(0, ROWS)
        found = (run < last_run)[:, None] & inside[None, :]
        total += tl.sum(tl.load(partials + run.to(tl.int64)[:, None] * columns + column[None, :], found, other=0.0), 0)
    total = _add_tokens(total, grad, order, tail, end, column, inside, stride, ROWS)
    tl.store(out + row.to(tl.int64) * columns + column, total.to(out.dtype.element_ty), inside)


def launch_gradient(
    grad_BTC: torch.Tensor, ids_BT: torch.Tensor, num_rows: int, config: Config | None = None
) -> torch.Tensor:
    """Return the gradient of the table [V, C], in the dtype of `grad_BTC`."""
    grad_NC = grad_BTC.reshape(-1, grad_BTC.shape[-1])
    grad_NC = grad_NC if grad_NC.stride(1) == 1 else grad_NC.contiguous()
    tokens, columns = grad_NC.shape
    ids_N, order_N = ids_BT.flatten().int().sort(stable=True)
    rows = torch.arange(num_rows + 1, dtype=torch.int32, device=ids_N.device)
    bounds = torch.searchsorted(ids_N, rows, out_int32=True)
    out_VC = grad_NC.new_empty(num_rows, columns)
    partials = torch.empty((tokens // RUN, columns), dtype=torch.float32, device=grad_NC.device)
    config = config or pick("embedding_gradient", f"columns={columns}", lambda: CONFIGS, grad_NC.device)
    blocks, stride, launch = cdiv(columns, config.blocks["BLOCK"]), grad_NC.stride(0), {"RUN": RUN, **config.arguments}
    launch_kernel(sum_runs, (len(partials) * blocks,), grad_NC, ids_N, order_N, partials, columns, stride, **launch)
    args = (grad_NC, order_N, bounds, partials, out_VC, columns, stride)
    launch_kernel(sum_rows, (num_rows * blocks,), *args, **launch)
    return out_VC


_gradient = operator(
    "embedding_gradient(Tensor grad, Tensor ids, int num_rows) -> Tensor",
    launch_gradient,
    lambda grad, ids, num_rows: grad.new_empty(num_rows, grad.shape[-1]),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ids_BT, weight_VC = inputs
    ctx.save_for_backward(ids_BT)
    ctx.num_rows = weight_VC.shape[0]


def _backward(ctx: Any, grad_BTC: torch.Tensor) -> tuple[None, torch.Tensor]:
    (ids_BT,) = ctx.saved_tensors
    return None, _gradient(grad_BTC, ids_BT, ctx.num_rows)


embedding = operator(
    "embedding(Tensor ids, Tensor weight) -> Tensor",
    lambda ids, weight: torch.embedding(weight, ids),
    lambda ids, weight: weight.new_empty(*ids.shape, weight.shape[1]),
    backward=_backward,
    setup_context=_setup,
)


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield (label, kernel, arguments, keyword arguments) of everything that a GPU would compile."""
    for config in CONFIGS:
        yield from _gradient_compilations(torch.bfloat16, config)
    for dtype in (torch.float16, torch.float32):
        yield from _gradient_compilations(dtype, CONFIGS[0])


def _gradient_compilations(dtype: torch.dtype, config: Config):
    grad, partials = torch.empty(16, dtype=dtype), torch.empty(16)
    ids, order = torch.empty(16, dtype=torch.int32), torch.empty(16, dtype=torch.int64)
    blocks = " ".join(f"{name}={size}" for name, size in config.blocks.items())
    label = f"{str(dtype).removeprefix('torch.')} {blocks} warps={config.num_warps}"
    launch = {"RUN": RUN, **config.arguments}
    yield f"embedding runs {label}", sum_runs, (grad, ids, order, partials, 4096, 4096), launch
    yield f"embedding rows {label}", sum_rows, (grad, order, ids, partials, grad, 4096, 4096), launch
