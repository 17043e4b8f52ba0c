"""The checkpoints of a run: one folder per step, and which of them to keep."""

from __future__ import annotations

from pathlib import Path

from shardwright.checkpoint import manifest as manifests
from shardwright.checkpoint.errors import CheckpointError
from shardwright.checkpoint.storage import Storage, open_storage

_PREFIX = "step_"


def step_folder(folder: str | Path, step: int) -> str:
    """Return where the checkpoint of a step belongs."""
    return f"{str(folder).rstrip('/')}/{_PREFIX}{step:08d}"


def find_complete(folder: str | Path) -> list[str]:
    """Return the checkpoints of a run, newest first: the step folders that have a manifest, damaged or not."""
    storage = open_storage(folder)
    names = [name for name in list_steps(storage) if manifests.NAME in storage.child(name).sizes()]
    return [f"{str(folder).rstrip('/')}/{name}" for name in names]


def retain(
    folder: str | Path | Storage, keep: int, keep_every_steps: int | None = None, *, newest: int | None = None
) -> None:
    """Delete all but the newest `keep` checkpoints and those of every M-th step, and what unfinished saves left behind.

    Call on one process while no save is under way. A manifest goes first, so that a half-deleted checkpoint is never
    taken for a complete one. In the newest checkpoint, files that it does not name go, too.

    Args:
        folder: of the run's checkpoints.
        keep: how many of the newest to keep.
        keep_every_steps: M; None: no others.
        newest: step of the newest one that counts. A run that passed over damaged ones must not keep these instead of
            its own; they stay until it has come as far.
    """
    storage = open_storage(folder)
    num_complete = 0
    for name in list_steps(storage):
        if newest is not None and int(name.removeprefix(_PREFIX)) > newest:
            continue
        child = storage.child(name)
        complete = manifests.NAME in child.sizes()
        num_complete += complete
        milestone = keep_every_steps is not None and int(name.removeprefix(_PREFIX)) % keep_every_steps == 0
        if not complete or (num_complete > keep and not milestone):
            child.remove([manifests.NAME])
            child.remove_folder()
        elif num_complete == 1:
            _remove_strays(child)


def _remove_strays(storage: Storage) -> None:
    """Delete what saves that did not end left in a folder that has become a checkpoint nevertheless."""
    try:
        named = manifests.decode(storage.read_all(manifests.NAME), storage.path).files
    except CheckpointError:  # damaged, or of another format
        return
    storage.remove(storage.sizes().keys() - {manifests.NAME, *named})


def list_steps(storage: Storage) -> list[str]:
    """Return the names of the step folders, newest first."""
    names = [name for name in storage.folders() if name.removeprefix(_PREFIX).isdecimal() and name.startswith(_PREFIX)]
    return sorted(names, key=lambda name: int(name.removeprefix(_PREFIX)), reverse=True)
