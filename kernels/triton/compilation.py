"""Compile every kernel for a GPU that need not be there, and tell what the compiler made of it."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import get_ptxas

from shardwright.kernels.triton.ptxas import HOPPER

COMPILER = f"triton {triton.__version__}"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that a program can have, by compute capability
_MATRIX = ("HMMA", "HGMMA", "QGMMA")  # tensor core instructions: of a warp, of a warpgroup, of a warpgroup in FP8


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel.

    Attributes:
        registers: of a thread.
        spill_bytes: stored and loaded again, per thread, for want of registers.
        shared_bytes: of a program.
        matrix: tensor core instructions that it holds.
        warnings: of the assembler, such as products that it had to put one after the other.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix: list[str]
    warnings: list[str]


class _AbsentGpu(DriverBase):
    """Stands for a GPU of a compute capability; nothing can be launched on it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.capability  # what was compiled is kept for each

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def compile_all(capability: int, wanted: str = "") -> Iterator[tuple[str, Compiled]]:
    """Compile what the modules list, those in Gluon for Hopper only, and yield label and outcome.

    Ends what a process can launch.

    Args:
        capability: 90 for compute capability 9.0.
        wanted: a regular expression that labels must match somewhere.
    """
    triton.runtime.driver.set_active(_AbsentGpu(capability))
    for module in _modules(capability):
        for label, kernel, args, kwargs in getattr(module, "compilations", tuple)():
            if re.search(wanted, label):
                yield label, _inspect(kernel.warmup(*args, grid=(1,), **kwargs), capability)


def _modules(capability: int) -> Iterator[Any]:
    for package in ("triton", "gluon") if capability == HOPPER else ("triton",):
        found = importlib.import_module(f"shardwright.kernels.{package}")
        for info in pkgutil.iter_modules(found.__path__):
            yield importlib.import_module(f"{found.__name__}.{info.name}")


def _inspect(kernel: Any, capability: int) -> Compiled:
    with tempfile.TemporaryDirectory() as name:
        ptx, cubin = Path(name) / "kernel.ptx", Path(name) / "kernel.cubin"
        ptx.write_text(kernel.asm["ptx"])
        cubin.write_bytes(kernel.asm["cubin"])
        target = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.MULTILINE)
        assert target is not None
        log = _say(get_ptxas(capability).path, "-v", f"--gpu-name={target[1]}", str(ptx), "-o", f"{name}/again")
        sass = _say(str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"), "--dump-sass", str(cubin))
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z0-9_]+)", sass, re.MULTILINE))
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    assert registers is not None and spills, log
    return Compiled(
        registers=int(registers[1]),
        spill_bytes=sum(map(int, spills)),
        shared_bytes=kernel.metadata.shared,
        matrix=[opcode for opcode in _MATRIX if opcodes[opcode]],
        warnings=sorted({line.strip() for line in log.splitlines() if "warning" in line.lower()}),
    )


def _say(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
