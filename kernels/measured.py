"""What was measured on a kind of GPU: which implementation of an op, and which configuration of a kernel, is fastest.

`bench_kernels.py --write-table` writes the tables. `order` has the implementations of every op, fastest first;
`configs` has kernel -> situation -> arguments of the launch.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

import torch


def file_name(gpu: str) -> str:
    """Return the file name of the table of a kind of GPU, such as `nvidia_h100_80gb_hbm3.json`."""
    return "".join(c if c.isalnum() else "_" for c in gpu.lower()) + ".json"


@cache
def gpu_name(device: torch.device) -> str | None:
    """Return what a device calls itself; None for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else None


@cache
def measured(gpu: str | None) -> dict[str, Any]:
    """Return the table of a kind of GPU; one without entries for a kind that nobody has measured."""
    path = files("shardwright.kernels") / "tables" / file_name(gpu or "none")
    return json.loads(path.read_text("utf-8")) if path.is_file() else {"order": {}, "configs": {}}
