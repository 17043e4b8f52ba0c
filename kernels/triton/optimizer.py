"""AdamW, LAMB and the gradient's square sum over flat float32 shards, everything that varies read from device scalars.

A step that is not to be applied changes nothing, decided on the device. All sums are made in a fixed order.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from shardwright.kernels.optimizer import Hyper, Now, Part, SumSquares
from shardwright.kernels.triton.config import Config, pick
from shardwright.kernels.triton.launch import cdiv, launch_kernel
from shardwright.kernels.triton.operator import operator
from shardwright.kernels.triton.optimizer_kernels import adamw, lamb_apply, lamb_moments, segment_sums, square_partials
from shardwright.kernels.triton.optimizer_tables import Tiles, addresses, tiles_of

CONFIGS = tuple(
    Config(blocks={"BLOCK": block}, num_warps=warps)
    for block, warps in ((1024, 8), (512, 4), (1024, 4), (2048, 8), (2048, 16))
)
SUM_CONFIGS = tuple(Config(blocks={"BLOCK": block}, num_warps=warps) for block, warps in ((4096, 8), (2048, 4)))

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
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
    """Where the tensors lie in a flat shard.

    Args:
        offsets: first element of each tensor, and the length of the shard. Kernels are faster on multiples of 16.
        device: of the shard.
        config: of the kernels.
    """

    def __init__(self, offsets: Sequence[int], device: torch.device, config: Config | None = None) -> None:
        self.config = config or _lamb_config(offsets[-1], device)
        self._sizes = [end - begin for begin, end in itertools.pairwise(offsets)]

    def cut(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return flat tensors segment by segment, each of one after the other."""
        return [part for parts in zip(*(x.split(self._sizes) for x in tensors), strict=True) for part in parts]

    @property
    def launch(self) -> list[int]:
        """Elements and warps of a tile."""
        return _tile(self.config)


def _adamw_config(length: int, device: torch.device) -> Config:
    return pick("adamw", f"log2={length.bit_length()}", lambda: CONFIGS, device)


def _lamb_config(length: int, device: torch.device) -> Config:
    return pick("lamb", f"log2={length.bit_length()}", lambda: CONFIGS, device)


def _tile(config: Config) -> list[int]:
    return [config.blocks["BLOCK"], config.num_warps]


def launch_adamw(
    shards: list[torch.Tensor],
    grads: list[torch.Tensor],
    scalars: list[torch.Tensor],
    hyper: list[float],
    config: Config | None = None,
) -> None:
    """Update tensors by AdamW, in one launch; in more if dtypes of gradients or alignments differ.

    Args:
        shards: parameter, both moments, and copy if there are copies, of each tensor: see `Shard`.
        grads: of each tensor, contiguous.
        scalars: see `Scalars`.
        hyper: see `Hyper`.
        config: of the kernel.
    """
    sizes, count = _sizes(grads), len(grads)
    config = config or _adamw_config(sum(sizes), grads[0].device)
    tables, tiles = _prepare(shards, grads, sizes, config.blocks["BLOCK"])
    args = (*tables, *tiles.tensors, *scalars, *hyper)
    for (dtype, aligned), (begin, programs) in tiles.ranges.items():
        kind = {"GRAD": _TYPES[dtype], "COPY": _copy(shards, count), "ALIGNED": aligned}
        launch_kernel(adamw, (programs,), *args, begin, **kind, **config.arguments)


def launch_lamb_moments(
    shards: list[torch.Tensor],
    grads: list[torch.Tensor],
    scalars: list[torch.Tensor],
    hyper: list[float],
    tile: list[int],
) -> torch.Tensor:
    """Update moments as `launch_adamw` does, and return square norms after another launch: see `lamb_moments_`.

    Args:
        shards: see `launch_adamw`.
        grads: see there.
        scalars: see there.
        hyper: see there.
        tile: elements and warps.
    """
    (block, num_warps), count = tile, len(grads)
    tables, tiles = _prepare(shards, grads, _sizes(grads), block)
    total = tiles.owner.numel()
    partials, squares = (torch.empty((2, n), dtype=torch.float32, device=grads[0].device) for n in (total, count))
    args = (*tables, *tiles.tensors, partials, *scalars[1:], *hyper)
    for (dtype, aligned), (begin, programs) in tiles.ranges.items():
        kind = {"GRAD": _TYPES[dtype], "COPY": _copy(shards, count), "ALIGNED": aligned}
        launch_kernel(lamb_moments, (programs,), *args, begin, total, **kind, BLOCK=block, num_warps=num_warps)
    sums = (partials, tiles.sizes, tiles.first, squares, total)
    launch_kernel(segment_sums, (count, 2), *sums, TILE=block, BLOCK=_SEGMENT_BLOCK)
    return squares


def launch_lamb_apply(
    shards: list[torch.Tensor],
    squares: torch.Tensor,
    scalars: list[torch.Tensor],
    hyper: list[float],
    tile: list[int],
) -> None:
    """Update parameters as `launch_adamw` does: see `lamb_apply_`, and for the arguments `launch_lamb_moments`."""
    (block, num_warps), count = tile, squares.shape[1]
    width = len(shards) // count
    params, found = shards[::width], addresses(shards, width)
    tiles = tiles_of(_sizes(params), (torch.float32,) * count, (found.aligned,), block, squares.device)
    args = (found.table, *tiles.tensors, squares.contiguous(), *scalars, hyper[1], *hyper[3:])
    for (_, aligned), (begin, programs) in tiles.ranges.items():
        kind = {"COPY": _copy(shards, count), "ALIGNED": aligned}
        launch_kernel(lamb_apply, (programs,), *args, begin, count, **kind, BLOCK=block, num_warps=num_warps)


def _prepare(
    shards: list[torch.Tensor], grads: list[torch.Tensor], sizes: tuple[int, ...], block: int
) -> tuple[list[torch.Tensor], Tiles]:
    """Return the tables of addresses, and the tiles."""
    found, others = addresses(shards, len(shards) // len(grads)), addresses(grads, 1)
    dtypes, aligned = tuple([x.dtype for x in grads]), (found.aligned, others.aligned)
    return [found.table, others.table], tiles_of(sizes, dtypes, aligned, block, grads[0].device)


def _sizes(tensors: list[torch.Tensor]) -> tuple[int, ...]:
    return tuple([x.numel() for x in tensors])  # a list first, which takes less time


def _copy(shards: list[torch.Tensor], count: int) -> Any:
    return _TYPES[shards[3].dtype] if len(shards) == 4 * count else None


def launch_square_sum(tensors: list[torch.Tensor], config: Config | None = None) -> torch.Tensor:
    """See `square_sum`."""
    config = config or pick("square_sum", "any", lambda: SUM_CONFIGS, tensors[0].device)
    blocks = [cdiv(x.numel(), config.blocks["BLOCK"]) for x in tensors]
    counts = [min(n, _MAX_PARTIALS) for n in blocks]
    partials = torch.empty(sum(counts), dtype=torch.float32, device=tensors[0].device)
    for x, own in zip(tensors, partials.split(counts), strict=True):
        launch_kernel(square_partials, (own.numel(),), x, own, x.numel(), **config.arguments)
    return partials.sum()


_adamw = operator(
    "adamw_(Tensor(a!)[] shards, Tensor[] grads, Tensor[] scalars, float[] hyper) -> ()",
    launch_adamw,
    lambda *_: None,
)
_lamb_moments = operator(
    "lamb_moments_(Tensor(a!)[] shards, Tensor[] grads, Tensor[] scalars, float[] hyper, int[] tile) -> Tensor",
    launch_lamb_moments,
    lambda shards, grads, *_: grads[0].new_empty((2, len(grads)), dtype=torch.float32),
)
_lamb_apply = operator(
    "lamb_apply_(Tensor(a!)[] shards, Tensor squares, Tensor[] scalars, float[] hyper, int[] tile) -> ()",
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
    _adamw(shard.tensors, [grad], scalars.arguments, hyper.arguments)


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
    tensors, grads = segments.cut(shard.tensors), segments.cut([grad])
    return _lamb_moments(tensors, grads, scalars.arguments, hyper.arguments, segments.launch)


def lamb_apply_(shard: Shard, squares: torch.Tensor, segments: Segments, scalars: Scalars, hyper: Hyper) -> None:
    """Move each tensor w by lr * |w| / |u| along minus its update u; where a norm is 0, the ratio counts as 1.

    Args:
        shard: parameters, updated in place, and moments, as `lamb_moments_` left them.
        squares: what that returned, summed over processes.
        segments: see there.
        scalars: see there.
        hyper: see there.
    """
    _lamb_apply(segments.cut(shard.tensors), squares, scalars.arguments, hyper.arguments, segments.launch)


def square_sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the squares of all elements of one or more contiguous tensors, as a float32 device scalar.

    The same bits every time: each of a fixed number of programs adds up its blocks, and one reduction their sums.
    """
    return _square_sum(list(tensors))


def update_(parts: Sequence[Part], now: Now, hyper: Hyper, sum_squares: SumSquares | None) -> None:
    """See `kernels.optimizer.reference`; a few launches for all parts."""
    lr, multiplier = torch.full_like(now.step, now.lr), now.grad_scale.reciprocal()
    scalars = Scalars(lr=lr, step=now.step, multiplier=multiplier, skip=now.skip).arguments
    shards = [x for part in parts for x in (part.param, part.exp_avg, part.exp_avg_sq)]
    grads = [part.grad.contiguous() for part in parts]
    if sum_squares is None:
        _adamw(shards, grads, scalars, hyper.arguments)
        return
    tile = _tile(_lamb_config(sum(_sizes(grads)), grads[0].device))
    squares = _lamb_moments(shards, grads, scalars, hyper.arguments, tile)
    _lamb_apply(shards, sum_squares(squares.T).T, scalars, hyper.arguments, tile)


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield (label, kernel, arguments, keyword arguments) of everything that a GPU would compile."""
    for config, dtype in itertools.product(CONFIGS, (torch.bfloat16, torch.float32)):
        yield from _update_compilations(config, dtype)
    for config, dtype in itertools.product(SUM_CONFIGS, (torch.bfloat16, torch.float16, torch.float32)):
        args = (torch.empty(4096, dtype=dtype), torch.empty(16), 4096)
        yield _label("square_partials", dtype, config), square_partials, args, config.arguments
    *_, sizes, first, _ = _tables()
    args = (torch.empty(16), sizes, first, torch.empty(16), 16)
    yield "segment_sums", segment_sums, args, {"TILE": CONFIGS[0].blocks["BLOCK"], "BLOCK": _SEGMENT_BLOCK}


def _tables() -> list[torch.Tensor]:
    """Addresses twice, sizes, first tiles and owners."""
    return [torch.empty(16, dtype=dtype) for dtype in (*3 * (torch.int64,), torch.int32, torch.int32)]


def _update_compilations(config: Config, dtype: torch.dtype):
    """Updates with gradients of `dtype`, and a copy in it where that is not float32."""
    shards, grads, *tiles = _tables()
    flat, scalar, copy = torch.empty(16), torch.empty(()), None if dtype == torch.float32 else _TYPES[dtype]
    scalars = [scalar, scalar, scalar, torch.empty((), dtype=torch.bool)]
    hyper = Hyper(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1).arguments
    kind = {"GRAD": _TYPES[dtype], "COPY": copy, "ALIGNED": True}
    args = (shards, grads, *tiles, *scalars, *hyper, 0)
    yield _label("adamw", dtype, config), adamw, args, kind | config.arguments
    args = (shards, grads, *tiles, flat, *scalars[1:], *hyper, 0, 16)
    yield _label("lamb_moments", dtype, config), lamb_moments, args, kind | config.arguments
    args = (shards, *tiles, flat, *scalars, hyper[1], *hyper[3:], 0, 16)
    yield _label("lamb_apply", dtype, config), lamb_apply, args, {"COPY": copy, "ALIGNED": True} | config.arguments


def _label(kernel: str, dtype: torch.dtype, config: Config) -> str:
    return f"{kernel} {str(dtype).removeprefix('torch.')} BLOCK={config.blocks['BLOCK']} warps={config.num_warps}"
