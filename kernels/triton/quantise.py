"""Queries, keys and values of attention in FP8 (e4m3), with the rotary embedding on the way.

Queries and keys are turned by their angles, which gives what backward reads, and once more by a Hadamard matrix with
random signs. That leaves their products as they are, and spreads an outlier over its head, so that it costs the other
values less of their precision. Source: FlashAttention-3, arXiv 2407.08608, section 3.3.

All is written in tiles of 128 tokens of one document and head, padded with zeros, with one scale each. Values lie
transposed, as products in FP8 read them; their keys are in the order in which a thread of the tensor cores has the
weights of keys after one product and wants them for the next, see `key_of`.

Shapes: P packed tokens, H query heads, K key/value heads, D head size, M tiles.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from shardwright.kernels.op import KernelError
from shardwright.kernels.triton.attention_forward import Documents, read_tile
from shardwright.kernels.triton.config import Config, pick
from shardwright.kernels.triton.launch import cdiv, launch_kernel
from shardwright.kernels.triton.ptxas import HOPPER

TILE = 128  # tokens that have one scale
LARGEST = 448.0  # of e4m3
HEAD_SIZES = (64, 128)

# HEADS: of which one program quantises a tile, one after the other.
CONFIGS = tuple(
    Config(blocks={"HEADS": heads}, num_warps=warps, num_stages=1) for heads, warps in ((4, 8), (1, 8), (2, 8), (4, 16))
)

_TILE = tl.constexpr(TILE)
_LARGEST = tl.constexpr(LARGEST)
_NEGLIGIBLE = tl.constexpr(2.0**-64)  # a tile of such values is as good as zero; sums over tiles cannot overflow
# The first 128 binary digits of pi's fraction: a row of the Hadamard matrix is negated for each that is 1.
_SIGNS = tl.constexpr((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344))


class Quantised(NamedTuple):
    """What attention in FP8 reads; `values * scales` is what it stands for.

    Of queries and keys, that is after the Hadamard matrix, with columns in an order that both share.

    Attributes:
        q_values: e4m3 [M, H, TILE, D].
        k_values: e4m3 [M, K, TILE, D].
        v_values: e4m3 [M, K, D, TILE]; place s holds key `key_of(s)` of the tile.
        q_scales: float32 [H, M].
        k_scales: float32 [K, M].
        v_scales: float32 [K, M].
        firsts: int32 [P]; the first tile of a document, at the document's first token.
    """

    q_values: torch.Tensor
    k_values: torch.Tensor
    v_values: torch.Tensor
    q_scales: torch.Tensor
    k_scales: torch.Tensor
    v_scales: torch.Tensor
    firsts: torch.Tensor


def key_of(place: torch.Tensor) -> torch.Tensor:
    """Return which keys of a tile lie at places: of 16, the halves' pairs of two alternate."""
    return place // 16 * 16 + place // 2 % 2 * 8 + place % 16 // 4 * 2 + place % 2


@triton.jit
def _signed_rows(FIRST: tl.constexpr, HALF: tl.constexpr, dtype: tl.constexpr):
    """Return half of the rows and columns of the Hadamard matrix, some rows negated: [HALF, HALF] of 1 and -1."""
    row = tl.arange(0, HALF)
    place = FIRST + row
    word = tl.where(place < 64, tl.where(place < 32, _SIGNS[0], _SIGNS[1]), tl.where(place < 96, _SIGNS[2], _SIGNS[3]))
    odd = row[:, None] & row[None, :]
    odd = odd ^ (odd >> 4)
    odd = odd ^ (odd >> 2)
    odd = odd ^ (odd >> 1) ^ (word.to(tl.int32) >> (row % 32))[:, None]
    return (1 - 2 * (odd & 1)).to(dtype)


@triton.jit
def _quantise(x, values, at, scale_at, factor):
    """Write a tile where `at` says, and the scale, times a factor, that it needs. NaN stays, infinity becomes NaN."""
    largest = tl.max(tl.abs(x))
    scale = tl.where(largest > _NEGLIGIBLE, largest * (1.0 / _LARGEST), 1.0)
    tl.store(scale_at, scale * factor)
    tl.store(values + at, (x * (1.0 / scale)).to(values.dtype.element_ty))


@triton.jit
def _turn(low, high, turned, cos, sin, inside, HALF: tl.constexpr):
    """Turn halves of a tile by the angles, write them, and return them."""
    c, s = tl.load(cos, inside, other=0.0), tl.load(sin, inside, other=0.0)
    before, after = low.to(tl.float32), high.to(tl.float32)
    low, high = (before * c - after * s).to(low.dtype), (after * c + before * s).to(high.dtype)
    tl.store(turned, low, inside)
    tl.store(turned + HALF, high, inside)
    return low, high


@triton.jit
def _quantise_turned(  # noqa: PLR0913
    x, turned, values, scales, cos, sin, stride, heads, first, begin, tokens, tile, num_tiles,
    DIM: tl.constexpr, ROTATES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Turn and quantise a tile of queries or keys, of some heads.

    Halves of heads are what is turned, and what the matrix takes apart: [[H, H], [H, -H]], but for signs of rows.
    """
    HALF: tl.constexpr = DIM // 2
    hadamard_low = _signed_rows(0, HALF, x.dtype.element_ty)
    hadamard_high = _signed_rows(HALF, HALF, x.dtype.element_ty)
    row, column = tl.arange(0, _TILE)[:, None], tl.arange(0, HALF)[None, :]
    begin, inside = begin.to(tl.int64), row < tokens
    place = row * DIM + tl.arange(0, DIM)[None, :]
    x += begin * stride + row * stride + column
    if ROTATES:
        turned += begin * heads * DIM + row * (heads * DIM) + column
        cos += begin * DIM + row * DIM + column
        sin += begin * DIM + row * DIM + column
    low = tl.load(x + first * DIM, inside, other=0.0)
    high = tl.load(x + first * DIM + HALF, inside, other=0.0)
    if ROTATES:
        low, high = _turn(low, high, turned + first * DIM, cos, sin, inside, HALF)
    last = tl.minimum(first + HEADS, heads)
    for head in range(first, last):
        known = row < tl.where(last - head > 1, tokens, 0)
        next_low = tl.load(x + (head + 1) * DIM, known, other=0.0)
        next_high = tl.load(x + (head + 1) * DIM + HALF, known, other=0.0)
        a, b = tl.dot(low, hadamard_low), tl.dot(high, hadamard_high)
        mixed = tl.join(a + b, a - b).reshape(_TILE, HALF // 32, 4, 4, 4).permute(0, 1, 3, 2, 4).reshape(_TILE, DIM)
        to = values + (tile.to(tl.int64) * heads + head) * (_TILE * DIM)
        _quantise(mixed, to, place, scales + head * num_tiles + tile, DIM**-0.5)
        if ROTATES:
            low, high = _turn(next_low, next_high, turned + (head + 1) * DIM, cos, sin, known, HALF)
        else:
            low, high = next_low, next_high


@triton.jit
def _quantise_values(  # noqa: PLR0913
    v, values, scales, stride, heads, first, begin, tokens, tile, num_tiles, DIM: tl.constexpr, HEADS: tl.constexpr
):
    """Quantise and transpose a tile of values, of some heads."""
    key, column = tl.arange(0, _TILE), tl.arange(0, DIM)
    same = (key[:, None] == key[None, :]).to(v.dtype.element_ty)
    inside = key[:, None] < tokens
    group, lane = tl.arange(0, _TILE // 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    place = column[:, None, None] * _TILE + group * 16 + lane
    v += begin.to(tl.int64) * stride + key[:, None] * stride + column[None, :]
    x = tl.load(v + first * DIM, inside, other=0.0)
    last = tl.minimum(first + HEADS, heads)
    for head in range(first, last):
        known = key[:, None] < tl.where(last - head > 1, tokens, 0)
        following = tl.load(v + (head + 1) * DIM, known, other=0.0)
        turned = tl.dot(tl.trans(x), same)  # in the tensor cores, whose threads then have what `key_of` puts together
        turned = turned.reshape(DIM, _TILE // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(DIM, _TILE // 16, 16)
        to = values + (tile.to(tl.int64) * heads + head) * (_TILE * DIM)
        _quantise(turned, to, place, scales + head * num_tiles + tile, 1.0)
        x = following


@triton.jit(do_not_specialize=["heads", "kv_heads", "num_tiles"])
def quantise_tiles(  # noqa: PLR0913
    q,
    k,
    v,
    cos,
    sin,
    tiles,
    q_turned,
    k_turned,
    q_values,
    k_values,
    v_values,
    q_scales,
    k_scales,
    v_scales,
    firsts,
    q_stride,
    k_stride,
    v_stride,
    heads,
    kv_heads,
    num_tiles,
    DIM: tl.constexpr,
    ROTATES: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Quantise one tile of queries, keys or values, of HEADS heads."""
    tile, part = tl.program_id(1), tl.program_id(0)
    begin, start, end = read_tile(tiles, tile)
    if begin >= end:
        return
    if (part == 0) & (begin == start):
        tl.store(firsts + start, tile)
    q_parts, k_parts = tl.cdiv(heads, HEADS), tl.cdiv(kv_heads, HEADS)
    if part < q_parts:
        _quantise_turned(
            q, q_turned, q_values, q_scales, cos, sin, q_stride, heads, part * HEADS, begin, end - begin, tile,
            num_tiles, DIM, ROTATES, HEADS,
        )  # fmt: skip
    elif part < q_parts + k_parts:
        _quantise_turned(
            k, k_turned, k_values, k_scales, cos, sin, k_stride, kv_heads, (part - q_parts) * HEADS, begin,
            end - begin, tile, num_tiles, DIM, ROTATES, HEADS,
        )  # fmt: skip
    else:
        first = (part - q_parts - k_parts) * HEADS
        _quantise_values(
            v, v_values, v_scales, v_stride, kv_heads, first, begin, end - begin, tile, num_tiles, DIM, HEADS
        )  # fmt: skip


def quantise(
    q_PHD: torch.Tensor,
    k_PKD: torch.Tensor,
    v_PKD: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    documents: Documents,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Quantised]:
    """Return queries and keys, turned by their angles, and all three in FP8.

    Args:
        q_PHD: queries, not turned; heads of a token side by side, any stride between tokens, else they are copied.
        k_PKD: keys, likewise.
        v_PKD: values.
        angles: float32 cosines and sines [P, D], both halves alike, of which the first is read; None: queries and keys
            are turned already, and empty tensors take their place in what is returned.
        documents: where they lie.
        config: of `CONFIGS`; None: what was measured.

    Raises:
        KernelError: shapes or dtypes do not fit.
    """
    check(q_PHD, k_PKD, v_PKD, angles)
    dim = q_PHD.shape[2]
    config = config or pick("attention_quantise", f"head_dim={dim}", lambda: CONFIGS, q_PHD.device)
    q, k, v = (_readable(x) for x in (q_PHD, k_PKD, v_PKD))
    q_turned, k_turned = (x.new_empty(x.shape if angles else 0) for x in (q, k))
    tiles = documents.tiles(TILE)
    quantised = _empty(q, k, len(tiles))
    cos, sin = (x.contiguous() for x in angles) if angles else (None, None)
    heads, kv_heads, per_program = q.shape[1], k.shape[1], config.blocks["HEADS"]
    launch_kernel(
        quantise_tiles,
        (cdiv(heads, per_program) + 2 * cdiv(kv_heads, per_program), len(tiles)),
        *(q, k, v, cos, sin, tiles, q_turned, k_turned, *quantised),
        *(q.stride(0), k.stride(0), v.stride(0), heads, kv_heads, len(tiles)),
        DIM=dim,
        ROTATES=angles is not None,
        **config.arguments,
    )
    return q_turned, k_turned, quantised


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None) -> None:
    """Refuse queries, keys, values [..., heads, D] and angles [..., D] that do not fit, or are of no supported kind.

    Raises:
        KernelError: so they are.
    """
    dim, same = q.shape[-1], k.dtype == v.dtype == q.dtype
    if k.shape != v.shape or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != dim or q.shape[-2] % k.shape[-2]:
        raise KernelError(
            f"queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)}: keys and values must be alike, "
            f"and equal the queries but for the number of heads, which must divide theirs"
        )
    if dim not in HEAD_SIZES or not same or q.dtype not in (torch.bfloat16, torch.float16):
        raise KernelError(
            f"FP8 attention of {q.dtype}, {k.dtype} and {v.dtype} with head_dim={dim}: it takes bf16 or fp16, and head "
            f"sizes {' and '.join(map(str, HEAD_SIZES))}; use kernels.attention=auto"
        )
    wanted = (*q.shape[:-2], dim)
    for x in angles or ():
        if x.shape != wanted or x.dtype != torch.float32:
            raise KernelError(f"angles of {x.dtype} {list(x.shape)}: give cosines and sines in float32 {list(wanted)}")


def _readable(x_PHD: torch.Tensor) -> torch.Tensor:
    dim = x_PHD.shape[2]
    return x_PHD if x_PHD.stride(2) == 1 and x_PHD.stride(1) == dim else x_PHD.contiguous()


def _empty(q: torch.Tensor, k: torch.Tensor, tiles: int) -> Quantised:
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    shapes = (tiles, heads, TILE, dim), (tiles, kv_heads, TILE, dim), (tiles, kv_heads, dim, TILE)
    return Quantised(
        *(q.new_empty(shape, dtype=torch.float8_e4m3fn) for shape in shapes),
        *(q.new_empty((n, tiles), dtype=torch.float32) for n in (heads, kv_heads, kv_heads)),
        q.new_empty(tokens, dtype=torch.int32),
    )


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield (label, kernel, arguments, keyword arguments) of everything that a GPU would compile, if it has FP8."""
    target: Any = triton.runtime.driver.active.get_current_target()
    if target.arch < HOPPER:
        return
    for dim in HEAD_SIZES:
        for config in CONFIGS:
            yield _compilation(config, torch.bfloat16, dim, True)
        yield _compilation(CONFIGS[0], torch.float16, dim, True)
        yield _compilation(CONFIGS[0], torch.bfloat16, dim, False)


def _compilation(config: Config, dtype: torch.dtype, dim: int, rotates: bool):
    q, angles = torch.empty((256, 4, dim), dtype=dtype), torch.empty((256, dim)) if rotates else None
    tiles = torch.empty((16, 3), dtype=torch.int32)
    args = (q, q, q, angles, angles, tiles, q, q, *_empty(q, q, 16), *[4 * dim] * 3, 4, 4, 16)
    label = f"attention quantise {str(dtype)[6:]} head_dim={dim} {'' if rotates else 'turned '}"
    label += f"HEADS={config.blocks['HEADS']} warps={config.num_warps}"
    return label, quantise_tiles, args, {"DIM": dim, "ROTATES": rotates, **config.arguments}
