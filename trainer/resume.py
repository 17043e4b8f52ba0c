"""Which checkpoint a run starts from, and the state beside the engine's that it restores."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch.distributed as dist

from shardwright import checkpoint
from shardwright.checkpoint import CheckpointError, DamagedError, HostMemory, Stateful
from shardwright.conf import ConfigError
from shardwright.conf.schema import CheckpointConfig
from shardwright.data.loader import Position

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is, and under which name Weights & Biases knows it."""

    step: int = 0
    tokens: int = 0
    wandb_id: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the saved fields, but keep the config that this run was started with, and log where it differs."""
        self.step, self.tokens, self.wandb_id = state["step"], state["tokens"], state["wandb_id"]
        changes = list(_differences(state["config"], self.config))
        if changes:
            logger.info(f"changed since the checkpoint: {', '.join(changes)}")


class DataPosition:
    """The loader's position as JSON values: the cursor and the place of every lane.

    Args:
        position: where the data begins if nothing is loaded.
        current: reads the complete position when a checkpoint is saved (collective).
    """

    def __init__(self, position: Position) -> None:
        self.position = position
        self.current: Callable[[], Position] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position now."""
        position = self.current() if self.current else self.position
        return {"cursor": position.cursor, "lanes": position.lanes.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved position."""
        self.position = Position(state["cursor"], np.array(state["lanes"], dtype=np.int64))


def find_candidates(config: CheckpointConfig) -> list[str]:
    """Return the checkpoints to try, best first; needs no processes.

    A path is where a run begins: once it has checkpoints of its own, the same command goes on from these.

    Raises:
        ConfigError: what was asked for contradicts the checkpoints that the folder holds.
        CheckpointError: the path asked for is no complete checkpoint.
    """
    own = checkpoint.find_complete(config.folder)
    if config.resume == "auto":
        return own
    if config.resume == "none":
        if own:
            raise ConfigError(
                f"checkpoint.resume=none, but checkpoint.folder={config.folder} holds {_name(own[0])}; a fresh run "
                "needs a fresh folder; choose another run.name, or drop checkpoint.resume to go on"
            )
        return []
    path = config.resume.rstrip("/")
    if _real(path) in [_real(other) for other in own[1:]]:
        raise ConfigError(
            f"checkpoint.resume={path} lies in this run's own folder, which goes on to {_name(own[0])}; a run that "
            "goes back needs its own folder; choose another run.name, or drop checkpoint.resume to go on from there"
        )
    if own:
        logger.info(f"checkpoint.resume={path} is where this run began; it goes on from its own checkpoints")
        return own
    try:
        checkpoint.read_values(path)
    except CheckpointError as error:
        raise type(error)(f"checkpoint.resume={config.resume}: {error}{_offer(path)}") from None
    return [path]


def restore(
    candidates: list[str], parts: Mapping[str, Stateful], memory: HostMemory | None, *, automatic: bool
) -> str | None:
    """Load the first candidate that is whole (collective: all processes try what rank 0 has found).

    Args:
        candidates: best first; empty for a fresh start.
        parts: filled from the checkpoint.
        memory: of the hosts; what it holds comes first if it is newer.
        automatic: fall back to the next candidate if one is damaged, and say so.

    Raises:
        CheckpointError: none could be loaded, or the run does not fit it.
    """
    found = [candidates, [_is_weights_only(path) for path in candidates]]
    dist.broadcast_object_list(found)
    candidates, weights_only = found
    if memory is not None and automatic and (path := _load_from_memory(memory, candidates, parts)):
        return path
    for path, only_weights in zip(candidates, weights_only, strict=True):
        try:
            report = checkpoint.load(path, {"model": parts["model"]} if only_weights else parts)
        except DamagedError as damage:
            if not automatic:
                raise DamagedError(f"{damage}{_offer(path)}") from None
            logger.warning(f"passed over: {damage}")
            continue
        if only_weights:
            logger.info(f"{path} holds weights only: the optimizer, the data and the step count begin afresh")
        logger.info(f"read {report.read_bytes / 2**30:.2f} GiB of {path} on this process")
        return path
    if candidates:
        raise CheckpointError(
            f"every checkpoint in {candidates[0].rpartition('/')[0]} is damaged (see above); "
            "repair one, or start afresh with another run.name"
        )
    return None


def _is_weights_only(path: str) -> bool:
    """Whether a checkpoint was imported from a format that has nothing else; what cannot be read counts as ours."""
    try:
        return "optimizer.num_updates" not in checkpoint.read_values(path)
    except CheckpointError:
        return False


def _load_from_memory(memory: HostMemory, candidates: list[str], parts: Mapping[str, Stateful]) -> str | None:
    newest = max((int(_name(path).rpartition("_")[2]) for path in candidates), default=-1)
    for step in checkpoint.steps_in_memory(memory):
        storage = memory.child(_name(checkpoint.step_folder("", step)))
        if step <= newest:
            continue
        try:
            checkpoint.load(storage, parts)
        except CheckpointError as error:
            logger.warning(f"passed over: {error}")
            continue
        return storage.path
    return None


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path} {old} -> {new}"


def _offer(path: str) -> str:
    """Name the newest complete checkpoint that can be used instead of a path."""
    for other in [*checkpoint.find_complete(path.rpartition("/")[0] or "."), *checkpoint.find_complete(path)]:
        if other == path:
            continue
        try:
            checkpoint.read_values(other)
        except CheckpointError:
            continue
        return f" (complete: checkpoint.resume={other})"
    return ""


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _real(path: str) -> str:
    return path if "://" in path else os.path.realpath(path)
