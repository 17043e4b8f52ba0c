"""The data that says how a model family is split: names matched by patterns, never code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Columns:
    """Linear maps of one input below a module, split by output features; their input is gathered once for all.

    Attributes:
        linears: their names relative to the module, in the order in which the model calls them.
        heads: linear -> number of heads that its output must keep whole: with more tensor processes than heads, each
            head is held by several of them.
    """

    linears: tuple[str, ...]
    heads: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A linear map split by input features; its output is summed and scattered along the sequence."""


@dataclass(frozen=True)
class VocabularyEmbedding:
    """An embedding split by vocabulary; its output is summed and scattered along the sequence."""


@dataclass(frozen=True)
class VocabularyHead:
    """An output projection split by vocabulary, whose weight goes through `kernels.linear_cross_entropy`."""


@dataclass(frozen=True)
class SequenceSharded:
    """A module that treats each token on its own (a norm): it has all its weights and a part of the sequence."""


TensorStyle = Columns | Row | VocabularyEmbedding | VocabularyHead | SequenceSharded


@dataclass(frozen=True, kw_only=True)
class Ends:
    """What a pipeline needs to know beside the blocks, which are its permitted cuts.

    Attributes:
        first: modules that only the first stage has; the model takes hidden states for ids where they are missing.
        last: modules that only the last stage has; the model returns hidden states where they are missing. A module
            that is in `first` too is tied: both stages have it, and its gradients are summed.
        hidden_size: features of the hidden states [B, T, hidden_size] that stages pass on.
        attention_width: query heads times head size, for the cost of a block's attention products.
    """

    first: tuple[str, ...]
    last: tuple[str, ...]
    hidden_size: int
    attention_width: int = 0


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """What `apply` needs to know of a model family. A pattern's `*` stays within one level of a module's name.

    Attributes:
        blocks: patterns of the modules that are sharded, gathered, recomputed and put on pipeline stages as one.
        initial_values: pattern of parameter names (`*` crosses levels) -> their distribution; the first match counts.
        tensor: pattern of module names -> how they are split over the tensor axis; None: the family has no such plan.
        ends: what stands before and after the blocks; None: the family cannot be cut into stages.
    """

    blocks: tuple[str, ...]
    initial_values: Mapping[str, Normal | Constant]
    tensor: Mapping[str, TensorStyle] | None = None
    ends: Ends | None = None

    def match_blocks(self, names: Iterable[str]) -> list[str]:
        """Return the module names that are blocks, in order.

        Raises:
            PlanError: a pattern matches nothing.
        """
        names = list(names)
        return [name for pattern in self.blocks for name in match(pattern, names, "blocks")]

    def initial_value(self, parameter: str) -> Normal | Constant:
        """Return the distribution of a parameter's initial values.

        Raises:
            PlanError: no pattern covers the parameter.
        """
        for pattern, value in self.initial_values.items():
            if fnmatchcase(parameter, pattern):
                return value
        raise PlanError(f"parameter {parameter!r} has no initial values in the plan; add a pattern that matches it")


def match(pattern: str, names: Iterable[str], what: str) -> list[str]:
    """Return the names that a pattern of the plan matches, in order.

    Raises:
        PlanError: there are none.
    """
    found = [name for name in names if name.count(".") == pattern.count(".") and fnmatchcase(name, pattern)]
    if not found:
        raise PlanError(f"{what} pattern {pattern!r} matches no module; rename it in the plan or drop it")
    return found
