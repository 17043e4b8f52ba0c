"""What the device can do and what it holds."""

from __future__ import annotations

import resource
import sys

import torch

# Dense bf16 peak in FLOP/s by the name that the driver reports (vendor data sheets).
_PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA B200": 2250e12,
}


def device_name(device: torch.device) -> str:
    """Return the driver's name of a GPU, or the device type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak in FLOP/s, or None for a device that is not known: no MFU beats a wrong one."""
    return _PEAKS.get(device_name(device))


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory this process has held: on the GPU by torch's allocator, on the CPU in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
