"""Model families by the `kind` of their config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from shardwright.kernels import Kernels
from shardwright.models.llama.cost import flops_per_token
from shardwright.models.llama.model import Llama
from shardwright.models.llama.plan import plan
from shardwright.parallel.plan import ParallelPlan


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its plain module, its parallel plan, its counted work."""

    build: Callable[[Any, Kernels], nn.Module]
    plan: Callable[[Any], ParallelPlan]
    flops_per_token: Callable[..., float]


FAMILIES = {"llama": Family(build=Llama, plan=plan, flops_per_token=flops_per_token)}
