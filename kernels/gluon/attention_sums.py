"""What comes before and after the backward of attention in Gluon: rows and sums that queries need, padded to tiles.

A first kernel writes two numbers of every query, block by block: the log-sum-exp, infinite after the end of a document,
where all weights become zero; and the delta that is taken from the gradients of weights. It also clears the sums in
float32, which a last kernel converts. Sums lie as the threads that add to them have them.

Shapes: P packed tokens, H query heads, D head size, M tiles.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# (Triton's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from shardwright.kernels.triton.attention_forward import LOG2E, load_tile, read_tile, store_tile
from shardwright.kernels.triton.launch import launch_kernel

TILE = gl.constexpr(128)  # tokens
SIDE = gl.constexpr(64)  # rows and columns that a warpgroup adds at a time


def prepare(
    outputs: tuple[torch.Tensor, torch.Tensor],
    gradients: tuple[torch.Tensor, torch.Tensor | None],
    tiles: torch.Tensor,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return float32 [H * M * TILE * 2], for each block -log2(e) * lse, then -delta; sums [H * M * TILE, D]; int32 0.

    Args:
        outputs: of the forward: attended values [P, H, D], log-sum-exp [H, P].
        gradients: of the outputs; None for a log-sum-exp that nobody used.
        tiles: of TILE tokens, of all documents in their order.
        block: queries of a block.
    """
    (out, lse), (dout, dlse) = outputs, gradients
    tokens, heads, dim = out.shape
    padded = heads * len(tiles) * TILE.value
    rows = torch.empty(padded * 2, dtype=torch.float32, device=out.device)
    sums = torch.empty((padded, dim), dtype=torch.float32, device=out.device)
    counter = torch.empty(1, dtype=torch.int32, device=out.device)
    dlse = None if dlse is None else dlse.contiguous()
    strides = (out.stride(0), dout.stride(0))
    launch_kernel(
        _prepare_kernel,
        (len(tiles) * heads,),
        *(out, dout, lse.contiguous(), dlse, tiles, rows, sums, counter, *strides, tokens, heads),
        DIM=dim,
        BLOCK_M=block,
        TILE=TILE.value,
        num_warps=8,
    )
    return rows, sums, counter


def convert(sums: torch.Tensor, tiles: torch.Tensor, dq: torch.Tensor, scale: float) -> torch.Tensor:
    """Write scaled sums to the gradients of queries [P, H, D], and return these.

    Args:
        sums: as `prepare` made them.
        tiles: likewise.
        dq: to be written, contiguous.
        scale: of the sums.
    """
    _, heads, dim = dq.shape
    launch_kernel(
        _convert_kernel,
        (len(tiles) * heads,),
        *(sums, dq, tiles, heads, scale),
        DIM=dim,
        TILE=TILE.value,
        num_warps=8,
    )
    return dq


@gluon.jit
def add_to_sums(pointer, values):
    """Add values [64, 64] to memory in the order in which threads have them: four numbers of a thread, all threads."""
    LAYOUT: gl.constexpr = values.type.layout
    row = gl.expand_dims(gl.arange(0, SIDE, layout=gl.SliceLayout(1, LAYOUT)), 1)
    column = gl.expand_dims(gl.arange(0, SIDE, layout=gl.SliceLayout(0, LAYOUT)), 0)
    spot = column // 8 * 512 + row // 16 * 128 + row % 8 * 16 + column % 8 // 2 * 4
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v4.f32 [$8], {$4, $5, $6, $7};"
        "mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;",
        "=r,=r,=r,=r,f,f,f,f,l,l,l,l",
        [values, pointer.to(gl.int64) + (spot * 4).to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )


@triton.jit
def _prepare_kernel(  # noqa: PLR0913
    out,
    dout,
    lse,
    dlse,
    tiles,
    rows,
    sums,
    counter,
    out_stride,
    dout_stride,
    tokens,
    heads,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write what a tile of queries of one head needs, in blocks, and clear its sums; the first one, the counter."""
    if tl.program_id(0) == 0:
        tl.store(counter, 0)
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    begin, _, end = read_tile(tiles, tile)
    if begin >= end:
        return
    out_tile = load_tile(out + head * DIM, begin, end, out_stride, TILE, DIM, DIM, True)
    dout_tile = load_tile(dout + head * DIM, begin, end, dout_stride, TILE, DIM, DIM, True)
    lanes = tl.arange(0, TILE)
    inside = begin + lanes < end
    at = tl.cast(head, tl.int64) * tokens + begin + lanes
    delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse is not None:
        delta -= tl.load(dlse + at, mask=inside, other=0.0)
    padded = (tl.cast(head, tl.int64) * (tl.num_programs(0) // heads) + tile) * TILE
    row = rows + padded * 2 + lanes // BLOCK_M * (2 * BLOCK_M) + lanes % BLOCK_M
    tl.store(row, -LOG2E * tl.load(lse + at, mask=inside, other=float("inf")))
    tl.store(row + BLOCK_M, -delta)
    spot = lanes[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(sums + padded * DIM + spot, tl.zeros([TILE, DIM], tl.float32))


@triton.jit
def _convert_kernel(sums, dq, tiles, heads, scale, DIM: tl.constexpr, TILE: tl.constexpr):
    """Convert the sums of one tile of queries of one head."""
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    begin, _, end = read_tile(tiles, tile)
    if begin >= end:
        return
    padded = (tl.cast(head, tl.int64) * (tl.num_programs(0) // heads) + tile) * TILE
    total = tl.load(sums + padded * DIM + tl.arange(0, TILE * DIM))
    # 64 rows, 64 columns, 8 columns, warp, row of 8, pair of columns, upper or lower 8 rows, column
    total = total.reshape(TILE // 64, DIM // 64, 8, 4, 8, 4, 2, 2).permute(0, 3, 6, 4, 1, 2, 5, 7)
    store_tile(dq + head * DIM, total.reshape(TILE, DIM) * scale, begin, end, heads * DIM, TILE, DIM, DIM)


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield label, kernel, arguments and keyword arguments of everything that a compiler should be tried on."""
    tiles = torch.empty((16, 3), dtype=torch.int32)
    for dim, block in ((64, 128), (128, 64)):
        x, row = torch.empty((256, 4, dim), dtype=torch.bfloat16), torch.empty(4 * 256)
        args = (x, x, row, row, tiles, row, row, tiles, 4 * dim, 4 * dim, 256, 4)
        constants = {"DIM": dim, "BLOCK_M": block, "TILE": TILE.value, "num_warps": 8}
        yield f"gluon attention backward prepare head_dim={dim}", _prepare_kernel, args, constants
        constants = {"DIM": dim, "TILE": TILE.value, "num_warps": 8}
        yield f"gluon attention backward convert head_dim={dim}", _convert_kernel, (row, x, tiles, 4, 0.1), constants
