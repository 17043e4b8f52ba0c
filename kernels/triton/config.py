"""Which of its configurations a kernel is launched with: what was measured on this kind of GPU, else the first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Config:
    """A way to launch a kernel.

    Attributes:
        blocks: constexpr arguments by name, such as tile sizes.
        num_warps: of a program.
        num_stages: of its software pipeline.
    """

    blocks: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    @property
    def arguments(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


def pick(kernel: str, key: str, configs: Sequence[Config], device: torch.device) -> Config:
    """Return the configuration to launch a kernel with.

    Args:
        kernel: its name.
        key: the situation that was measured, such as `head_dim=128`.
        configs: all that may be picked, the best guess first.
        device: where it runs.
    """
    fastest = _table(_gpu_name(device)).get(kernel, {}).get(key)
    return next((config for config in configs if config.arguments == fastest), configs[0])


def table_name(gpu: str) -> str:
    """Return the file name of the table of a kind of GPU, such as `nvidia_h100_80gb_hbm3.json`."""
    return "".join(c if c.isalnum() else "_" for c in gpu.lower()) + ".json"


@cache
def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "none"


@cache
def _table(gpu: str) -> dict[str, Any]:
    """Return kernel -> key -> arguments of the fastest configuration; empty for a GPU that nobody has measured."""
    path = files("shardwright.kernels.triton") / "tables" / table_name(gpu)
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
