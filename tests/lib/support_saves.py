"""Saves of a small state in many chunks, and what may happen to them: faults at chosen moments, and what must hold."""

import errno
import os
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from shardwright import checkpoint
from shardwright.checkpoint import FlatSlice, api, archive, files, job, manifest, planner
from shardwright.checkpoint.exchange import Tree
from shardwright.checkpoint.storage import LocalStorage

BLOCK, CHUNK = 4096, 12288


def shrink(monkeypatch, block=BLOCK, chunk=CHUNK, shared=4096):
    """Let a few KiB have many blocks and chunks, in processes forked from now on, too."""
    for module in (files, manifest):
        monkeypatch.setattr(module, "BLOCK_BYTES", block)
    for module in (archive, files, job):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(LocalStorage, "read_bytes", chunk)
    monkeypatch.setattr(api, "_kept", {})  # whose buffers have that size
    monkeypatch.setattr(planner, "_SHARED_BYTES", shared)


class Part:
    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.state = state


SHAPES = {"sharded": ((61, 150), torch.float32), "copied": ((50, 100), torch.bfloat16), "ids": ((13,), torch.int64)}


def whole(seed):
    """The tensors of a state that a number names; none for 0, as before a load."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randint(0, 99, shape, generator=generator).to(d) for name, (shape, d) in SHAPES.items()}
    return {name: tensor * bool(seed) for name, tensor in tensors.items()}


def part_of(seed, rank=0, size=1):
    """What a process holds of a state: a flat run of one tensor, that is cut in the middle of a row, and two whole."""
    tensors = whole(seed)
    flat = tensors["sharded"].flatten()
    bounds = [flat.numel() * r // size for r in range(size + 1)]
    own = flat[bounds[rank] : bounds[rank + 1]].clone()
    sharded = FlatSlice(SHAPES["sharded"][0], bounds[rank], own)
    return Part(sharded=sharded, copied=tensors["copied"], ids=tensors["ids"], seed=seed)


def own_part(seed):
    """What this process holds of a state."""
    return part_of(seed, dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else part_of(seed)


def seed_of(part):
    """The number of the state that a part holds; fails if it is none, bit for bit."""
    seed = part.state["seed"]
    expected = own_part(seed)
    for name, tensor in expected.state.items():
        if name == "sharded":
            tensor, found = tensor.tensor, part.state[name].tensor
        elif name != "seed":
            found = part.state[name]
        else:
            continue
        assert torch.equal(found, tensor), f"{name} is not that of state {seed}"
    return seed


def load_seed(path, **options):
    """Load a checkpoint and return the number of its state."""
    part = own_part(0)
    part.state["seed"] = None
    checkpoint.load(path, {"part": part}, **options)
    return seed_of(part)


def check_folder(folder, allowed):
    """Hold what a save has left behind against what may be there; then clean up, and look again.

    Args:
        folder: of step folders.
        allowed: step -> seeds; None among them: there may be no complete checkpoint.

    Returns:
        Seed by step.
    """
    found = loaded_seeds(folder)
    for step, seeds in allowed.items():
        assert found.get(step) in seeds, f"step {step} holds {found.get(step)}, not one of {seeds}"
    assert found.keys() <= allowed.keys()
    checkpoint.retain(folder, keep=5)
    assert loaded_seeds(folder) == found
    assert {path.name for path in Path(folder).iterdir()} == {f"step_{step:08d}" for step in found}
    newest = Path(folder) / f"step_{max(found):08d}"
    assert {file.name for file in newest.iterdir()} == {manifest.NAME, *checkpoint.open(newest).manifest.files}
    return found


def loaded_seeds(folder):
    return {int(path[-8:]): load_seed(path) for path in checkpoint.find_complete(folder)}


@contextmanager
def at(moment, act):
    """Call `act` at a moment of what this process does, such as ("before", "fsync data", 1): each call has a number.

    ("within", "write data", 2) is when half of the bytes of the second call have been written.
    """
    counts, undo = {}, []

    def watch(owner, name, title):
        inner = getattr(owner, name)

        def watched(*args, **kwargs):
            what = title(args)
            counts[what] = number = counts.get(what, 0) + 1
            if moment == ("before", what, number):
                act()
            if moment == ("within", what, number):
                inner(args[0], args[1][: len(args[1]) // 2], args[2])
                act()
            result = inner(*args, **kwargs)
            if moment == ("after", what, number):
                act()
            return result

        undo.append((owner, name, inner))
        setattr(owner, name, watched)

    for owner, name in [(Tree, "gather"), (Tree, "scatter"), (Tree, "broadcast"), (os, "replace")]:
        watch(owner, name, lambda args, name=name: name)
    for name in ("make", "sizes", "remove"):
        watch(LocalStorage, name, lambda args, name=name: name)
    watch(os, "mkdir", lambda args: "mkdir")
    watch(os, "open", lambda args: f"open {_kind(args[0])}")
    watch(os, "unlink", lambda args: f"unlink {_kind(args[0])}")
    watch(os, "pwrite", lambda args: f"write {_kind(_path(args[0]))}")
    watch(os, "fsync", lambda args: f"fsync {_kind(_path(args[0]))}")
    try:
        yield
    finally:
        for owner, name, inner in undo:
            setattr(owner, name, inner)


def _path(descriptor):
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _kind(path):
    name = Path(path).name
    if name.startswith(manifest.NAME):
        return "manifest"
    return "data" if name.endswith(".safetensors") else "step" if name.startswith("step_") else "folder"


def failing(code):
    """An act: the operating system refuses."""

    def act():
        raise OSError(code, os.strerror(code))

    return act


NO_SPACE, IO_ERROR, NOT_ALLOWED = failing(errno.ENOSPC), failing(errno.EIO), failing(errno.EACCES)
