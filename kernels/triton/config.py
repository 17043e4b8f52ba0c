"""Which of its configurations a kernel is launched with: what was measured on this kind of GPU, else the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch

from shardwright.kernels.measured import gpu_name, measured


@dataclass(frozen=True, kw_only=True, eq=False)
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

    @cached_property
    def arguments(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass
class Choice:
    """What one kernel is launched with in one situation, and what it could be."""

    kernel: str
    key: str
    configs: Sequence[Config]
    config: Config


_choices: dict[tuple[str, str, torch.device], Choice] = {}


def pick(kernel: str, key: str, configs: Callable[[], Sequence[Config]], device: torch.device) -> Config:
    """Return the configuration to launch a kernel with.

    Args:
        kernel: its name.
        key: the situation that was measured, such as `head_dim=128`.
        configs: returns all that may be picked, the best guess first.
        device: where it runs.
    """
    choice = _choices.get((kernel, key, device))
    if choice is None:
        offered = configs()
        fastest = measured(gpu_name(device))["configs"].get(kernel, {}).get(key)
        config = next((config for config in offered if config.arguments == fastest), offered[0])
        choice = _choices[kernel, key, device] = Choice(kernel, key, offered, config)
    return choice.config


@contextmanager
def new_choices() -> Iterator[list[Choice]]:
    """Give the choices that are made for the first time inside; to change their `config` is to launch another."""
    before, found = set(_choices), []
    yield found
    found += [choice for key, choice in _choices.items() if key not in before]
