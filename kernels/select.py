"""The implementation of every op, chosen once per run and handed to the model and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from shardwright.kernels import (
    attention,
    embedding,
    linear,
    linear_cross_entropy,
    optimizer,
    rms_norm,
    rope,
    swiglu,
    vocabulary_statistics,
)
from shardwright.kernels.measured import gpu_name
from shardwright.kernels.op import Situation

_OPS = {
    module.OP.name: module.OP
    for module in (
        embedding,
        attention,
        linear,
        rms_norm,
        rope,
        swiglu,
        linear_cross_entropy,
        vocabulary_statistics,
        optimizer,
    )
}


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """One function per op; the signature of each is that of the reference in the op's file."""

    embedding: Callable[..., torch.Tensor] = embedding.OP.reference
    attention: Callable[..., torch.Tensor] = attention.OP.reference
    linear: Callable[..., torch.Tensor] = linear.OP.reference
    rms_norm: Callable[..., torch.Tensor] = rms_norm.OP.reference
    rope: Callable[..., tuple[torch.Tensor, torch.Tensor]] = rope.OP.reference
    swiglu: Callable[..., torch.Tensor] = swiglu.OP.reference
    linear_cross_entropy: Callable[..., torch.Tensor] = linear_cross_entropy.OP.reference
    vocabulary_statistics: Callable[..., tuple[torch.Tensor, torch.Tensor]] = vocabulary_statistics.OP.reference
    optimizer: Callable[..., None] = optimizer.OP.reference

    @property
    def attention_fuses_rope(self) -> bool:
        """Whether attention turns queries and keys itself, by `angles`; see `kernels.attention.fp8`."""
        return self.attention is attention.fp8

    @classmethod
    def of(cls, module: Any) -> Kernels | None:
        """Return what a module has as its `kernels`, if it has any."""
        kernels = getattr(module, "kernels", None)
        return kernels if isinstance(kernels, cls) else None


def select(wanted: Any, *, device: str, dtype: torch.dtype, sizes: Mapping[str, int | None]) -> Kernels:
    """Choose every op's implementation.

    Args:
        wanted: an object with one attribute per op, `auto` or a name (the `kernels` group of the config).
        device: device type, `cpu` or `cuda`.
        dtype: dtype of the activations.
        sizes: what candidates ask for: `head_dim`, `hidden_size`, `intermediate_size`.

    Raises:
        KernelError: a named choice is unknown or cannot run.
    """
    situation = Situation(device=device, dtype=dtype, sizes=sizes, gpu=gpu_name(torch.device(device)))
    return Kernels(**{f.name: _OPS[f.name].choose(getattr(wanted, f.name), situation) for f in fields(Kernels)})
