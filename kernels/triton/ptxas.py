"""Which assembler Triton uses, and whether it can be trusted.

Before 13.3, ptxas may give a register operand of an asynchronous wgmma a new value before the tensor core has read it,
which makes attention kernels for Hopper wrong (release notes of CUDA 13.3; triton-lang/triton issues 9433 and 11781).
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from triton.backends.nvidia.compiler import get_ptxas

_FIRST_SOUND = (13, 3)
HOPPER = 90
_VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")  # Triton's releases differ in which one Hopper takes


def prefer_sound() -> None:
    """Let Triton use the assembler of the package nvidia-cuda-nvcc where its own is unsound, unless one is set."""
    found = find_spec("nvidia")
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    paths = [path for folder in folders for path in Path(folder).glob("cu*/bin/ptxas")]
    if paths and _version() < _FIRST_SOUND and not any(variable in os.environ for variable in _VARIABLES):
        os.environ |= dict.fromkeys(_VARIABLES, str(max(paths)))
        _version.cache_clear()


def hazard(capability: tuple[int, int]) -> str | None:
    """Return why kernels that feed wgmma from registers are refused on a GPU of a compute capability, or None."""
    if capability[0] != HOPPER // 10 or _version() >= _FIRST_SOUND:
        return None
    version = ".".join(map(str, _version()))
    return f"ptxas {version} breaks it on Hopper, 13.3 is needed; pip install 'nvidia-cuda-nvcc>=13.3'"


@cache
def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in get_ptxas(HOPPER).version.split("."))
