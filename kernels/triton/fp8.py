"""Linear maps in FP8 (e4m3): quantisation of operands, and the three products of forward and backward.

A product reads both operands along the summed dimension, so a tensor that takes part in two is quantised along each of
its dims. Two recipes:

- `rowwise`: one scale for a row of an operand, that is for all that one sum reads. The vendor's product.
- `blockwise`: one scale for 128 values along the sum, of activations and gradients, and for 128 x 128 weights. Products
  of 128 values each are added in float32 outside the tensor cores, which keep fewer bits. Source: DeepSeek-V3, arXiv
  2412.19437, section 3.3.

Gradients are e4m3 too, as in section 3.3.2 there and in torchao's row-wise recipe: with scales as fine as these, a bit
of mantissa is worth more than one of exponent.

Shapes: M and N rows of a product's operands, K their summed dimension, padded with zeros to a multiple of 16.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula
from triton.tools.tensor_descriptor import TensorDescriptor

from shardwright.kernels.op import KernelError
from shardwright.kernels.triton.config import Config, pick
from shardwright.kernels.triton.launch import cdiv, launch_kernel
from shardwright.kernels.triton.operator import operator
from shardwright.kernels.triton.ptxas import HOPPER

BLOCK = 128  # values along the sum that have one scale, and products that are added up on tensor cores
LARGEST = 448.0  # of e4m3
RECIPES = {"rowwise": ("rows", "rows"), "blockwise": ("lines", "squares")}  # scales of activations, and of weights

QUANTISE_CONFIGS = tuple(Config(num_warps=warps) for warps in (8, 4))
PRODUCT_CONFIGS = tuple(
    Config(blocks={"BLOCK_M": rows, "BLOCK_N": columns}, num_warps=warps, num_stages=stages)
    for rows, columns, warps, stages in (
        (128, 128, 8, 4),
        (128, 128, 8, 3),
        (64, 128, 4, 3),
        (64, 128, 4, 4),
        (128, 64, 4, 4),
    )
)

_ALIGNED = 16  # bytes, of a row that the tensor memory accelerator or the vendor's product reads
_BLOCK = tl.constexpr(BLOCK)
_ALIGNMENT = tl.constexpr(_ALIGNED)
_GROUP = tl.constexpr(8)  # tiles of rows that go over all columns together, so that the second cache serves them


class Quantised(NamedTuple):
    """A matrix in FP8: `values * scales` is what it stands for.

    Attributes:
        values: e4m3 [M, K padded].
        scales: float32 [M] (`rows`), [K / 128, M] (`lines`) or [K / 128, M / 128] (`squares`).
        scaling: which of them.
    """

    values: torch.Tensor
    scales: torch.Tensor
    scaling: str


@triton.jit
def scale_for(largest):
    """Return the scale with which a magnitude becomes the largest of e4m3; of zeros, the least that has an inverse."""
    return tl.maximum(largest * (1.0 / 448.0), 1.1754943508222875e-38)


@triton.jit
def load_tile(x, stride, num_rows, num_columns):
    """Return this program's tile in float32, zero outside of the matrix."""
    rows = tl.program_id(0) * _BLOCK + tl.arange(0, _BLOCK)
    columns = tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
    at = rows[:, None].to(tl.int64) * stride + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return tl.load(x + at, inside, other=0.0).to(tl.float32)


@triton.jit
def raise_scales(tile, scales, row_block, num_rows):
    """Raise the scales of rows to what a tile needs, in any order; floats above zero compare as their bits do."""
    rows = row_block * _BLOCK + tl.arange(0, _BLOCK)
    tl.atomic_max(scales + rows, scale_for(tl.max(tl.abs(tile), 1)).to(tl.int32, bitcast=True), rows < num_rows)


@triton.jit
def find_scales(x, stride, num_rows, num_columns, row_scales, column_scales, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Find the scales of whole rows, of whole columns or of both, int32 for the bits of float32, zero before."""
    tile = load_tile(x, stride, num_rows, num_columns)
    if ROWS:
        raise_scales(tile, row_scales, tl.program_id(0), num_rows)
    if COLUMNS:
        raise_scales(tl.trans(tile), column_scales, tl.program_id(1), num_columns)


@triton.jit
def write_tile(tile, values, scales, row_block, column_block, num_rows, num_columns, SCALING: tl.constexpr):
    """Quantise a tile, and write it with the scales that it needs (`lines`, `squares`), or by those there (`rows`)."""
    rows, columns = row_block * _BLOCK + tl.arange(0, _BLOCK), column_block * _BLOCK + tl.arange(0, _BLOCK)
    known = rows < num_rows
    if SCALING == "rows":
        scale = tl.load(scales + rows, known, other=1.0)
    elif SCALING == "lines":
        scale = scale_for(tl.max(tl.abs(tile), 1))
        tl.store(scales + column_block * num_rows + rows, scale, known)
    else:
        square = scale_for(tl.max(tl.max(tl.abs(tile), 1), 0))
        tl.store(scales + column_block * tl.cdiv(num_rows, _BLOCK) + row_block, square)
        scale = tl.full([_BLOCK], 1.0, tl.float32) * square
    padded = tl.cdiv(num_columns, _ALIGNMENT) * _ALIGNMENT
    at = rows[:, None].to(tl.int64) * padded + columns[None, :]
    # At most a rounding above the largest of e4m3, to which it is rounded. NaN stays, infinity becomes 0 * inf: NaN.
    quantised = (tile * (1.0 / scale)[:, None]).to(tl.float8e4nv)
    tl.store(values + at, quantised, known[:, None] & (columns < padded)[None, :])


@triton.jit
def quantise_tiles(  # noqa: PLR0913
    x,
    stride,
    num_rows,
    num_columns,
    row_values,
    row_scales,
    column_values,
    column_scales,
    SCALING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a tile as it is, transposed, or both: each scaled along what will be its rows."""
    tile, i, j = load_tile(x, stride, num_rows, num_columns), tl.program_id(0), tl.program_id(1)
    if ROWS:
        write_tile(tile, row_values, row_scales, i, j, num_rows, num_columns, SCALING)
    if COLUMNS:
        write_tile(tl.trans(tile), column_values, column_scales, j, i, num_columns, num_rows, SCALING)


@triton.jit
def multiply_blocks(  # noqa: PLR0913
    left,
    right,
    left_scales,
    right_scales,
    out,
    num_rows,
    num_columns,
    depth,
    SQUARES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write a tile of left [M, K] times right [N, K], transposed; `right` has scales of squares, or of lines."""
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    group, within = tl.program_id(0) // (_GROUP * tiles_n), tl.program_id(0) % (_GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * _GROUP, _GROUP)
    row, column = (group * _GROUP + within % height) * BLOCK_M, within // height * BLOCK_N
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    squares_n = tl.cdiv(num_columns, _BLOCK)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(tl.cdiv(depth, _BLOCK)):
        scale_m = tl.load(left_scales + block * num_rows + rows, rows < num_rows, other=0.0)
        if SQUARES:
            scale_m *= tl.load(right_scales + block * squares_n + column // _BLOCK)
        part = tl.dot(left.load([row, block * _BLOCK]), right.load([column, block * _BLOCK]).T) * scale_m[:, None]
        if not SQUARES:
            part *= tl.load(right_scales + block * num_columns + columns, columns < num_columns, other=0.0)[None, :]
        total += part
    at = rows[:, None].to(tl.int64) * num_columns + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), inside)


def quantise(
    x: torch.Tensor, scaling: str, *, rows: bool = True, columns: bool = False, config: Config | None = None
) -> tuple[Quantised, Quantised]:
    """Return a matrix in FP8, and its transpose; of what is not wanted, empty tensors.

    What is not finite becomes NaN, and makes the products that read it NaN.

    Args:
        x: [M, K], of any floating dtype.
        scaling: `rows`, `lines` or `squares`; see `Quantised`. The transpose is scaled along its own rows.
        rows: whether the matrix is wanted as it is.
        columns: whether its transpose is wanted.
        config: of `QUANTISE_CONFIGS`; None: what was measured.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    num_rows, num_columns = x.shape
    config = config or pick(
        "fp8_quantise", f"{scaling} rows={rows} columns={columns}", lambda: QUANTISE_CONFIGS, x.device
    )
    outputs = _empty(x, num_rows, num_columns, scaling, rows), _empty(x, num_columns, num_rows, scaling, columns)
    grid = (cdiv(num_rows, BLOCK), cdiv(num_columns, BLOCK))
    kept = {"ROWS": rows, "COLUMNS": columns, "num_warps": config.num_warps}
    matrix = (x, x.stride(0), num_rows, num_columns)
    if x.numel():
        if scaling == "rows":
            bits = (output.scales.view(torch.int32) for output in outputs)
            launch_kernel(find_scales, grid, *matrix, *bits, **kept)
        flat = (tensor for output in outputs for tensor in output[:2])
        launch_kernel(quantise_tiles, grid, *matrix, *flat, SCALING=scaling, **kept)
    return outputs


def _empty(x: torch.Tensor, num_rows: int, depth: int, scaling: str, wanted: bool) -> Quantised:
    blocks = cdiv(depth, BLOCK)
    shape = {"rows": (num_rows,), "lines": (blocks, num_rows), "squares": (blocks, cdiv(num_rows, BLOCK))}[scaling]
    padded = cdiv(depth, _ALIGNED) * _ALIGNED
    values = x.new_empty((num_rows, padded) if wanted else (0, 0), dtype=torch.float8_e4m3fn)
    make = x.new_zeros if scaling == "rows" else x.new_empty
    return Quantised(values, make(shape if wanted else (0,), dtype=torch.float32), scaling)


def multiply(left: Quantised, right: Quantised, dtype: torch.dtype, config: Config | None = None) -> torch.Tensor:
    """Return left [M, K] times right [N, K], transposed, in a dtype; sums are promoted to float32 every 128 values.

    Args:
        left: with scales of `rows`, or of `lines`.
        right: with scales of `rows`; or of `lines` or `squares`.
        dtype: bf16, fp16 or fp32.
        config: of `PRODUCT_CONFIGS`, where scales are not of `rows`; None: what was measured.
    """
    num_rows, num_columns, depth = len(left.values), len(right.values), left.values.shape[1]
    if 0 in (num_rows, num_columns, depth):
        return left.values.new_zeros(num_rows, num_columns, dtype=dtype)
    if left.scaling == "rows":
        return torch._scaled_mm(
            left.values,
            right.values.T,
            scale_a=left.scales[:, None],
            scale_b=right.scales[None, :],
            out_dtype=dtype,
            use_fast_accum=False,
        )
    out = left.values.new_empty(num_rows, num_columns, dtype=dtype)
    config = config or pick("fp8_multiply", f"{num_columns} x {depth}", lambda: PRODUCT_CONFIGS, out.device)
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    descriptors = (_describe(left.values, block_m), _describe(right.values, block_n))
    grid = (cdiv(num_rows, block_m) * cdiv(num_columns, block_n),)
    sizes = (num_rows, num_columns, depth)
    squares = right.scaling == "squares"
    launch_kernel(
        multiply_blocks, grid, *descriptors, left.scales, right.scales, out, *sizes, SQUARES=squares, **config.arguments
    )
    return out


def _describe(values: torch.Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(values, list(values.shape), list(values.stride()), [rows, BLOCK])


def launch_forward(x: torch.Tensor, weight: torch.Tensor, recipe: str) -> torch.Tensor:
    """Return x [..., K] times weight [N, K], transposed, in the dtype of `x`."""
    of_tokens, of_weights = RECIPES[recipe]
    tokens, _ = quantise(x.reshape(-1, x.shape[-1]), of_tokens)
    weights, _ = quantise(weight, of_weights)
    return multiply(tokens, weights, x.dtype).view(*x.shape[:-1], len(weight))


def launch_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, recipe: str, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and weight, each empty if not needed."""
    of_tokens, of_weights = RECIPES[recipe]
    by_x, by_weight = x.new_empty(0), weight.new_empty(0)
    rows, columns = quantise(grad.reshape(-1, grad.shape[-1]), of_tokens, rows=needs[0], columns=needs[1])
    if needs[0]:
        _, weights = quantise(weight, of_weights, rows=False, columns=True)
        by_x = multiply(rows, weights, x.dtype).view(x.shape)
    if needs[1]:
        _, tokens = quantise(x.reshape(-1, x.shape[-1]), of_tokens, rows=False, columns=True)
        by_weight = multiply(columns, tokens, weight.dtype)
    return by_x, by_weight


def _fake_backward(grad, x, weight, recipe, needs):
    by_x = x.new_empty(x.shape if needs[0] else 0)
    return by_x, weight.new_empty(weight.shape if needs[1] else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, ctx.recipe = inputs
    ctx.save_for_backward(x, weight)  # a quantised weight would outlive the one that sharding frees


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    gradients = _gradients(grad, *ctx.saved_tensors, ctx.recipe, needs)
    return *(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)), None


_gradients = operator(
    "fp8_linear_backward(Tensor grad, Tensor x, Tensor weight, str recipe, bool[] needs) -> (Tensor, Tensor)",
    launch_backward,
    _fake_backward,
)
_linear = operator(
    "fp8_linear(Tensor x, Tensor weight, str recipe) -> Tensor",
    launch_forward,
    lambda x, weight, recipe: x.new_empty(*x.shape[:-1], weight.shape[0]),
    backward=_backward,
    setup_context=_setup_context,
)


@register_flop_formula(torch.ops.shardwright.fp8_linear)
def _num_flops(x_shape: torch.Size, weight_shape: torch.Size, recipe: str, **kwargs: Any) -> int:
    return 2 * x_shape.numel() * weight_shape[0]


def linear(x: torch.Tensor, weight: torch.Tensor, recipe: str) -> torch.Tensor:
    """Return x [..., K] times weight [N, K], transposed, in the dtype of `x`; all products in FP8, sums in float32.

    Args:
        x: bf16, fp16 or fp32.
        weight: in the same dtype.
        recipe: a key of `RECIPES`.

    Raises:
        KernelError: with `rowwise`, a size of the weight is no multiple of 16, which the vendor's product asks for.
    """
    if recipe == "rowwise" and any(size % _ALIGNED for size in weight.shape):
        raise KernelError(
            f"kernels.linear=fp8_rowwise with a weight of shape {list(weight.shape)}: both sizes must be multiples of "
            f"{_ALIGNED}; pad the model's sizes, or use fp8_blockwise"
        )
    return _linear(x, weight, recipe)


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield (label, kernel, arguments, keyword arguments) of everything that a GPU would compile, if it has FP8."""
    target: Any = triton.runtime.driver.active.get_current_target()
    if target.arch < HOPPER:
        return
    x, values = torch.empty(256, 256, dtype=torch.bfloat16), torch.empty(256, 256, dtype=torch.float8_e4m3fn)
    matrix, scales = (x, 256, 256, 256), torch.empty(256)
    for config in QUANTISE_CONFIGS:
        for sides in ((True, False), (False, True), (True, True)):
            kept = {"ROWS": sides[0], "COLUMNS": sides[1], "num_warps": config.num_warps}
            label = f"rows={sides[0]} columns={sides[1]} warps={config.num_warps}"
            bits = scales.view(torch.int32)
            yield f"fp8 find_scales {label}", find_scales, (*matrix, bits, bits), kept
            for scaling in ("rows", "lines", "squares"):
                args = (*matrix, values, scales, values, scales)
                yield f"fp8 quantise {scaling} {label}", quantise_tiles, args, {"SCALING": scaling, **kept}
    for config in PRODUCT_CONFIGS:
        for squares in (True, False):
            blocks = tuple(config.blocks.values())
            args = (*(_describe(values, rows) for rows in blocks), scales, scales, x, 256, 256, 256)
            label = f"{'squares' if squares else 'lines'} {blocks[0]}x{blocks[1]} warps={config.num_warps}"
            kwargs = {"SQUARES": squares, **config.arguments}
            yield f"fp8 multiply {label} stages={config.num_stages}", multiply_blocks, args, kwargs
