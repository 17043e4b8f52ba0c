"""From what a program hands in to named tensors and values, and back.

Names are `<part>.<dotted name>`, as in the plain model: without what DDP, torch.compile and activation
checkpointing add.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from shardwright.checkpoint.leaves import State, visit
from shardwright.checkpoint.modules import parameter_owners, plain_names
from shardwright.checkpoint.optimizers import OptimizerPart

__all__ = ["State", "Stateful", "collect", "restore"]


class Stateful(Protocol):
    """Anything with a state: modules and optimizers of torch, and one's own."""

    def state_dict(self) -> dict[str, Any]:
        """Return nested dicts and lists of tensors, DTensors and JSON values; tensors share memory with the owner."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take the same nested dicts back, filled."""
        ...


def collect(parts: Mapping[str, Stateful], stored: Collection[str] | None = None) -> State:
    """Return the state of parts by name (local).

    A plain tensor is taken to be the same on all processes that have one of this name.

    Args:
        parts: modules and torch optimizers, and anything else with a state. The modules whose parameters an optimizer
            updates must be among them.
        stored: to save, None. To load, the names of the checkpoint's tensors: an optimizer that has made no step yet
            creates what these say that it kept, and what they lack is not asked for.

    Raises:
        CheckpointError: something that cannot be stored, by its name; or an optimizer that keeps other things than the
            stored one did.
    """
    state = State()
    for part, owner in parts.items():
        if not isinstance(owner, Optimizer):
            content = owner.state_dict()
            first: dict[str, str] = {}
            for key, name in _names(part, owner, content).items():
                first.setdefault(name, key)
            for name, key in first.items():
                visit(name, content[key], state.put)
    for optimizer in _optimizers(parts):
        optimizer.collect(state, stored)
    return state


@torch.no_grad()
def restore(parts: Mapping[str, Stateful], state: State) -> None:
    """Hand a loaded state to the parts that it was collected from (local).

    Args:
        parts: as given to `collect`.
        state: what `collect(parts, stored)` returned, its tensors filled in place and its values replaced by those of
            the checkpoint.

    Raises:
        CheckpointError: a value is missing, or an optimizer's groups do not fit. Parts may be partly restored then.
    """
    for part, owner in parts.items():
        if not isinstance(owner, Optimizer):
            content = owner.state_dict()
            names = _names(part, owner, content)
            content = copy.copy(content)  # of the same kind: torch attaches the versions of modules to it
            content.update({key: visit(name, content[key], state.take) for key, name in names.items()})
            owner.load_state_dict(content)
    for optimizer in _optimizers(parts):
        optimizer.restore(state)


def _names(part: str, owner: Any, content: Mapping[str, Any]) -> dict[str, str]:
    """Return key of a part's state -> dotted name."""
    names = plain_names(part, owner, content) if isinstance(owner, nn.Module) else {key: key for key in content}
    return {key: f"{part}.{name}" for key, name in names.items()}


def _optimizers(parts: Mapping[str, Stateful]) -> list[OptimizerPart]:
    owners = parameter_owners(parts)
    return [OptimizerPart(part, owner, owners) for part, owner in parts.items() if isinstance(owner, Optimizer)]
