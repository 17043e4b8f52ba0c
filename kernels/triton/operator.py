"""How a kernel becomes an operator of torch, as autograd, compilers, recomputation and CUDA graphs see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

_LIBRARY = torch.library.Library("shardwright", "DEF")
_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str}


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
    made: Any = type(name, (torch.autograd.Function,), methods)
    above: Any = super(torch.autograd.Function, made)
    at_once = above.apply  # to which apply, in Python, leads where no function is transformed

    def apply(*args: Any) -> Any:
        return made.apply(*args) if torch._C._are_functorch_transforms_active() else at_once(*args)

    return apply


def _is_watched(args: Iterable[Any]) -> bool:
    if _get_current_dispatch_mode() is not None:
        return True
    return not _PLAIN.issuperset(map(type, args)) and any(map(_is_subclass, args))


def _is_subclass(arg: Any) -> bool:
    if isinstance(arg, list):
        return any(map(_is_subclass, arg))
    return isinstance(arg, torch.Tensor) and type(arg) not in _PLAIN


def _needs_gradient(args: Iterable[Any]) -> bool:
    for arg in args:  # noqa: SIM110 (any() takes longer, and this is done at every call)
        if isinstance(arg, torch.Tensor) and arg.requires_grad:
            return True
    return False


def empty_dense(x: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor like `x` that is contiguous, as outputs of kernels are, whatever the strides of `x`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
