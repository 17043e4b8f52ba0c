"""The names that modules have in the plain model, whatever wraps them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from shardwright.checkpoint.errors import CheckpointError


def plain_names(part: str, module: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Return key of the module's state -> name in the plain model; a shared tensor has its first name under all keys.

    Args:
        part: what the module is called, for the message.
        module: any, wrapped or not.
        keys: of its `state_dict()`.

    Raises:
        CheckpointError: the module is sharded by FSDP1.
    """
    if any(isinstance(inner, FullyShardedDataParallel) for inner in module.modules()):
        raise CheckpointError(f"{part} is sharded by FullyShardedDataParallel (FSDP1); use fully_shard (FSDP2)")
    first: dict[torch.Tensor, str] = {}
    names = {key: _plain_name(module, key) for key in keys}
    members = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    shared = {name: first.setdefault(tensor, name) for name, tensor in _plain(module, itertools.chain(*members))}
    return {key: shared.get(name, name) for key, name in names.items()}


def parameter_owners(parts: Mapping[str, Any]) -> dict[nn.Parameter, tuple[str, str]]:
    """Return parameter -> (part, name in the plain model) over the modules among the parts.

    Call it after `state_dict()` of the modules, which puts FSDP2's shards, that optimizers know, back into place.
    """
    owners: dict[nn.Parameter, tuple[str, str]] = {}
    for part, module in parts.items():
        if isinstance(module, nn.Module):
            for name, parameter in _plain(module, module.named_parameters()):
                owners.setdefault(parameter, (part, name))
    return owners


def _plain(module: nn.Module, members: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    return ((_plain_name(module, key), member) for key, member in members)


def _plain_name(module: nn.Module | None, key: str) -> str:
    """Return a key of a module without the segments that wrappers add."""
    kept = []
    for segment in key.split("."):
        inner = _wrapped(module)
        while module is not None and inner is not None and segment != inner:  # a wrapper that keeps itself out of keys
            module = module._modules[inner]
            inner = _wrapped(module)
        if inner is None:
            kept.append(segment)
        module = None if module is None else module._modules.get(segment)
    return ".".join(kept)


def _wrapped(module: nn.Module | None) -> str | None:
    """Return under which name a wrapper holds its module; None if this is no wrapper."""
    if module is None:
        return None
    if isinstance(module, DistributedDataParallel | DataParallel):
        return "module"
    hidden = "_orig_mod", "_checkpoint_wrapped_module"  # of torch.compile and of activation checkpointing
    return next((name for name in hidden if name in module._modules), None)
