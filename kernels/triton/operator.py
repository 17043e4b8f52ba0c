"""How a kernel becomes an operator of torch, as autograd, compilers, recomputation and CUDA graphs see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

_LIBRARY = torch.library.Library("shardwright", "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def operator(
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Define `torch.ops.shardwright.<name>`, and return a function that calls it.

    Where nobody looks on (no compiler, no dispatch mode, no subclass of tensors) the function skips torch's dispatcher,
    which costs the host many times what a launch does.

    Args:
        schema: such as `scale(Tensor x, float factor) -> Tensor`; what is written in place is marked `Tensor(a!) x`.
        function: launches the kernels. CPU tensors reach it too, for kernels that Triton interprets.
        fake: returns empty tensors of the shapes, dtypes and strides of `function`, from tensors that hold no data.
        backward: (ctx, *gradients of the outputs) -> gradient of every argument, None for those that have none.
        setup_context: (ctx, inputs, output) -> None, keeps on ctx what `backward` needs.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CUDA", "CPU"):
        _LIBRARY.impl(name, function, device)
    torch.library.register_fake(f"shardwright::{name}", fake, lib=_LIBRARY)
    differentiable = None
    if backward is not None:
        torch.library.register_autograd(f"shardwright::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
        differentiable = _differentiable(name, function, backward, setup_context)
    registered = getattr(torch.ops.shardwright, name).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _is_watched(args):
            return registered(*args)
        if differentiable is None or not (torch.is_grad_enabled() and _needs_gradient(args)):
            return function(*args)
        return differentiable(*args)

    return call


def _differentiable(name, function, backward, setup_context) -> Callable[..., Any]:
    def forward(ctx: Any, *inputs: Any) -> Any:  # a setup_context of its own would have apply inspect signatures
        output = function(*inputs)
        setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods).apply


def _is_watched(args: Iterable[Any]) -> bool:
    if _get_current_dispatch_mode() is not None:
        return True
    for arg in args:  # a loop, as this is called for every launch
        if isinstance(arg, list):
            if _is_watched(arg):
                return True
        elif isinstance(arg, torch.Tensor) and type(arg) not in _PLAIN:
            return True
    return False


def _needs_gradient(args: Iterable[Any]) -> bool:
    return any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)


def empty_dense(x: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor like `x` that is contiguous, as outputs of kernels are, whatever the strides of `x`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
