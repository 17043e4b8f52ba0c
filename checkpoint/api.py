"""Save and load the state of a run: safe at any moment, readable at any layout.

A checkpoint is a folder of safetensors files and one manifest. A tensor is stored under the name that it has in the
plain model, as boxes in its global index space; nothing in the folder depends on how many processes wrote it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from shardwright.checkpoint.archive import open
from shardwright.checkpoint.exchange import Tree
from shardwright.checkpoint.job import Pending
from shardwright.checkpoint.load import Loader, LoadOptions, LoadReport, open_together
from shardwright.checkpoint.memory import HostMemory, list_memory_steps, locate
from shardwright.checkpoint.save import SaveOptions, Saver
from shardwright.checkpoint.state import State, Stateful, collect, restore
from shardwright.checkpoint.storage import open_storage

Mode = Literal["sync", "async", "overlap"]
_kept: dict[str, Any] = {}  # the saver and the tree of the process group of now
os.register_at_fork(after_in_child=_kept.clear)


def save(
    path: str | Path | HostMemory,
    parts: Mapping[str, Stateful],
    *,
    mode: Mode = "sync",
    options: SaveOptions | None = None,
) -> Pending:
    """Write the state of `parts` to a new checkpoint (collective over the default process group, if there is one).

    Until the last moment, when the manifest appears, the folder is no checkpoint; if it was one before, it stays that.

    Args:
        path: folder to write, created if missing: a local path, or a URL that fsspec knows, such as s3://bucket/run; or
            the memory of the hosts.
        parts: name -> module, torch optimizer, or anything with `state_dict()` whose leaves are tensors, DTensors and
            JSON values.
        mode: `sync` returns when the checkpoint is complete, `async` when the state has been copied to host memory,
            `overlap` at once: call `Pending.wait_staged()` before the state changes, and the copies cost no time
            where there is computation before that.
        options: how; the same on all processes.

    Returns:
        The save. Call its `wait()` to be sure: that raises what went wrong behind.

    Raises:
        CheckpointError: what cannot be saved, or (sync) was not; on all processes.
    """
    saver = _saver(options or SaveOptions())
    storage, state = open_storage(path), State()
    saver.end_last()
    saver.tree.run(lambda: _collect_into(state, parts))
    pending = saver.save(storage, state, bounded=mode == "sync" and saver.options.pipeline is not False)
    if mode == "sync":
        pending.wait()
    elif mode == "async":
        pending.wait_staged()
    return pending


def prepare(path: str | Path, parts: Mapping[str, Stateful], *, options: SaveOptions | None = None) -> None:
    """Plan a first `async` or `overlap` save and begin to allocate its memory, so that it costs what later ones cost.

    Optional; collective like `save`, whose arguments it takes. The optimizer has to have its state by then.

    Raises:
        CheckpointError: what cannot be saved; on all processes.
    """
    saver = _saver(options or SaveOptions())
    state = State()
    saver.tree.run(lambda: _collect_into(state, parts))
    saver.prepare(open_storage(path), state)


def load(
    path: str | Path | HostMemory, parts: Mapping[str, Stateful], *, options: LoadOptions | None = None
) -> LoadReport:
    """Read a checkpoint into `parts`, at whatever layout these have now (collective like `save`).

    Every byte that is used is verified. Tensors are filled in place, cast to the width of float that they have, and
    then handed, with the values, to `load_state_dict`. What else the checkpoint holds is left alone.

    Raises:
        CheckpointError: no complete checkpoint there, a damaged one (`DamagedError`), or one that lacks or mismatches a
            tensor; on all processes. The parts may be partly filled then, and must be loaded from elsewhere.
    """
    options = options or LoadOptions()
    tree, storage = _tree(options.timeout_seconds), open_storage(path)
    manifest, own_files = (
        locate(tree, storage) if isinstance(storage, HostMemory) else (open_together(tree, storage), None)
    )
    state = State()
    tree.run(lambda: _collect_into(state, parts, manifest.tensors))
    report = Loader(tree, storage, state, options, own_files).run(manifest)
    tree.run(lambda: restore(parts, state))
    return report


def steps_in_memory(memory: HostMemory) -> list[int]:
    """Return the steps of which any host has a checkpoint in memory, newest first (collective)."""
    return list_memory_steps(_tree(LoadOptions().timeout_seconds), memory)


def read_values(path: str | Path) -> dict[str, Any]:
    """Return the values (no tensors) of a checkpoint by name, after checking its manifest and file sizes (local).

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    return open(path).values


def _collect_into(state: State, parts: Mapping[str, Stateful], stored: Any = None) -> None:
    found = collect(parts, stored)
    state.tensors.update(found.tensors)
    state.values.update(found.values)


def _saver(options: SaveOptions) -> Saver:
    _forget_old_group()
    saver = _kept.get("saver")
    if saver is None or saver.options != options:
        saver = _kept["saver"] = Saver(options)
    return saver


def _tree(timeout_seconds: float) -> Tree:
    _forget_old_group()
    tree = _kept.get("tree")
    if tree is None or tree.broken or tree.timeout_seconds != timeout_seconds:
        tree = _kept["tree"] = Tree(timeout_seconds)
    return tree


def _forget_old_group() -> None:
    group = dist.group.WORLD if dist.is_initialized() else None
    if _kept.get("group", ()) is not group:
        _kept.clear()
        _kept["group"] = group
