"""The data that says how a model family is split: names matched by patterns, never code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase


class PlanError(Exception):
    """A plan and a model do not fit each other. The text is value, rule and remedy."""


@dataclass(frozen=True)
class Normal:
    """Initial values from a normal distribution of mean 0, cut off at three standard deviations."""

    std: float


@dataclass(frozen=True)
class Constant:
    """Initial values that are all alike."""

    value: float


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """What `apply` needs to know of a model family.

    Attributes:
        blocks: patterns of the modules that are sharded and gathered as one.
        initial_values: pattern of parameter names -> their distribution; the first match counts.
    """

    blocks: tuple[str, ...]
    initial_values: Mapping[str, Normal | Constant]

    def match_blocks(self, names: Iterable[str]) -> list[str]:
        """Return the module names that are blocks, in order. A pattern's `*` stays within one level.

        Raises:
            PlanError: a pattern matches nothing.
        """
        names = list(names)
        found: list[str] = []
        for pattern in self.blocks:
            depth = pattern.count(".")
            matches = [name for name in names if name.count(".") == depth and fnmatchcase(name, pattern)]
            if not matches:
                raise PlanError(f"blocks pattern {pattern!r} matches no module; rename it in the plan or drop it")
            found += matches
        return found

    def initial_value(self, parameter: str) -> Normal | Constant:
        """Return the distribution of a parameter's initial values.

        Raises:
            PlanError: no pattern covers the parameter.
        """
        for pattern, value in self.initial_values.items():
            if fnmatchcase(parameter, pattern):
                return value
        raise PlanError(f"parameter {parameter!r} has no initial values in the plan; add a pattern that matches it")
