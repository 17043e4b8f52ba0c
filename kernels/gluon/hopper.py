"""What Gluon kernels for Hopper share: names that differ between releases of Triton, and tiles of packed documents.

A ragged descriptor ends loads and stores at the end of a document rather than of the tensor: rows after it read as
zeros and are not written. It has two leading dimensions more, whose strides take back, modulo 2^64, what the row's
coordinate is moved forward so that the document's end meets the bound.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# (Gluon's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

# No `from __future__ import annotations`: Triton 3.6 reads the types of an aggregate's fields as they are.

from functools import cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import core

from shardwright.kernels.triton.attention_forward import Scores
from shardwright.kernels.triton.launch import Address, kept
from shardwright.kernels.triton.ptxas import hazard

# Triton 3.9 renamed both, and 3.6 knows the older names only.
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

ROWS = gl.constexpr(2**30)  # the bound of a ragged descriptor's rows
_WRAP = 2**34  # times ROWS, and at least one byte an element: 0 modulo 2^64
_LARGEST = 0x7FFF0000  # a bound that no token reaches


HEAD_SIZES = (64, 128)


def unsupported(dim: int, dtype: torch.dtype, scores: Scores, capability: tuple[int, int]) -> str | None:
    """Return why the kernel cannot do something, or None.

    Args:
        dim: head size.
        dtype: of queries, keys and values.
        scores: how they are made.
        capability: compute capability of the GPU.
    """
    if capability[0] != 9:
        return f"needs compute capability 9.0, this is {capability[0]}.{capability[1]}"
    if dim not in HEAD_SIZES:
        return f"head_dim={dim}: it has {' and '.join(map(str, HEAD_SIZES))}"
    if dtype not in (torch.bfloat16, torch.float16):
        return "needs bf16 or fp16"
    if scores.softcap is not None:
        return f"softcap={scores.softcap}: it has none"
    return hazard(capability)


def aggregate(cls: type) -> Any:
    """Return what Triton makes of a class of values; without a constructor, it is given that of all fields in order."""

    def construct(self, *values):
        for name, value in zip(fields, values, strict=True):
            setattr(self, name, gl.constexpr(value) if fields[name] is gl.constexpr else value)

    fields = cls.__annotations__
    if "__init__" not in cls.__dict__:
        cls.__init__ = gluon.constexpr_function(construct)
    return core._aggregate(cls)


@cache
def layout(rows: int, dim: int, dtype: Any) -> gl.NVMMASharedLayout:
    """Return how a tile [1, 1, rows, dim] lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, dim], dtype)


def describable(x_PHD: torch.Tensor) -> torch.Tensor:
    """Return a tensor as a descriptor can say it: a token's heads side by side, everything aligned to 16 bytes."""
    dim, (token, head, lane) = x_PHD.shape[2], x_PHD.stride()
    aligned = (token * x_PHD.element_size() | x_PHD.data_ptr()) % 16 == 0
    return x_PHD if lane == 1 and head == dim and aligned else x_PHD.clone(memory_format=torch.contiguous_format)


@cache
def processors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def ragged(x_PHD: torch.Tensor, rows: int) -> TensorDescriptor:
    """Return a descriptor of tiles of so many tokens of one head, which ends where `place` says; see `kept`."""
    _, heads, dim = x_PHD.shape
    return _ragged(x_PHD, x_PHD.stride(0), heads * dim, dim, rows)


@kept
def _ragged(base: Address, stride: int, width: int, dim: int, rows: int) -> TensorDescriptor:
    return TensorDescriptor(
        base,
        [_LARGEST, _LARGEST, ROWS.value, width],
        [_WRAP - stride, stride, stride, 1],
        [1, 1, rows, dim],
        layout(rows, dim, gl.bfloat16 if base.dtype == torch.bfloat16 else gl.float16),
    )


@gluon.jit
def place(row, end, column):
    """Return the coordinates of a tile in a ragged descriptor: its first token and column, its document's end."""
    return [ROWS, end, ROWS - end + row, column]


@gluon.jit
def advance(slot, phase, SLOTS: gl.constexpr):
    """Return the place in a ring of buffers after this one, and the phase that its barriers are in."""
    last = slot == SLOTS - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Return so many barriers in shared memory, each of which so many arrivals complete."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def _named(instruction: gl.constexpr, number, threads):
    code: gl.constexpr = instruction + " $1, $2; mov.b32 $0, 0;"
    number, threads = gl.to_tensor(number), gl.to_tensor(threads)
    gl.inline_asm_elementwise(code, "=r,r,r", [number, threads], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def uniform(integer):
    """Return an integer that is the same in all threads of a warp in a way that tells ptxas so.

    Else it takes loops that end by it for ones that threads may leave one by one, and keeps what they count, and
    addresses of operands, where the tensor cores cannot take them from.
    """
    return gl.inline_asm_elementwise(
        "redux.sync.or.b32 $0, $1, 0xffffffff;", "=r,r", [integer], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def meet(number, threads):
    """Wait until so many threads of the program, these among them, have come to one of its 16 barriers by number.

    Triton itself takes the first: one for each warpgroup, and one more. Unlike an arrival at a barrier in shared
    memory, as Triton makes it, one by number does not wait for the warpgroup's other warps.
    """
    _named("bar.sync", number, threads)


@gluon.jit
def pass_by(number, threads):
    """Come to a barrier as in `meet`, and go on."""
    _named("bar.arrive", number, threads)


VARIANTS = (
    ("causal", Scores(scale=0.1, softcap=None, causal=True, window=None), torch.bfloat16),
    ("causal", Scores(scale=0.1, softcap=None, causal=True, window=None), torch.float16),
    ("full", Scores(scale=0.1, softcap=None, causal=False, window=None), torch.bfloat16),
    ("window", Scores(scale=0.1, softcap=None, causal=True, window=1024), torch.bfloat16),
)  # to compile
