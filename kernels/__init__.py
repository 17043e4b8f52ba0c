"""Fast ops, each with a plain torch reference that is its meaning."""

from shardwright.kernels.op import KernelError
from shardwright.kernels.select import Kernels, select

__all__ = ["KernelError", "Kernels", "select"]
