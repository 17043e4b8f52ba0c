"""Rotary position embedding, in the half-split form of the Llama family, of queries and keys at once.

Backward is the same kernel with the angle negated.

Shapes: B sequences, T tokens, H heads (of queries; K of keys), D head size.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from shardwright.kernels.op import KernelError
from shardwright.kernels.triton.config import Config, pick
from shardwright.kernels.triton.launch import cdiv, launch_kernel, next_power_of_2
from shardwright.kernels.triton.operator import empty_dense, operator

# PAIRS: elements of the first half of the heads that a program turns.
CONFIGS = tuple(
    Config(blocks={"PAIRS": pairs}, num_warps=warps) for pairs, warps in ((2048, 4), (1024, 4), (4096, 8), (4096, 4))
)


@triton.jit
def turn(  # noqa: PLR0913
    x,
    out,
    cos,
    sin,
    block,
    tokens,
    all_tokens,
    stride_b,
    stride_t,
    stride_h,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Turn block `block` of TOKENS tokens times HEADS heads; WIDTH is HALF rounded up to a power of two."""
    head_blocks: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    token = (block // head_blocks) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    head = (block % head_blocks) * HEADS + tl.arange(0, HEADS)[None, :, None]
    pair = tl.arange(0, WIDTH)[None, None, :]
    known = (token < all_tokens) & (pair < HALF)
    angle = token.to(tl.int64) * (2 * HALF) + pair
    c = tl.load(cos + angle, known, other=0.0)
    s = tl.load(sin + angle, known, other=0.0)
    if INVERSE:
        s = -s
    inside = known & (head < NUM_HEADS)
    at = (token // tokens).to(tl.int64) * stride_b + (token % tokens).to(tl.int64) * stride_t
    at = at + head.to(tl.int64) * stride_h + pair
    low = tl.load(x + at, inside, other=0.0).to(tl.float32)
    high = tl.load(x + at + HALF, inside, other=0.0).to(tl.float32)
    out_at = (token.to(tl.int64) * NUM_HEADS + head) * (2 * HALF) + pair
    tl.store(out + out_at, (low * c - high * s).to(out.dtype.element_ty), inside)
    tl.store(out + out_at + HALF, (high * c + low * s).to(out.dtype.element_ty), inside)


@triton.jit
def turn_pair(  # noqa: PLR0913
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    tokens,
    all_tokens,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    q_blocks,
    Q_NUM_HEADS: tl.constexpr,
    K_NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    Q_TOKENS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_TOKENS: tl.constexpr,
    K_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Turn q in the first `q_blocks` programs and k in the others."""
    block = tl.program_id(0)
    if block < q_blocks:
        turn(
            q, q_out, cos, sin, block, tokens, all_tokens, q_stride_b, q_stride_t, q_stride_h,
            Q_NUM_HEADS, HALF, INVERSE, Q_TOKENS, Q_HEADS, WIDTH,
        )  # fmt: skip
    else:
        turn(
            k, k_out, cos, sin, block - q_blocks, tokens, all_tokens, k_stride_b, k_stride_t, k_stride_h,
            K_NUM_HEADS, HALF, INVERSE, K_TOKENS, K_HEADS, WIDTH,
        )  # fmt: skip


def _tile(num_heads: int, width: int, pairs: int) -> tuple[int, int]:
    """Return how many tokens and heads a program turns: all the heads if they fit, and tokens to fill up."""
    heads = min(next_power_of_2(num_heads), max(1, pairs // width))
    return max(1, pairs // (width * heads)), heads


@cache
def _constants(config: Config, head_dim: int, q_heads: int, k_heads: int, inverse: bool) -> dict[str, int | bool]:
    """Return the keyword arguments of a launch."""
    width = next_power_of_2(head_dim // 2)
    (q_tokens, q_tile), (k_tokens, k_tile) = (_tile(n, width, config.blocks["PAIRS"]) for n in (q_heads, k_heads))
    return {
        "Q_NUM_HEADS": q_heads,
        "K_NUM_HEADS": k_heads,
        "HALF": head_dim // 2,
        "INVERSE": inverse,
        "Q_TOKENS": q_tokens,
        "Q_HEADS": q_tile,
        "K_TOKENS": k_tokens,
        "K_HEADS": k_tile,
        "WIDTH": width,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _blocks(all_tokens: int, num_heads: int, tokens: int, heads: int) -> int:
    return cdiv(all_tokens, tokens) * cdiv(num_heads, heads)


def launch(
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    cos_BTD: torch.Tensor,
    sin_BTD: torch.Tensor,
    inverse: bool,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q and k turned by the angle, or by its negative."""
    _check(q_BTHD, k_BTKD, cos_BTD, sin_BTD)
    batch, tokens, q_heads, head_dim = q_BTHD.shape
    q, k, k_heads = _heads_dense(q_BTHD), _heads_dense(k_BTKD), k_BTKD.shape[2]
    q_out, k_out = empty_dense(q_BTHD), empty_dense(k_BTKD)
    config = config or pick("rope", f"head_dim={head_dim}", lambda: CONFIGS, q.device)
    constants = _constants(config, head_dim, q_heads, k_heads, inverse)
    q_blocks = _blocks(batch * tokens, q_heads, constants["Q_TOKENS"], constants["Q_HEADS"])
    k_blocks = _blocks(batch * tokens, k_heads, constants["K_TOKENS"], constants["K_HEADS"])
    launch_kernel(
        turn_pair,
        (q_blocks + k_blocks,),
        q,
        k,
        q_out,
        k_out,
        cos_BTD if cos_BTD.is_contiguous() else cos_BTD.contiguous(),
        sin_BTD if sin_BTD.is_contiguous() else sin_BTD.contiguous(),
        tokens,
        batch * tokens,
        *q.stride()[:3],
        *k.stride()[:3],
        q_blocks,
        **constants,
    )
    return q_out, k_out


def _check(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    batch, tokens, _, head_dim = q.shape
    wanted = (batch, tokens, head_dim)
    if cos.shape != wanted or sin.shape != wanted or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise KernelError(
            f"rope of {list(q.shape)}: cosines are {cos.dtype} {list(cos.shape)}, sines {sin.dtype} {list(sin.shape)}; "
            f"give both in float32 {list(wanted)}"
        )
    if head_dim % 2:
        raise KernelError(f"rope of head size {head_dim}: halves are turned; use an even head size")
    if (k.shape[0], k.shape[1], k.shape[3]) != wanted:
        raise KernelError(f"rope of q {list(q.shape)} and k {list(k.shape)}: only the number of heads may differ")


def _heads_dense(x_BTHD: torch.Tensor) -> torch.Tensor:
    return x_BTHD if x_BTHD.stride(3) == 1 else x_BTHD.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *_, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *rotate(grad_q, grad_k, *ctx.saved_tensors, not ctx.inverse), None, None, None


rotate = operator(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)",
    launch,
    lambda q, k, cos, sin, inverse: (empty_dense(q), empty_dense(k)),
    backward=_backward,
    setup_context=_setup_context,
)


def rope(
    q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return new tensors with the pairs (i, i + D / 2) of every head turned by the angle of the token's position.

    Args:
        q_BTHD: queries; a view whose last dim is contiguous is read in place.
        k_BTKD: keys, likewise.
        cos_BTD: float32 cosines, both halves alike, of which the first is read; not differentiated.
        sin_BTD: float32 sines, likewise.

    Raises:
        KernelError: shapes or dtypes do not fit, or the head size is odd.

    Source: arXiv 2104.09864.
    """
    return rotate(q_BTHD, k_BTKD, cos_BTD, sin_BTD, False)


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield (label, kernel, arguments, keyword arguments) of everything that a GPU would compile."""
    for config in CONFIGS:
        yield _compilation(config, torch.bfloat16, 128, False)
    for head_dim in (64, 96, 128, 256):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield _compilation(CONFIGS[0], dtype, head_dim, True)


def _compilation(config: Config, dtype: torch.dtype, head_dim: int, inverse: bool):
    q, k = (torch.empty(1, 16, heads, head_dim, dtype=dtype) for heads in (32, 8))
    angles = torch.empty(1, 16, head_dim)
    args = (q, k, q, k, angles, angles, 16, 16, *q.stride()[:3], *k.stride()[:3], 16)
    name = str(dtype).removeprefix("torch.") + (" inverse" if inverse else "")
    label = f"rope {name} head_dim={head_dim} PAIRS={config.blocks['PAIRS']} warps={config.num_warps}"
    return label, turn_pair, args, _constants(config, head_dim, 32, 8, inverse)
