"""What an op is: one reference in plain torch, and candidates that say where they cannot run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from shardwright.kernels.measured import measured

logger = logging.getLogger(__name__)


class KernelError(Exception):
    """A kernel was asked for by name that cannot run here. The text is value, rule and remedy."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What a candidate may depend on.

    Attributes:
        device: its type.
        dtype: of the activations.
        sizes: those that the op's file names.
        gpu: what the GPU calls itself.
    """

    device: str
    dtype: torch.dtype
    sizes: Mapping[str, int | None] = field(default_factory=dict)
    gpu: str | None = None


def lacks_triton(situation: Situation) -> str | None:
    """Return why no Triton kernel can run in a situation, or None."""
    if situation.device != "cuda":
        return "needs a CUDA device"
    if find_spec("triton") is None:
        return "needs Triton; pip install 'shardwright[gpu]'"
    floating = (torch.bfloat16, torch.float16, torch.float32)
    return None if situation.dtype in floating else "needs bf16, fp16 or fp32"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A faster implementation of an op.

    Attributes:
        name: in the config.
        function: called as the reference is.
        unsupported: returns why it cannot run in a situation, or None.
        lossy: whether it rounds more than the dtype of its arguments does; such a one is taken by name only.
    """

    name: str
    function: Callable[..., Any]
    unsupported: Callable[[Situation], str | None]
    lossy: bool = False


@dataclass(frozen=True, kw_only=True)
class Op:
    """An operation of the model: a reference that runs everywhere, and candidates, the likely fastest first."""

    name: str
    reference: Callable[..., Any]
    candidates: tuple[Candidate, ...] = ()

    def choose(self, wanted: str, situation: Situation) -> Callable[..., Any]:
        """Return the implementation to use for a whole run, and log what was chosen and what was refused.

        Args:
            wanted: a name, or `auto` for the fastest that runs: as was measured on this kind of GPU, else the first.
            situation: where and on what it will run.

        Raises:
            KernelError: the name is unknown, or cannot run in this situation.
        """
        refusals = {c.name: c.unsupported(situation) for c in self.candidates}
        functions = {c.name: c.function for c in self.candidates} | {"reference": self.reference}
        fastest = measured(situation.gpu)["order"].get(self.name, [])
        if wanted == "auto":
            refusals |= {c.name: "lossy, by name only" for c in self.candidates if c.lossy}
            order = (name for name in (*fastest, *functions) if name in functions)
            name = next(name for name in order if refusals.get(name) is None)
            why = "the fastest measured on this kind of GPU" if name in fastest else "the first that runs"
        elif wanted not in functions:
            raise KernelError(
                f"kernels.{self.name}={wanted} is no implementation of it; use auto, {', '.join(functions)}"
            )
        elif refusals.get(wanted):
            raise KernelError(f"kernels.{self.name}={wanted} cannot run here: {refusals[wanted]}; use auto")
        else:
            name, why = wanted, "by name"
        refused = "; ".join(f"{other}: {reason}" for other, reason in refusals.items() if reason and other != name)
        logger.info("kernel %s: %s, %s%s", self.name, name, why, f" (refused {refused})" if refused else "")
        return functions[name]
