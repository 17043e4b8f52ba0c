"""Launch a kernel, the second time and later without Triton's own analysis of the arguments."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction

_ready: dict[tuple[Hashable, ...], _Ready] = {}
_KEPT = 4096  # descriptors of one kind: some for each of many layers


def cdiv(x: int, y: int) -> int:
    """Return x / y, rounded up; Triton's own function takes 20 microseconds of the host."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """Return the least power of two that is not less than `x`; see `cdiv`."""
    return 1 << (x - 1).bit_length()


class Address:
    """Stands for a tensor in a descriptor: says where it lies, and does not keep it alive.

    Args:
        address: of the first element.
        dtype: of the elements.
    """

    __slots__ = ("_address", "dtype", "encoded", "kind")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address, self.dtype = address, dtype
        self.kind: str | None = None  # of the descriptor that it is in
        self.encoded: list[Any] | None = None  # what a launcher takes for that

    def data_ptr(self) -> int:
        """Return the address, as a tensor does."""
        return self._address


def kept(describe: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the descriptors that a function makes, and what the GPU is given for them, from call to call.

    Both take the host longer than all else of a launch, and an allocator gives the same addresses at every step. The
    tensor is not kept alive: it must outlive the launch.

    Args:
        describe: (address, *rest) -> descriptor, a new one whose base is the address, for kernels that are compiled.

    Returns:
        A function (tensor, *rest) -> descriptor, which nobody may change. The rest must be hashable.
    """

    @lru_cache(_KEPT)
    def recall(address: int, dtype: torch.dtype, *rest: Hashable) -> Any:
        base = Address(address, dtype)
        descriptor = describe(base, *rest)
        base.kind = _kind_of_descriptor(descriptor)
        return descriptor

    return lambda x, *rest: recall(x.data_ptr(), x.dtype, *rest)


def launch_kernel(kernel: Any, grid: Sequence[int], *args: Any, **constants: Any) -> None:
    """Launch a kernel; what Triton compiled for arguments of the same kinds is taken again at once.

    Args:
        kernel: made by `triton.jit`, at the top of a module.
        grid: numbers of programs, up to three.
        args: tensors, descriptors, integers, floats and None, by position; a kind is what Triton compiles anew for.
        constants: the other parameters, and options such as `num_warps`: each a constexpr, or one of few values. A call
            site always gives them in one order.
    """
    if isinstance(kernel, InterpretedFunction):
        _check(kernel, args)
        kernel[tuple(grid)](*args, **constants)
        return
    device = torch._C._cuda_getDevice()
    key, values = [id(kernel), device, *constants.values()], []
    for arg in args:  # what the compiler is told of it, at least; in line, as this is done at every launch
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            address = arg.data_ptr()
            key.append(arg.dtype)
            kind = address % 16
            if arg.is_cuda:  # of another Triton asks whether the GPU can read it
                arg = address
        elif kind is int:
            kind = arg % 16 == 0 if 1 < arg < 2**31 else _kind_of_rare(arg)
        elif kind is not float and arg is not None:
            kind = _kind(arg)
        key.append(kind)
        values.append(arg)
    key = tuple(key)
    ready = _ready.get(key)
    if ready is None:
        _check(kernel, args)
        compiled = kernel[tuple(grid)](*args, **constants)
        _ready[key] = _Ready(compiled, args, tuple(constants[name] for name in kernel.arg_names[len(args) :]))
        return
    whole_grid = (*grid, 1, 1)[:3]
    if knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
        ready.compiled[whole_grid](*args, *ready.rest)
    else:  # as that does, without what is only for hooks
        for place, meta in ready.descriptors:
            values[place : place + 1] = ready.encode(values[place], meta)
        ready.run(*whole_grid, torch._C._cuda_getCurrentRawStream(device), *ready.fixed, *values, *ready.rest)


def _check(kernel: Any, args: tuple[Any, ...]) -> None:
    parameters = inspect.signature(kernel.fn).parameters.values()
    num_runtime = sum(1 for _ in takewhile(lambda p: "constexpr" not in str(p.annotation), parameters))
    assert len(args) <= num_runtime, "a constexpr is given by position"


def _kind_of_rare(integer: int) -> Hashable:
    width = 32 if -(2**31) <= integer < 2**31 else 64 if integer < 2**63 else -64
    return integer % 16 == 0, integer == 1, width


def _kind(value: Any) -> Hashable:
    base = getattr(value, "base", None)
    if isinstance(base, Address):
        return base.kind
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16
    return type(value) if base is None else _kind_of_descriptor(value)


def _kind_of_descriptor(descriptor: Any) -> str:
    layout = getattr(descriptor, "layout", None)  # those of Gluon have one
    return f"{descriptor.base.dtype} {descriptor.block_shape} {layout}"


class _Ready:
    """What was compiled for arguments of certain kinds, and what it is launched with besides these.

    Attributes:
        compiled: by Triton.
        run: its launcher.
        fixed: what the launcher takes before the arguments: function, what describes it, and no hooks.
        rest: values of the other parameters.
        descriptors: those that the launcher takes encoded: place among the arguments, and what the encoding depends on
            besides the descriptor. From the last to the first, as what they are encoded to is longer.
    """

    def __init__(self, compiled: Any, args: tuple[Any, ...], rest: tuple[Any, ...]) -> None:
        self.compiled, self.run, self.rest = compiled, compiled.run, rest
        self.fixed = compiled.function, compiled.packed_metadata, None, None, None
        self.descriptors: Sequence[tuple[int, Any]] = ()
        places = [place for place, arg in enumerate(args) if hasattr(arg, "block_shape")]
        metas = (getattr(compiled.metadata, "tensordesc_meta", None) or ()) if places else ()
        if places and len(places) == len(metas) and (unwrapped := _unwrap(compiled.run)):
            self.run, self._encode = unwrapped
            self.descriptors = list(zip(places, metas, strict=True))[::-1]

    def encode(self, descriptor: Any, meta: Any) -> list[Any]:
        """Return what the launcher takes for a descriptor; with a layout and a tile, any kernel's is the same."""
        base = descriptor.base
        if not isinstance(base, Address):
            return self._encode(descriptor, meta)
        if base.encoded is None:
            base.encoded = self._encode(descriptor, meta)
        return base.encoded


def _unwrap(run: Any) -> tuple[Any, Callable[[Any, Any], list[Any]]] | None:
    """Return a launcher without the function around it that encodes all descriptors, and what encodes one.

    None: in this release of Triton they are not where they were in 3.6 and 3.9.
    """
    try:
        names = inspect.getclosurevars(run.launch)
        launcher = names.nonlocals["launcher"]
        make = {**names.globals, **names.nonlocals}["make_tensordesc_arg"]
        others = {2: (), 3: (None,)}[len(inspect.signature(make).parameters)]  # the third, of 3.9, it does not look at
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    unwrapped = copy.copy(run)
    unwrapped.launch = launcher
    return unwrapped, lambda descriptor, meta: make(descriptor, meta, *others)
