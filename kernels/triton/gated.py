"""Gated activations of the feed-forward block, forward and backward: SwiGLU and GeGLU with exact or tanh GeLU.

Backward computes the activation again, so that nothing is kept but the two inputs.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from shardwright.kernels.op import KernelError
from shardwright.kernels.triton.config import Config, pick
from shardwright.kernels.triton.launch import cdiv, launch_kernel
from shardwright.kernels.triton.operator import empty_dense, operator

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

CONFIGS = tuple(
    Config(blocks={"BLOCK": block}, num_warps=warps)
    for block, warps in ((2048, 8), (1024, 4), (2048, 4), (4096, 8), (1024, 8))
)

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Return x * share(x) and its derivative: share is the logistic function for silu, the normal one for gelu."""
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp2(x * x * (-0.5 * _LOG2E))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 is the logistic function of 2u
        share = 1.0 / (1.0 + tl.exp2((x + 0.044715 * x * x * x) * (-1.5957691216057308 * _LOG2E)))
        density = share * (1.0 - share) * (1.5957691216057308 + 0.21406444543200588 * x * x)
    else:
        share = 1.0 / (1.0 + tl.exp2(x * -_LOG2E))
        density = share * (1.0 - share)
    return x * share, share + x * density


@triton.jit
def gated_forward(gate, up, out, columns, gate_stride, up_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Write activation(gate) * up for BLOCK columns of a row."""
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    g = tl.load(gate + row * gate_stride + column, inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, inside, other=0.0).to(tl.float32)
    value, _ = activate(g, ACTIVATION)
    tl.store(out + row * columns + column, (value * u).to(out.dtype.element_ty), inside)


@triton.jit
def gated_backward(  # noqa: PLR0913
    grad,
    gate,
    up,
    grad_gate,
    grad_up,
    columns,
    grad_stride,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradients of gate and up for BLOCK columns of a row."""
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    dy = tl.load(grad + row * grad_stride + column, inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, inside, other=0.0).to(tl.float32)
    value, slope = activate(g, ACTIVATION)
    tl.store(grad_gate + row * columns + column, (dy * u * slope).to(grad_gate.dtype.element_ty), inside)
    tl.store(grad_up + row * columns + column, (dy * value).to(grad_up.dtype.element_ty), inside)


def _choose(kernel: str, device: torch.device) -> Config:
    return pick(kernel, "any", lambda: CONFIGS, device)


def _flatten(*tensors: torch.Tensor) -> tuple[int, int, tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Return rows, columns, the tensors with contiguous rows, and their row strides; one row if all are contiguous.

    Views whose rows lie at one distance, such as a half of a fused projection, are not copied.
    """
    first = tensors[0]
    if any(x.shape != first.shape for x in tensors):
        raise KernelError(f"gated activation of shapes {[list(x.shape) for x in tensors]}: give both of one shape")
    if all(x.is_contiguous() for x in tensors):
        return 1, first.numel(), tensors, (0,) * len(tensors)
    views = [x.reshape(-1, x.shape[-1]) for x in tensors]
    views = [x if x.stride(1) == 1 else x.contiguous() for x in views]
    rows, columns = views[0].shape
    return rows, columns, tuple(views), tuple(x.stride(0) for x in views)


def launch_forward(gate: torch.Tensor, up: torch.Tensor, activation: str, config: Config | None = None) -> torch.Tensor:
    """Return activation(gate) * up; see `ACTIVATIONS`."""
    rows, columns, inputs, strides = _flatten(gate, up)
    out = empty_dense(gate)
    config = config or _choose("gated_forward", gate.device)
    grid = (rows * cdiv(columns, config.blocks["BLOCK"]),)
    launch_kernel(gated_forward, grid, *inputs, out, columns, *strides, ACTIVATION=activation, **config.arguments)
    return out


def launch_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up."""
    rows, columns, inputs, strides = _flatten(grad, gate, up)
    grad_gate, grad_up = empty_dense(gate), empty_dense(up)
    config = config or _choose("gated_backward", gate.device)
    grid = (rows * cdiv(columns, config.blocks["BLOCK"]),)
    launch_kernel(
        gated_backward, grid, *inputs, grad_gate, grad_up, columns, *strides, ACTIVATION=activation, **config.arguments
    )
    return grad_gate, grad_up


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_gradients(grad, *ctx.saved_tensors, ctx.activation), None


_gradients = operator(
    "gated_backward(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    launch_backward,
    lambda grad, gate, up, activation: (empty_dense(gate), empty_dense(up)),
)
gated = operator(
    "gated(Tensor gate, Tensor up, str activation) -> Tensor",
    launch_forward,
    lambda gate, up, activation: empty_dense(gate),
    backward=_backward,
    setup_context=_setup_context,
)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, computed in float32, in the dtype of `gate`.

    Views with contiguous last dim whose rows lie at one distance are read in place.

    Raises:
        KernelError: the shapes differ.

    Source: arXiv 2002.05202.
    """
    return gated(gate, up, "silu")


def geglu(gate: torch.Tensor, up: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """Return gelu(gate) * up, as `swiglu`; `approximate` is `none` or `tanh` as in torch.nn.functional.gelu.

    Raises:
        KernelError: the shapes differ, or `approximate` is neither.

    Source: arXiv 2002.05202; the tanh form arXiv 1606.08415.
    """
    if approximate not in ("none", "tanh"):
        raise KernelError(f"geglu with approximate={approximate}: it is none or tanh; use one of them")
    return gated(gate, up, "gelu" if approximate == "none" else "gelu_tanh")


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield (label, kernel, arguments, keyword arguments) of everything that a GPU would compile."""
    variants = [(config, torch.bfloat16, "silu") for config in CONFIGS]
    variants += [(CONFIGS[0], torch.bfloat16, activation) for activation in ACTIVATIONS[1:]]
    variants += [(CONFIGS[0], dtype, "silu") for dtype in (torch.float16, torch.float32)]
    for config, dtype, activation in variants:
        x = torch.empty(16, 1024, dtype=dtype)
        kwargs = {"ACTIVATION": activation, **config.arguments}
        kind = f"{activation} {str(dtype).removeprefix('torch.')}"
        label = f"{kind} BLOCK={config.blocks['BLOCK']} warps={config.num_warps}"
        yield f"gated_forward {label}", gated_forward, (x, x, x, 1024, 1024, 1024), kwargs
        yield f"gated_backward {label}", gated_backward, (x, x, x, x, x, 1024, 1024, 1024, 1024), kwargs
