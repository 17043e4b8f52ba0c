"""RMSNorm and LayerNorm, each with or without the residual sum before it, forward and backward.

A row lives in registers between its load and its store, so that every element is read and written once. Gradients of
weight and bias are summed by each program over the rows that it has, in float32, and by a second kernel over programs:
the same order every time, without atomics.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl

from shardwright.kernels.op import KernelError
from shardwright.kernels.triton.config import Config, pick
from shardwright.kernels.triton.launch import cdiv, launch_kernel, next_power_of_2
from shardwright.kernels.triton.operator import empty_dense, operator

MAX_COLUMNS = 16384  # a longer row does not fit in registers

_SHAPES = ((1, 4), (1, 8), (1, 16), (1, 32), (2, 4), (4, 4), (8, 4), (16, 4), (32, 4))  # rows, warps
CONFIGS = tuple(Config(blocks={"ROWS": rows}, num_warps=warps) for rows, warps in _SHAPES)

_SUM_BLOCKS = {"ROWS": 64, "COLUMNS": 32}


@triton.jit
def norm_forward(  # noqa: PLR0913
    x,
    residual,
    weight,
    bias,
    y,
    total,
    statistics,
    rows,
    columns,
    eps,
    CENTERED: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Normalise ROWS rows; `statistics` gets the inverse deviations, then the means if CENTERED."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    within = column < columns
    inside = (row < rows)[:, None] & within
    offsets = row.to(tl.int64)[:, None] * columns + column
    z = tl.load(x + offsets, inside, other=0.0).to(tl.float32)
    if residual is not None:
        z += tl.load(residual + offsets, inside, other=0.0).to(tl.float32)
        rounded = z.to(total.dtype.element_ty)
        tl.store(total + offsets, rounded, inside)
        z = rounded.to(tl.float32)
    if CENTERED:
        mean = tl.sum(z, 1) / columns
        tl.store(statistics + rows + row, mean, row < rows)
        z = tl.where(within, z - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(z * z, 1) / columns + eps)
    tl.store(statistics + row, inverse, row < rows)
    z = z * inverse[:, None] * tl.load(weight + column, within, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + column, within, other=0.0).to(tl.float32)
    tl.store(y + offsets, z.to(y.dtype.element_ty), inside)


@triton.jit
def norm_backward(  # noqa: PLR0913
    grad,
    grad_total,
    x,
    weight,
    statistics,
    grad_x,
    partials,
    rows,
    columns,
    CENTERED: tl.constexpr,
    BIASED: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradient of every num_programs-th tile of ROWS rows, and this program's share of weight's and bias's.

    The next tile is under way while one is worked on.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    column = tl.arange(0, COLUMNS)[None, :]
    within = column < columns
    w = tl.load(weight + column, within, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    grad_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    next_dy, next_x = _load_rows(grad, x, program, rows, columns, COLUMNS, ROWS)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & within
        offsets = row.to(tl.int64)[:, None] * columns + column
        dy, z = next_dy.to(tl.float32), next_x.to(tl.float32)
        next_dy, next_x = _load_rows(grad, x, tile + programs, rows, columns, COLUMNS, ROWS)
        inverse = tl.load(statistics + row, row < rows, other=0.0)[:, None]
        if CENTERED:
            z -= tl.load(statistics + rows + row, row < rows, other=0.0)[:, None]
        z *= inverse
        grad_weight += dy * z
        if BIASED:
            grad_bias += dy
        dz = dy * w
        dx = dz - z * (tl.sum(dz * z, 1) / columns)[:, None]
        if CENTERED:
            dx -= (tl.sum(dz, 1) / columns)[:, None]
        dx *= inverse
        if grad_total is not None:
            dx += tl.load(grad_total + offsets, inside, other=0.0).to(tl.float32)
        tl.store(grad_x + offsets, dx.to(grad_x.dtype.element_ty), inside)
    share = partials + program * columns + column
    tl.store(share, tl.sum(grad_weight, 0)[None, :], within)
    if BIASED:
        tl.store(share + programs * columns, tl.sum(grad_bias, 0)[None, :], within)


@triton.jit
def _load_rows(grad, x, tile, rows, columns, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Return a tile of ROWS rows of both, zeros outside."""
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    offsets = row.to(tl.int64)[:, None] * columns + column
    return tl.load(grad + offsets, inside, other=0.0), tl.load(x + offsets, inside, other=0.0)


@triton.jit
def sum_programs(partials, sums, programs, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum float32 partials [parameters, programs, columns] over programs."""
    parameter = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    at = partials + parameter * programs * columns + row[:, None] * columns + column[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, programs, ROWS):
        inside = (first + row < programs)[:, None] & (column < columns)[None, :]
        total += tl.load(at + first * columns, inside, other=0.0)
    out = tl.sum(total, 0).to(sums.dtype.element_ty)
    tl.store(sums + parameter * columns + column, out, column < columns)


def fitting(configs: tuple[Config, ...], columns: int) -> tuple[Config, ...]:
    """Return the configurations that give a thread 8 to 32 elements of rows of a width, those nearest to 16 first.

    Raises:
        KernelError: no row of this width fits in registers.
    """
    if columns > MAX_COLUMNS:
        raise KernelError(f"norm of {columns} columns: the triton kernels hold up to {MAX_COLUMNS}; use the reference")
    block = next_power_of_2(columns)

    def distance(config: Config) -> float:
        return abs(math.log2(block * config.blocks["ROWS"] / (32 * config.num_warps)) - 4)

    ranked = sorted(configs, key=distance)
    return tuple(c for c in ranked if distance(c) <= 1) or tuple(ranked[:1])


def _choose(kernel: str, columns: int, device: torch.device) -> Config:
    return pick(kernel, f"columns={next_power_of_2(columns)}", lambda: fitting(CONFIGS, columns), device)


@cache
def _num_programs(num_warps: int, device: torch.device) -> int:
    """Return how many programs share the rows in backward: those that the device runs at once."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count * max(1, 16 // num_warps)


def launch_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    centered: bool,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return the norm, x + residual (None without a residual), and the statistics float32 [1 or 2, rows]."""
    x = _dense(x)
    columns = x.shape[-1]
    config = config or _choose("norm_forward", columns, x.device)
    rows = x.numel() // columns
    y, total = torch.empty_like(x), None
    if residual is not None:
        residual, total = _dense(_alike(residual, x)), torch.empty_like(x)
    statistics = _empty_statistics(x, centered)
    grid = (cdiv(rows, config.blocks["ROWS"]),)
    launch_kernel(
        norm_forward,
        grid,
        x,
        residual,
        weight,
        bias,
        y,
        total,
        statistics,
        rows,
        columns,
        eps,
        CENTERED=centered,
        COLUMNS=next_power_of_2(columns),
        **config.arguments,
    )
    return y, total, statistics


def launch_backward(
    grad: torch.Tensor,
    grad_total: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    statistics: torch.Tensor,
    biased: bool,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of what was normalised, and those of weight and bias as [1 or 2, columns]."""
    x, grad = _dense(x), _dense(grad)
    grad_total = None if grad_total is None else _dense(grad_total)
    columns = x.shape[-1]
    config = config or _choose("norm_backward", columns, x.device)
    rows = x.numel() // columns
    programs = min(_num_programs(config.num_warps, x.device), cdiv(rows, config.blocks["ROWS"]))
    grad_x = torch.empty_like(x)
    partials = torch.empty((1 + biased, programs, columns), dtype=torch.float32, device=x.device)
    grad_parameters = weight.new_empty((1 + biased, columns))
    launch_kernel(
        norm_backward,
        (programs,),
        grad,
        grad_total,
        x,
        weight,
        statistics,
        grad_x,
        partials,
        rows,
        columns,
        CENTERED=statistics.shape[0] == 2,
        BIASED=biased,
        COLUMNS=next_power_of_2(columns),
        **config.arguments,
    )
    grid = (cdiv(columns, _SUM_BLOCKS["COLUMNS"]), 1 + biased)
    launch_kernel(sum_programs, grid, partials, grad_parameters, programs, columns, **_SUM_BLOCKS)
    return grad_x, grad_parameters


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_contiguous() else x.contiguous()


def _alike(residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise KernelError(
            f"residual is {residual.dtype} {list(residual.shape)}, x {x.dtype} {list(x.shape)}; give both alike"
        )
    return residual


def _empty_statistics(x: torch.Tensor, centered: bool) -> torch.Tensor:
    return x.new_empty((1 + centered, x.numel() // x.shape[-1]), dtype=torch.float32)


def _norm(x, weight, bias, eps, centered):
    y, _, statistics = launch_forward(x, None, weight, bias, eps, centered)
    return y, statistics


def _norm_fake(x, weight, bias, eps, centered):
    return empty_dense(x), _empty_statistics(x, centered)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.biased = inputs[2] is not None
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _norm_backward(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
    grad_x, parameters = _gradients(grad, None, *ctx.saved_tensors, ctx.biased)
    return grad_x, parameters[0], parameters[1] if ctx.biased else None, None, None


def _residual_norm_fake(x, residual, weight, bias, eps, centered):
    return empty_dense(x), empty_dense(x), _empty_statistics(x, centered)


def _residual_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.biased = inputs[3] is not None
    ctx.save_for_backward(output[1], inputs[2], output[2])


def _residual_norm_backward(ctx: Any, grad: torch.Tensor | None, grad_total: torch.Tensor | None, _: None):
    if grad is None:  # the norm was not used, the sum was
        return grad_total, grad_total, None, None, None, None
    grad_x, parameters = _gradients(grad, grad_total, *ctx.saved_tensors, ctx.biased)
    return grad_x, grad_x, parameters[0], parameters[1] if ctx.biased else None, None, None


def _gradients_fake(grad, grad_total, x, weight, statistics, biased):
    return empty_dense(x), weight.new_empty((1 + biased, x.shape[-1]))


_gradients = operator(
    "norm_backward(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, Tensor statistics, bool biased)"
    " -> (Tensor, Tensor)",
    launch_backward,
    _gradients_fake,
)
norm = operator(
    "norm(Tensor x, Tensor weight, Tensor? bias, float eps, bool centered) -> (Tensor, Tensor)",
    _norm,
    _norm_fake,
    backward=_norm_backward,
    setup_context=_norm_setup,
)
residual_norm = operator(
    "residual_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, bool centered)"
    " -> (Tensor, Tensor, Tensor)",
    launch_forward,
    _residual_norm_fake,
    backward=_residual_norm_backward,
    setup_context=_residual_norm_setup,
)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dim, computed in float32, in the dtype of `x`.

    Raises:
        KernelError: the last dim is longer than `MAX_COLUMNS`.

    Source: arXiv 1910.07467.
    """
    return norm(x, weight, None, eps, False)[0]


def residual_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `rms_norm(x + residual)` and x + residual, which is rounded to the dtype of `x` before the norm."""
    return residual_norm(x, residual, weight, None, eps, False)[:2]


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Return (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dim, computed in float32.

    Raises:
        KernelError: the last dim is longer than `MAX_COLUMNS`.

    Source: arXiv 1607.06450.
    """
    return norm(x, weight, bias, eps, True)[0]


def residual_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `layer_norm(x + residual)` and x + residual, which is rounded to the dtype of `x` before the norm."""
    return residual_norm(x, residual, weight, bias, eps, True)[:2]


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield (label, kernel, arguments, keyword arguments) of everything that a GPU would compile."""
    for columns in (128, 1024, 4096, 16384):
        for config in fitting(CONFIGS, columns):
            yield _forward_compilation(columns, config, torch.bfloat16, centered=False, residual=True)
            yield _backward_compilation(columns, config, torch.bfloat16, centered=False, residual=True)
    config = fitting(CONFIGS, 4096)[0]
    for dtype, centered, residual in product(
        (torch.bfloat16, torch.float16, torch.float32), (False, True), (False, True)
    ):
        if (dtype, centered, residual) != (torch.bfloat16, False, True):  # that is among those above
            yield _forward_compilation(4096, config, dtype, centered, residual)
            yield _backward_compilation(4096, config, dtype, centered, residual)
    partials = torch.empty(2, 264, 4096)
    yield "sum_programs bf16", sum_programs, (partials, partials[0, :2].bfloat16(), 264, 4096), dict(_SUM_BLOCKS)


def _forward_compilation(columns: int, config: Config, dtype: torch.dtype, centered: bool, residual: bool):
    x, weight = torch.empty(16, columns, dtype=dtype), torch.empty(columns, dtype=dtype)
    other = x if residual else None
    args = (x, other, weight, weight if centered else None, x, other, torch.empty(2, 16), 16, columns, 1e-5)
    kwargs = {"CENTERED": centered, "COLUMNS": columns, **config.arguments}
    return _label("norm_forward", columns, config, dtype, centered, residual), norm_forward, args, kwargs


def _backward_compilation(columns: int, config: Config, dtype: torch.dtype, centered: bool, residual: bool):
    x, weight = torch.empty(16, columns, dtype=dtype), torch.empty(columns, dtype=dtype)
    args = (x, x if residual else None, x, weight, torch.empty(2, 16), x, torch.empty(2, 16, columns), 16, columns)
    kwargs = {"CENTERED": centered, "BIASED": centered, "COLUMNS": columns, **config.arguments}
    return _label("norm_backward", columns, config, dtype, centered, residual), norm_backward, args, kwargs


def _label(kernel: str, columns: int, config: Config, dtype: torch.dtype, centered: bool, residual: bool) -> str:
    kind = ("layer" if centered else "rms") + (" residual" if residual else "")
    blocks = " ".join(f"{name}={value}" for name, value in config.blocks.items())
    return f"{kernel} {kind} {str(dtype).removeprefix('torch.')} columns={columns} {blocks} warps={config.num_warps}"
