"""What comes before and after the backward of attention in Gluon: rows and sums that queries need, padded to tiles.

A first kernel writes two numbers of every query, block by block: the log-sum-exp, infinite after the end of a document,
where all weights become zero; and the delta that is taken from the gradients of weights. It also clears the sums in
float32 of the heads that come first; those of the others are cleared by programs that are about to work on the heads
before them, shortly before they are added to, so that they are still in the cache. A last kernel converts the sums.
These lie as the threads that add to them have them. All kernels are launched at once (programmatic dependent launch):
the last one takes over processors on which the one that adds has nothing left to do.

Shapes: P packed tokens, H query heads, D head size, M tiles.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false
# (Triton's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shardwright.kernels.gluon.hopper import VARIANTS
from shardwright.kernels.triton.attention_forward import LOG2E, Scores, load_tile, read_tile, store_tile
from shardwright.kernels.triton.launch import launch_kernel

TILE = gl.constexpr(128)  # tokens
STATES = gl.constexpr(1)  # where in the counters the states of all tiles begin, by head of keys
CLEARED, ADDED = gl.constexpr(1), gl.constexpr(2)  # states: the queries' sums are zero; all that the keys give is added
SIDE = gl.constexpr(64)  # rows and columns that a warpgroup adds at a time


def prepare(
    outputs: tuple[torch.Tensor, torch.Tensor],
    gradients: tuple[torch.Tensor, torch.Tensor | None],
    tiles: torch.Tensor,
    block: int,
    together: int,
    group: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the kernel that adds to the sums begins with.

    Args:
        outputs: of the forward: attended values [P, H, D], log-sum-exp [H, P].
        gradients: of the outputs; None for a log-sum-exp that nobody used.
        tiles: of TILE tokens, of all documents in their order.
        block: queries of a block.
        together: heads of queries whose tiles are done together.
        group: heads of queries for each of keys.

    Returns:
        Of each block of queries -log2(e) * lse, then -delta, float32 [H * M * TILE * 2]; the sums, float32 [H * M *
        TILE, D], zeros for the first heads; int32 [STATES + H / group * M], how many units are taken, 0, and states.
    """
    (out, lse), (dout, dlse) = outputs, gradients
    tokens, heads, dim = out.shape
    padded = heads * len(tiles) * TILE.value
    rows = torch.empty(padded * 2, dtype=torch.float32, device=out.device)
    sums = torch.empty((padded, dim), dtype=torch.float32, device=out.device)
    counters = torch.empty(STATES.value + heads // group * len(tiles), dtype=torch.int32, device=out.device)
    dlse = None if dlse is None else dlse.contiguous()
    strides = (out.stride(0), dout.stride(0))
    launch_kernel(
        _prepare_kernel,
        (len(tiles) * heads,),
        *(out, dout, lse.contiguous(), dlse, tiles, rows, sums, counters, *strides, tokens, heads, together, group),
        DIM=dim,
        BLOCK_M=block,
        TILE=TILE.value,
        num_warps=8,
        launch_pdl=True,
    )
    return rows, sums, counters


def convert(
    prepared: tuple[torch.Tensor, torch.Tensor],
    tiles: torch.Tensor,
    dq: torch.Tensor,
    together: int,
    group: int,
    scores: Scores,
) -> None:
    """Write scaled sums to the gradients of queries.

    This begins before the kernel that adds to them ends: where processors have no more units, with finished tiles.

    Args:
        prepared: sums and counters of `prepare`, to which the kernel launched just before this adds.
        tiles: likewise.
        dq: to be written, contiguous [P, H, D].
        together: heads of queries whose tiles are done together.
        group: heads of queries for each of keys.
        scores: as in the forward.
    """
    (sums, counters), (_, heads, dim) = prepared, dq.shape
    launch_kernel(
        _convert_kernel,
        (len(tiles) * heads,),
        *(sums, dq, tiles, counters, heads, together, group, scores.window or 0, scores.scale),
        **_convert_options(dim, scores),
    )


def _convert_options(dim: int, scores: Scores) -> dict[str, Any]:
    return {
        "DIM": dim,
        "CAUSAL": scores.causal,
        "WINDOWED": scores.window is not None,
        "TILE": TILE.value,
        "num_warps": 8,
        "launch_pdl": True,
    }


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


@gluon.jit
def clear_sums(pointer, SIZE: gl.constexpr):
    """Zero so many numbers in memory, by one warp."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    spot = gl.arange(0, 512, LAYOUT)
    for at in range(0, SIZE, 512):
        gl.store(pointer + (at + spot), gl.zeros([512], gl.float32, LAYOUT))


@gluon.jit
def raise_state(state):
    """Raise the state of a tile by one, by one warp, after all that its threads have written."""
    gl.inline_asm_elementwise(
        "fence.acq_rel.gpu; bar.warp.sync 0xffffffff; mov.b32 $0, $1;",
        "=r,r",
        [gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    gl.atomic_add(state, 1, sem="release")


@gluon.jit
def await_cleared(states, first, last):
    """Wait, as one warp, until the sums of tiles from the first to the last are zero."""
    lanes = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    for at in range(first, last + 1, 32):
        missing = 1
        while missing > 0:
            state = gl.inline_asm_elementwise(
                "ld.acquire.gpu.global.u32 $0, [$1];",
                "=r,l",
                [(states + gl.minimum(at + lanes, last)).to(gl.int64)],
                dtype=gl.int32,
                is_pure=False,
                pack=1,
            )
            missing = gl.max(CLEARED - state, 0)


@triton.jit(do_not_specialize=["heads", "together", "group"])
def _prepare_kernel(  # noqa: PLR0913
    out,
    dout,
    lse,
    dlse,
    tiles,
    rows,
    sums,
    counters,
    out_stride,
    dout_stride,
    tokens,
    heads,
    together,
    group,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write what a tile of queries of one head needs, in blocks, and its state; of the first heads, clear its sums."""
    gdc_wait()
    gdc_launch_dependents()
    if tl.program_id(0) == 0:
        tl.store(counters, 0)
    num_tiles = tl.num_programs(0) // heads
    head, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    tl.store(counters + STATES + head // group * num_tiles + tile, tl.where(head < together, CLEARED, 0))
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
    padded = (tl.cast(head, tl.int64) * num_tiles + tile) * TILE
    row = rows + padded * 2 + lanes // BLOCK_M * (2 * BLOCK_M) + lanes % BLOCK_M
    tl.store(row, -LOG2E * tl.load(lse + at, mask=inside, other=float("inf")))
    tl.store(row + BLOCK_M, -delta)
    if head < together:
        spot = lanes[:, None] * DIM + tl.arange(0, DIM)[None, :]
        tl.store(sums + padded * DIM + spot, tl.zeros([TILE, DIM], tl.float32))


@triton.jit
def _await_added(states, first, last):
    """Wait until all that keys from the first tile to the last give is added."""
    lanes = tl.arange(0, 128)
    for at in range(first, last + 1, 128):
        missing = 1
        while missing > 0:
            state = tl.inline_asm_elementwise(
                "ld.relaxed.gpu.global.u32 $0, [$1];",
                "=r,l",
                [(states + tl.minimum(at + lanes, last)).to(tl.int64)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
            missing = tl.max(ADDED - state, 0)
            if missing > 0:
                tl.inline_asm_elementwise(
                    "nanosleep.u32 $1; mov.u32 $0, 0;", "=r,r", [1000 + lanes], dtype=tl.int32, is_pure=False, pack=1
                )
    tl.inline_asm_elementwise(
        "fence.acq_rel.gpu; mov.b32 $0, $1;", "=r,r", [lanes], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["heads", "together", "group", "window"])
def _convert_kernel(  # noqa: PLR0913
    sums,
    dq,
    tiles,
    counters,
    heads,
    together,
    group,
    window,
    scale,
    DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Convert the sums of one tile of queries of one head; programs go by tiles as those did which add to them."""
    num_tiles = tl.num_programs(0) // heads
    number, chunk = tl.program_id(0), num_tiles * together
    tile, head = number % chunk // together, number // chunk * together + number % together
    begin, start, end = read_tile(tiles, tile)
    if begin < end:
        first = tile - (begin - start) // TILE
        last = tile
        if not CAUSAL:
            last = first + tl.cdiv(end - start, TILE) - 1
        if WINDOWED:
            first = tl.maximum(first, last - (window + TILE - 2) // TILE)
        _await_added(counters + STATES + head // group * num_tiles, first, last)
        padded = tl.cast(head * num_tiles + tile, tl.int64) * TILE
        total = tl.load(sums + padded * DIM + tl.arange(0, TILE * DIM), cache_modifier=".cg")
        # 64 rows, 64 columns, 8 columns, warp, row of 8, pair of columns, upper or lower 8 rows, column
        total = total.reshape(TILE // 64, DIM // 64, 8, 4, 8, 4, 2, 2).permute(0, 3, 6, 4, 1, 2, 5, 7)
        store_tile(dq + head * DIM, total.reshape(TILE, DIM) * scale, begin, end, heads * DIM, TILE, DIM, DIM)
    gdc_wait()  # so that what comes after this kernel comes after the one before it too


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield label, kernel, arguments and keyword arguments of everything that a compiler should be tried on."""
    tiles = torch.empty((16, 3), dtype=torch.int32)
    for dim, block in ((64, 128), (128, 64)):
        x, row = torch.empty((256, 4, dim), dtype=torch.bfloat16), torch.empty(4 * 256)
        args = (x, x, row, row, tiles, row, row, tiles, 4 * dim, 4 * dim, 256, 4, 2, 2)
        constants = {"DIM": dim, "BLOCK_M": block, "TILE": TILE.value, "num_warps": 8, "launch_pdl": True}
        yield f"gluon attention backward prepare head_dim={dim}", _prepare_kernel, args, constants
        for name, scores, dtype in VARIANTS:
            if dtype == x.dtype:
                label = f"gluon attention backward convert {name} head_dim={dim}"
                args = (row, x, tiles, tiles, 4, 2, 2, 100, 0.1)
                yield label, _convert_kernel, args, _convert_options(dim, scores)
