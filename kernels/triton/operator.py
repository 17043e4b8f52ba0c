"""How a kernel becomes an operator of torch, as autograd, compilers, recomputation and CUDA graphs see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("shardwright", "DEF")


def operator(
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Any:
    """Define `torch.ops.shardwright.<name>` and return it.

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
    if backward is not None:
        torch.library.register_autograd(f"shardwright::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.shardwright, name)


def empty_dense(x: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor like `x` that is contiguous, as outputs of kernels are, whatever the strides of `x`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
