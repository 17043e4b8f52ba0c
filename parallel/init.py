"""Initial values that depend on seed, parameter name and global index, and on nothing else.

A counter-based generator (Philox, Salmon et al., SC'11) gives every element of every parameter its own 32 random bits,
whichever process asks for it. They become a normal quantile by linear interpolation in a table: only additions and
products in float32, which every machine rounds alike, so that values are the same bit for bit on any layout and device.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from shardwright.parallel.plan import Constant, Normal, ParallelPlan

_CELL_BITS = 12
_CUT = 3.0
_WORDS_PER_COUNTER = 8  # one Philox 4x64 counter gives eight 32-bit words
_CHUNK = 1 << 22


def _quantiles() -> np.ndarray:
    normal, cells = NormalDist(), 1 << _CELL_BITS
    low, high = normal.cdf(-_CUT), normal.cdf(_CUT)
    return np.array([normal.inv_cdf(low + (high - low) * i / cells) for i in range(cells + 1)], dtype=np.float32)


_TABLE = _quantiles()
_SLOPES = np.diff(_TABLE) * np.float32(2.0 ** (_CELL_BITS - 32))


def normal_run(seed: int, name: str, start: int, count: int) -> np.ndarray:
    """Return elements start .. start + count of a parameter's standard normal stream, cut off at 3 (float32)."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
    out = np.empty(count, dtype=np.float32)

    def fill(begin: int) -> None:
        end = min(begin + _CHUNK, count)
        first = (start + begin) // _WORDS_PER_COUNTER
        last = -(-(start + end) // _WORDS_PER_COUNTER)
        raw = np.random.Philox(key=key, counter=first).random_raw(4 * (last - first)).astype("<u8").view("<u4")
        words = raw[start + begin - first * _WORDS_PER_COUNTER :][: end - begin]
        cell = words >> np.uint32(32 - _CELL_BITS)
        within = (words & np.uint32((1 << (32 - _CELL_BITS)) - 1)).astype(np.float32)
        out[begin:end] = _TABLE[cell] + within * _SLOPES[cell]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, range(0, count, _CHUNK)))
    return out


def initial_box(
    value: Normal | Constant,
    seed: int,
    name: str,
    shape: tuple[int, ...],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> torch.Tensor:
    """Return the initial values (float32, CPU) of one box of a parameter of global `shape`."""
    if isinstance(value, Constant):
        return torch.full(sizes, value.value)
    row = int(np.prod(shape[1:], dtype=np.int64))
    rows = normal_run(seed, name, offsets[0] * row, sizes[0] * row).reshape(sizes[0], *shape[1:])
    box = rows[(slice(None), *(slice(o, o + n) for o, n in zip(offsets[1:], sizes[1:], strict=True)))]
    return torch.from_numpy(np.ascontiguousarray(box * np.float32(value.std)))


@torch.no_grad()
def fill_initial_values(model: nn.Module, plan: ParallelPlan, seed: int) -> None:
    """Fill this process's part of every parameter (local; mutates the model)."""
    for name, parameter in model.named_parameters():
        value = plan.initial_value(name)
        if isinstance(parameter, DTensor):
            local = parameter.to_local()
            sizes, offsets = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
        else:
            local, sizes, offsets = parameter, tuple(parameter.shape), (0,) * parameter.ndim
        if local.numel():
            local.copy_(initial_box(value, seed, name, tuple(parameter.shape), tuple(offsets), tuple(sizes)))
