"""AdamW, LAMB and the gradient's square sum over flat float32 shards, everything that varies read from device scalars.

A step that is not to be applied changes nothing, decided on the device. All sums are made in a fixed order.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from shardwright.kernels.optimizer import Hyper, Now, Part, SumSquares
from shardwright.kernels.triton.config import Config, pick
from shardwright.kernels.triton.launch import cdiv, launch_kernel
from shardwright.kernels.triton.operator import operator

CONFIGS = tuple(
    Config(blocks={"BLOCK": block}, num_warps=warps)
    for block, warps in ((1024, 8), (512, 4), (1024, 4), (2048, 8), (2048, 16))
)
SUM_CONFIGS = tuple(Config(blocks={"BLOCK": block}, num_warps=warps) for block, warps in ((4096, 8), (2048, 4)))

_ALIGNMENT = 16  # elements, of which a thread then takes several at once
_MAX_PARTIALS = 1024  # of one tensor's square sum
_SEGMENT_BLOCK = 1024  # partial sums that are added up at once


@dataclass(frozen=True, kw_only=True)
class Scalars:
    """What changes from step to step: tensors without dims on the device, so that a CUDA graph can be replayed.

    Attributes:
        lr: float32 learning rate.
        step: float32 number of this update, 1 for the first.
        multiplier: float32 that the gradient is multiplied by; if it is not finite, nothing changes.
        skip: bool; where true, nothing changes.
    """

    lr: torch.Tensor
    step: torch.Tensor
    multiplier: torch.Tensor
    skip: torch.Tensor

    @property
    def arguments(self) -> list[torch.Tensor]:
        """In the order of the kernels."""
        return [self.lr, self.step, self.multiplier, self.skip]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Flat parameters and their moments, contiguous, [n] each, updated in place.

    Attributes:
        param: float32.
        exp_avg: float32 mean of the gradient.
        exp_avg_sq: float32 mean of its square.
        copy: gets the new parameters in its own dtype, such as bf16; None: there is none.
    """

    param: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    copy: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """In the order of the kernels."""
        return [self.param, self.exp_avg, self.exp_avg_sq, *(() if self.copy is None else (self.copy,))]


class Segments:
    """Where the tensors lie in a flat shard, cut into tiles of one program each, none of which crosses a border.

    Args:
        offsets: first element of each tensor, and the length of the shard. Kernels are faster on multiples of 16.
        device: of the shard.
        config: of the kernels, which tiles are cut for.
    """

    def __init__(self, offsets: Sequence[int], device: torch.device, config: Config | None = None) -> None:
        self.config = config or pick("lamb", f"log2={offsets[-1].bit_length()}", lambda: CONFIGS, device)
        sizes = torch.tensor(offsets, dtype=torch.int64).diff()
        tiles = -(-sizes // self.config.blocks["BLOCK"])
        self.offsets = torch.tensor(offsets, dtype=torch.int64, device=device)
        self.first_tiles = torch.tensor([0, *tiles.cumsum(0).tolist()], dtype=torch.int32, device=device)
        self.of_tile = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(tiles).to(device)
        self._aligned = all(offset % _ALIGNMENT == 0 for offset in offsets)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """In the order of the kernels."""
        return [self.offsets, self.first_tiles, self.of_tile]

    @property
    def launch(self) -> list[int]:
        """Elements and warps of a tile, and whether all borders are aligned."""
        return [self.config.blocks["BLOCK"], self.config.num_warps, self._aligned]


@triton.jit
def _applies(multiplier, skip):
    factor = tl.load(multiplier)
    return (tl.abs(factor) < float("inf")) & (tl.load(skip) == 0)


@triton.jit
def _advance(exp_avg, exp_avg_sq, grad, at, inside, multiplier, take1, take2):
    """Update both moments in place and return them."""
    g = tl.load(grad + at, inside, other=0.0).to(tl.float32) * tl.load(multiplier)
    m = tl.load(exp_avg + at, inside, other=0.0)
    v = tl.load(exp_avg_sq + at, inside, other=0.0)
    # A step towards the new value: a factor 1 - take, rounded to float32, would shift the mean of many steps.
    m += take1 * (g - m)
    v += take2 * (g * g - v)
    tl.store(exp_avg + at, m, inside)
    tl.store(exp_avg_sq + at, v, inside)
    return m, v


@triton.jit
def _one_minus_exp(x):
    """Return 1 - exp(x) for x < 0, near 0 by its series, where the difference would lose digits."""
    series = 1.0
    for k in tl.static_range(7):
        series = 1.0 + x / (8 - k) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _direction(m, v, step, log_beta1, log_beta2, eps):
    """Return m / (sqrt(v) + eps), both moments freed from their bias towards 0."""
    bias1 = _one_minus_exp(tl.load(step) * log_beta1)
    bias2 = _one_minus_exp(tl.load(step) * log_beta2)
    return tl.div_rn(m, bias1 * (tl.div_rn(tl.sqrt_rn(v), tl.sqrt_rn(bias2)) + eps))


@triton.jit
def _store(param, copy, at, inside, p):
    tl.store(param + at, p, inside)
    if copy is not None:
        tl.store(copy + at, p.to(copy.dtype.element_ty), inside)


@triton.jit
def adamw(  # noqa: PLR0913
    param,
    exp_avg,
    exp_avg_sq,
    copy,
    grad,
    lr,
    step,
    multiplier,
    skip,
    take1,
    log_beta1,
    take2,
    log_beta2,
    eps,
    decay,
    length,
    BLOCK: tl.constexpr,
):
    """One block of a flat shard."""
    if _applies(multiplier, skip):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < length
        m, v = _advance(exp_avg, exp_avg_sq, grad, at, inside, multiplier, take1, take2)
        p = tl.load(param + at, inside, other=0.0)
        rate = tl.load(lr)
        p -= rate * (_direction(m, v, step, log_beta1, log_beta2, eps) + decay * p)
        _store(param, copy, at, inside, p)


@triton.jit
def _tile(offsets, first_tiles, of_tile, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Return this program's segment, its elements, and which of them are in the segment."""
    tile = tl.program_id(0)
    segment = tl.load(of_tile + tile)
    begin = tl.load(offsets + segment) + (tile - tl.load(first_tiles + segment)).to(tl.int64) * BLOCK
    end = tl.load(offsets + segment + 1)
    if ALIGNED:
        begin = tl.multiple_of(begin, 16)
        end = tl.multiple_of(end, 16)
    at = begin + tl.arange(0, BLOCK)
    return segment, at, at < end


@triton.jit
def lamb_moments(  # noqa: PLR0913
    param,
    exp_avg,
    exp_avg_sq,
    grad,
    offsets,
    first_tiles,
    of_tile,
    partials,
    step,
    multiplier,
    skip,
    take1,
    log_beta1,
    take2,
    log_beta2,
    eps,
    decay,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One tile: its moments, and its share of the square norms of parameters and update [2, tiles]."""
    if _applies(multiplier, skip):
        _, at, inside = _tile(offsets, first_tiles, of_tile, BLOCK, ALIGNED)
        m, v = _advance(exp_avg, exp_avg_sq, grad, at, inside, multiplier, take1, take2)
        p = tl.load(param + at, inside, other=0.0)
        u = _direction(m, v, step, log_beta1, log_beta2, eps) + decay * p
        tile = tl.program_id(0)
        tl.store(partials + tile, tl.sum(p * p, 0))
        tl.store(partials + tl.num_programs(0) + tile, tl.sum(u * u, 0))


@triton.jit
def segment_sums(partials, first_tiles, squares, tiles, BLOCK: tl.constexpr):
    """Add up the partial sums of one segment."""
    segment = tl.program_id(0)
    begin = tl.load(first_tiles + segment)
    end = tl.load(first_tiles + segment + 1)
    partials += tl.program_id(1) * tiles
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(partials + at, at < end, other=0.0)
    tl.store(squares + tl.program_id(1) * tl.num_programs(0) + segment, tl.sum(total, 0))


@triton.jit
def lamb_apply(  # noqa: PLR0913
    param,
    exp_avg,
    exp_avg_sq,
    copy,
    offsets,
    first_tiles,
    of_tile,
    squares,
    lr,
    step,
    multiplier,
    skip,
    log_beta1,
    log_beta2,
    eps,
    decay,
    segments,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One tile: along the direction, which is made again from the moments, since that reads less than keeping it."""
    if _applies(multiplier, skip):
        segment, at, inside = _tile(offsets, first_tiles, of_tile, BLOCK, ALIGNED)
        m = tl.load(exp_avg + at, inside, other=0.0)
        v = tl.load(exp_avg_sq + at, inside, other=0.0)
        p = tl.load(param + at, inside, other=0.0)
        u = _direction(m, v, step, log_beta1, log_beta2, eps) + decay * p
        p_norm = tl.sqrt_rn(tl.load(squares + segment))
        u_norm = tl.sqrt_rn(tl.load(squares + segments + segment))
        usable = (p_norm > 0) & (u_norm > 0)
        ratio = tl.where(usable, tl.div_rn(p_norm, tl.where(usable, u_norm, 1.0)), 1.0)
        _store(param, copy, at, inside, p - tl.load(lr) * ratio * u)


@triton.jit
def square_partials(x, partials, length, BLOCK: tl.constexpr):
    """Square sum of every num_programs-th block."""
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(length, BLOCK), tl.num_programs(0)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, at < length, other=0.0).to(tl.float32)
        total += value * value
    tl.store(partials + tl.program_id(0), tl.sum(total, 0))


def launch_adamw(
    shard: list[torch.Tensor],
    grad: torch.Tensor,
    scalars: list[torch.Tensor],
    hyper: list[float],
    config: Config | None = None,
) -> None:
    """See `adamw_`."""
    length = grad.numel()
    config = config or pick("adamw", f"log2={length.bit_length()}", lambda: CONFIGS, grad.device)
    param, exp_avg, exp_avg_sq, copy = _with_copy(shard)
    grid = (cdiv(length, config.blocks["BLOCK"]),)
    launch_kernel(adamw, grid, param, exp_avg, exp_avg_sq, copy, grad, *scalars, *hyper, length, **config.arguments)


def launch_lamb_moments(
    shard: list[torch.Tensor],
    grad: torch.Tensor,
    segments: list[torch.Tensor],
    scalars: list[torch.Tensor],
    hyper: list[float],
    tile: list[int],
) -> torch.Tensor:
    """See `lamb_moments_`."""
    tiles, count = segments[2].numel(), segments[0].numel() - 1
    partials, squares = (torch.empty((2, n), dtype=torch.float32, device=grad.device) for n in (tiles, count))
    args = (*shard[:3], grad, *segments, partials, *scalars[1:], *hyper)
    launch_kernel(lamb_moments, (tiles,), *args, **_tile_arguments(tile))
    launch_kernel(segment_sums, (count, 2), partials, segments[1], squares, tiles, BLOCK=_SEGMENT_BLOCK)
    return squares


def launch_lamb_apply(
    shard: list[torch.Tensor],
    squares: torch.Tensor,
    segments: list[torch.Tensor],
    scalars: list[torch.Tensor],
    hyper: list[float],
    tile: list[int],
) -> None:
    """See `lamb_apply_`."""
    _, log_beta1, _, log_beta2, eps, decay = hyper
    rest = (squares.contiguous(), *scalars, log_beta1, log_beta2, eps, decay, squares.shape[1])
    launch_kernel(lamb_apply, (segments[2].numel(),), *_with_copy(shard), *segments, *rest, **_tile_arguments(tile))


def _tile_arguments(tile: list[int]) -> dict[str, Any]:
    block, num_warps, aligned = tile
    return {"BLOCK": block, "num_warps": num_warps, "ALIGNED": bool(aligned)}


def launch_square_sum(tensors: list[torch.Tensor], config: Config | None = None) -> torch.Tensor:
    """See `square_sum`."""
    config = config or pick("square_sum", "any", lambda: SUM_CONFIGS, tensors[0].device)
    blocks = [cdiv(x.numel(), config.blocks["BLOCK"]) for x in tensors]
    counts = [min(n, _MAX_PARTIALS) for n in blocks]
    partials = torch.empty(sum(counts), dtype=torch.float32, device=tensors[0].device)
    for x, own in zip(tensors, partials.split(counts), strict=True):
        launch_kernel(square_partials, (own.numel(),), x, own, x.numel(), **config.arguments)
    return partials.sum()


def _with_copy(shard: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    return (*shard, None) if len(shard) == 3 else tuple(shard)


_adamw = operator(
    "adamw_(Tensor(a!)[] shard, Tensor grad, Tensor[] scalars, float[] hyper) -> ()", launch_adamw, lambda *_: None
)
_lamb_moments = operator(
    "lamb_moments_(Tensor(a!)[] shard, Tensor grad, Tensor[] segments, Tensor[] scalars, float[] hyper, int[] tile)"
    " -> Tensor",
    launch_lamb_moments,
    lambda shard, grad, segments, *_: grad.new_empty((2, segments[0].numel() - 1), dtype=torch.float32),
)
_lamb_apply = operator(
    "lamb_apply_(Tensor(a!)[] shard, Tensor squares, Tensor[] segments, Tensor[] scalars, float[] hyper, int[] tile)"
    " -> ()",
    launch_lamb_apply,
    lambda *_: None,
)
_square_sum = operator(
    "square_sum(Tensor[] tensors) -> Tensor",
    launch_square_sum,
    lambda tensors: tensors[0].new_empty((), dtype=torch.float32),
)


def adamw_(shard: Shard, grad: torch.Tensor, scalars: Scalars, hyper: Hyper) -> None:
    """Update a flat shard in place by AdamW, in one launch.

    Args:
        shard: parameters and moments [n].
        grad: [n], contiguous, of any floating dtype.
        scalars: learning rate, number of the update, multiplier of the gradient, whether to skip.
        hyper: the rest.

    Source: arXiv 1711.05101, algorithm 2.
    """
    _adamw(shard.tensors, grad, scalars.arguments, hyper.arguments)


def lamb_moments_(shard: Shard, grad: torch.Tensor, segments: Segments, scalars: Scalars, hyper: Hyper) -> torch.Tensor:
    """Update the moments of a flat shard of matrices, and return square norms, float32 [2, number of segments].

    They are those of each tensor, and of its update (Adam's direction, weight decay included), as far as they lie in
    this shard: add them up over the processes that hold the rest before `lamb_apply_`. They mean nothing in a step that
    is skipped. What LAMB does to norms and biases, which it neither decays nor scales, is `adamw_` without decay.

    Args:
        shard: parameters and moments [n].
        grad: [n], contiguous, of any floating dtype.
        segments: where the tensors lie in the shard.
        scalars: see `adamw_`.
        hyper: the rest.

    Source: arXiv 1904.00962, algorithm 2.
    """
    return _lamb_moments(shard.tensors, grad, segments.tensors, scalars.arguments, hyper.arguments, segments.launch)


def lamb_apply_(shard: Shard, squares: torch.Tensor, segments: Segments, scalars: Scalars, hyper: Hyper) -> None:
    """Move each tensor w by lr * |w| / |u| along minus its update u; where a norm is 0, the ratio counts as 1.

    Args:
        shard: parameters, updated in place, and moments, as `lamb_moments_` left them.
        squares: what that returned, summed over processes.
        segments: see there.
        scalars: see there.
        hyper: see there.
    """
    _lamb_apply(shard.tensors, squares, segments.tensors, scalars.arguments, hyper.arguments, segments.launch)


def square_sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the squares of all elements of one or more contiguous tensors, as a float32 device scalar.

    The same bits every time: each of a fixed number of programs adds up its blocks, and one reduction their sums.
    """
    return _square_sum(list(tensors))


def update_(parts: Sequence[Part], now: Now, hyper: Hyper, sum_squares: SumSquares | None) -> None:
    """See `kernels.optimizer.reference`."""
    lr, multiplier = torch.full_like(now.step, now.lr), now.grad_scale.reciprocal()
    scalars = Scalars(lr=lr, step=now.step, multiplier=multiplier, skip=now.skip)
    shards = [Shard(param=part.param, exp_avg=part.exp_avg, exp_avg_sq=part.exp_avg_sq) for part in parts]
    grads = [part.grad.contiguous() for part in parts]
    if sum_squares is None:
        for shard, grad in zip(shards, grads, strict=True):
            adamw_(shard, grad, scalars, hyper)
        return
    segments = [_one_segment(grad.numel(), grad.device) for grad in grads]
    squares = [
        lamb_moments_(shard, grad, segment, scalars, hyper)
        for shard, grad, segment in zip(shards, grads, segments, strict=True)
    ]
    whole = sum_squares(torch.cat(squares, 1).T).unsqueeze(-1)
    for shard, square, segment in zip(shards, whole, segments, strict=True):
        lamb_apply_(shard, square, segment, scalars, hyper)


@cache
def _one_segment(length: int, device: torch.device) -> Segments:
    """A tensor that is a shard of its own."""
    return Segments([0, length], device)


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield (label, kernel, arguments, keyword arguments) of everything that a GPU would compile."""
    for config, dtype in itertools.product(CONFIGS, (torch.bfloat16, torch.float32)):
        yield from _update_compilations(config, dtype)
    for config, dtype in itertools.product(SUM_CONFIGS, (torch.bfloat16, torch.float16, torch.float32)):
        args = (torch.empty(4096, dtype=dtype), torch.empty(16), 4096)
        yield _label("square_partials", dtype, config), square_partials, args, config.arguments
    ints = torch.empty(16, dtype=torch.int32)
    yield "segment_sums", segment_sums, (torch.empty(16), ints, torch.empty(16), 16), {"BLOCK": _SEGMENT_BLOCK}


def _update_compilations(config: Config, dtype: torch.dtype):
    """Updates with gradients of `dtype`, and a copy in it where that is not float32."""
    flat, grad, scalar = torch.empty(4096), torch.empty(4096, dtype=dtype), torch.empty(())
    copy = None if dtype == torch.float32 else grad
    scalars = [scalar, scalar, scalar, torch.empty((), dtype=torch.bool)]
    hyper = Hyper(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1).arguments
    segments = [torch.empty(16, dtype=kind) for kind in (torch.int64, torch.int32, torch.int32)]
    args = (flat, flat, flat, copy, grad, *scalars, *hyper, 4096)
    yield _label("adamw", dtype, config), adamw, args, config.arguments
    args = (flat, flat, flat, grad, *segments, flat, *scalars[1:], *hyper)
    yield _label("lamb_moments", dtype, config), lamb_moments, args, {**config.arguments, "ALIGNED": True}
    args = (flat, flat, flat, copy, *segments, flat, *scalars, hyper[1], hyper[3], *hyper[4:], 16)
    yield _label("lamb_apply", dtype, config), lamb_apply, args, {**config.arguments, "ALIGNED": True}


def _label(kernel: str, dtype: torch.dtype, config: Config) -> str:
    return f"{kernel} {str(dtype).removeprefix('torch.')} BLOCK={config.blocks['BLOCK']} warps={config.num_warps}"
