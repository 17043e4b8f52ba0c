"""Launch a kernel, the second time and later without Triton's own analysis of the arguments."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from itertools import takewhile
from typing import Any

import torch
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction

_compiled: dict[tuple[Hashable, ...], Any] = {}


def cdiv(x: int, y: int) -> int:
    """Return x / y, rounded up; Triton's own function takes 20 microseconds of the host."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """Return the least power of two that is not less than `x`; see `cdiv`."""
    return 1 << (x - 1).bit_length()


def launch_kernel(kernel: Any, grid: Sequence[int], *args: Any, **constants: Any) -> None:
    """Launch a kernel; what Triton compiled for arguments of the same kinds is taken again at once.

    Args:
        kernel: made by `triton.jit`, at the top of a module.
        grid: numbers of programs, up to three.
        args: tensors, integers, floats and None, by position; a kind is what Triton compiles anew for.
        constants: the other parameters, and options such as `num_warps`: each a constexpr, or one of few values. A call
            site always gives them in one order.
    """
    if isinstance(kernel, InterpretedFunction):
        _check(kernel, args)
        kernel[tuple(grid)](*args, **constants)
        return
    device = torch.cuda.current_device()
    key = (id(kernel), device, *constants.values(), *map(_kind, args))
    compiled = _compiled.get(key)
    if compiled is None:
        _check(kernel, args)
        _compiled[key] = kernel[tuple(grid)](*args, **constants)
        return
    rest = [constants[name] for name in kernel.arg_names[len(args) :]]
    whole_grid = (*grid, 1, 1)[:3]
    if knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
        compiled[whole_grid](*args, *rest)
    else:  # as that does, without what is only for hooks
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(
            *(*whole_grid, stream, compiled.function, compiled.packed_metadata), None, None, None, *args, *rest
        )


def _check(kernel: Any, args: tuple[Any, ...]) -> None:
    parameters = inspect.signature(kernel.fn).parameters.values()
    num_runtime = sum(1 for _ in takewhile(lambda p: "constexpr" not in str(p.annotation), parameters))
    assert len(args) <= num_runtime, "a constexpr is given by position"


def _kind(value: Any) -> Hashable:
    """Return at least what the compiler is told of an argument: dtype and alignment, the size of an integer."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16
    if isinstance(value, int):
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    if hasattr(value, "block_shape"):  # a descriptor; those of Gluon have a layout
        return value.base.dtype, tuple(value.block_shape), getattr(value, "layout", None)
    return type(value)
