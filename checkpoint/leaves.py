"""Nested dicts and lists to named tensors and JSON values, and back.

Values are strict JSON. Three things that JSON lacks are spelled out: a tuple is a list, and becomes one again where its
place holds a tuple; a dict whose keys are not all strings is {"$items": [[key, value], ...]}; infinities and NaN are
{"$float": "inf"}.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwright.checkpoint.box import FlatSlice
from shardwright.checkpoint.errors import CheckpointError

_ITEMS, _FLOAT = "$items", "$float"


@dataclass
class State:
    """Named tensors and values.

    Attributes:
        tensors: by dotted name, sharing memory with their owners.
        values: JSON values by dotted name.
    """

    tensors: dict[str, torch.Tensor | FlatSlice] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def put(self, name: str, leaf: Any) -> None:
        """Add a tensor, or a copy of a value.

        Raises:
            CheckpointError: the name is taken, or the leaf is neither a dense tensor nor a JSON value.
        """
        if name in self.tensors or name in self.values:
            raise CheckpointError(f"{name} names two things of the state; keys are joined by dots; rename one of them")
        if is_tensor(leaf):
            _check_tensor(name, leaf)
            self.tensors[name] = leaf
        else:
            self.values[name] = to_json(name, leaf)

    def take(self, name: str, leaf: Any) -> Any:
        """Return what has been loaded in place of a leaf.

        Raises:
            CheckpointError: the checkpoint has no such value.
        """
        return self.tensors[name] if is_tensor(leaf) else as_typed(self.value(name), leaf)

    def value(self, name: str) -> Any:
        """Return a value as it was before it became JSON.

        Raises:
            CheckpointError: the checkpoint has no such value.
        """
        if name not in self.values:
            raise CheckpointError(
                f"the checkpoint has no value {name}; it must come from the same parts; "
                "use the program and config that wrote it"
            )
        return from_json(self.values[name])


def is_tensor(node: Any) -> bool:
    """Tell whether this is stored as a tensor."""
    return isinstance(node, torch.Tensor | FlatSlice)


def visit(name: str, node: Any, leaf: Callable[[str, Any], Any]) -> Any:
    """Return nested dicts and lists with `leaf(name, x)` for every tensor, and for every value that holds none."""
    if _holds_tensor(node) and isinstance(node, dict):
        return {key: visit(f"{name}.{key}", inner, leaf) for key, inner in node.items()}
    if _holds_tensor(node) and isinstance(node, list | tuple):
        items = [visit(f"{name}.{index}", inner, leaf) for index, inner in enumerate(node)]
        return tuple(items) if isinstance(node, tuple) else items
    return leaf(name, node)


def to_json(name: str, value: Any) -> Any:
    """Return a copy of a value in strict JSON; `from_json` inverts it but for tuples, which become lists.

    Args:
        name: of the value, for the message.
        value: None, bool, number, str, or lists, tuples and dicts of these; numpy scalars and one-element tensors count
            as numbers.

    Raises:
        CheckpointError: it holds anything else.
    """
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return [to_json(f"{name}.{index}", item) for index, item in enumerate(value)]
    if isinstance(value, dict) and not value.keys() & {_ITEMS, _FLOAT}:
        if all(isinstance(key, str) for key in value):
            return {key: to_json(f"{name}.{key}", inner) for key, inner in value.items()}
        if all(key is None or isinstance(key, bool | int | float | str) for key in value):
            return {_ITEMS: [[to_json(name, key), to_json(f"{name}.{key}", inner)] for key, inner in value.items()]}
    text = repr(value)
    raise CheckpointError(
        f"{name} is a {type(value).__name__} ({text[:57] + '...' if len(text) > 60 else text}); a value is None, a "
        "bool, a number, a str, or lists, tuples and dicts of these; leave it out of state_dict(), or turn it into one"
    )


def from_json(value: Any) -> Any:
    """Return the value that `to_json` was given."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _FLOAT in value:
        return float(value[_FLOAT])
    pairs = [map(from_json, pair) for pair in value[_ITEMS]] if _ITEMS in value else value.items()
    return {key: from_json(inner) for key, inner in pairs}


def as_typed(value: Any, current: Any) -> Any:
    """Return a loaded value in the types that its place has now, where JSON knows fewer.

    Lists become tuples and dicts become counters and the like; numbers are filled into tensors.
    """
    if isinstance(current, torch.Tensor):
        return current.fill_(value)
    if isinstance(value, dict) and isinstance(current, dict):
        typed = copy.copy(current)
        typed.clear()
        typed.update({key: as_typed(inner, current.get(key)) for key, inner in value.items()})
        return typed
    if isinstance(value, list) and isinstance(current, list | tuple):
        items = [as_typed(x, y) for x, y in itertools.zip_longest(value, current[: len(value)])]
        return tuple(items) if isinstance(current, tuple) else items
    return value


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor, aside of autograd."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _holds_tensor(node: Any) -> bool:
    if isinstance(node, dict):
        return any(map(_holds_tensor, node.values()))
    if isinstance(node, list | tuple):
        return any(map(_holds_tensor, node))
    return is_tensor(node)


def _check_tensor(name: str, tensor: torch.Tensor | FlatSlice) -> None:
    local = local_part(tensor.tensor if isinstance(tensor, FlatSlice) else tensor)
    if type(local) not in (torch.Tensor, nn.Parameter) or local.layout != torch.strided or local.is_meta:
        raise CheckpointError(
            f"{name} is a {type(local).__name__} of layout {local.layout} on {local.device}; a checkpoint holds dense "
            "tensors that have memory; convert it in state_dict(), or give a module on meta memory by to_empty()"
        )
