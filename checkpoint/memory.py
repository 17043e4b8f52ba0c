"""Checkpoints in the memory of the hosts: made often, each part on two hosts, read again after a process has failed.

Source: MegaScale's two stages (arXiv 2402.15627, section 4.4), ByteRobust's backups outside one's own groups (arXiv
2509.16293, section 6).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardwright.checkpoint import manifest as manifests
from shardwright.checkpoint.errors import CheckpointError
from shardwright.checkpoint.exchange import Tree
from shardwright.checkpoint.files import make_buffer, view
from shardwright.checkpoint.folders import list_steps
from shardwright.checkpoint.manifest import Manifest
from shardwright.checkpoint.storage import CHUNK_BYTES, LocalStorage


class HostMemory(LocalStorage):
    """A folder in memory (tmpfs) that every host has for itself; what a process writes there is copied to another host.

    Args:
        folder: on every host, such as one below /dev/shm.
        hosts: name of the host of every rank.
        shift: rank r's files are backed up by rank r + shift (see `choose_shift`); 0: not at all.
    """

    shared = False

    def __init__(self, folder: Path, hosts: Sequence[str], shift: int) -> None:
        super().__init__(folder)
        self.hosts, self.shift = hosts, shift

    def child(self, name: str) -> HostMemory:
        """Return the storage of a folder in this one."""
        return HostMemory(Path(self.path) / name, self.hosts, self.shift)

    def is_first(self, rank: int) -> bool:
        """Whether a rank is the first one of its host."""
        return self.hosts.index(self.hosts[rank]) == rank


def choose_shift(hosts: Sequence[str], coordinates: np.ndarray | None = None) -> int:
    """Return k such that rank r + k lies on another host than r, for all or else for most r; 0 if there is one host.

    Of several, the one whose pairs share a group least often: ranks that differ in one coordinate only are in a group.

    Args:
        hosts: name of the host of every rank.
        coordinates: [ranks, axes] in the mesh, if any.
    """
    names, size = np.unique(np.array(hosts), return_inverse=True)[1], len(hosts)
    best, best_cost = 0, (size, 0)
    for shift in range(1, size):
        same_host = int((names == np.roll(names, -shift)).sum())
        differing = 2 if coordinates is None else (coordinates != np.roll(coordinates, -shift, axis=0)).sum(axis=1)
        cost = (same_host, int((np.asarray(differing) < 2).sum()))
        if same_host < size and cost < best_cost:
            best, best_cost = shift, cost
    return best


def mirror(tree: Tree, storage: HostMemory, names: Sequence[str]) -> None:
    """Copy one's files to the backup's host, and take those that one is the backup of (collective).

    Raises:
        CheckpointError: the files that arrive cannot be written.
    """
    if not storage.shift:
        return
    to, source = (tree.rank + storage.shift) % tree.size, (tree.rank - storage.shift) % tree.size
    sizes = storage.sizes()
    error: CheckpointError | None = None
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(_send_files, tree, storage, [(name, sizes[name]) for name in names], to)
        for name, size in _receive_object(tree, source):
            chunks = _receive_chunks(tree, size, source)
            try:
                storage.write(name, size, chunks)
            except CheckpointError as failure:
                error = error or failure
                for _ in chunks:  # or the sender would wait for ever
                    pass
        sending.result()
    if error is not None:
        raise error


def list_memory_steps(tree: Tree, memory: HostMemory) -> list[int]:
    """Return the steps of which any host has a manifest, newest first (collective)."""
    own = {step for step in list_steps(memory) if manifests.NAME in memory.child(step).sizes()}
    return sorted({int(step.rpartition("_")[2]) for steps in tree.agree(own) for step in steps}, reverse=True)


def locate(tree: Tree, storage: HostMemory) -> tuple[Manifest, set[str]]:
    """Return the manifest of a checkpoint in memory, and which of its files this process can read (collective).

    Raises:
        CheckpointError: a file is on no host that is left; on all processes.
    """
    sizes = storage.sizes()
    found = tree.agree(manifests.NAME in sizes)
    path = f"{storage.path}/{manifests.NAME}"
    if True not in found:
        raise CheckpointError(f"{path} is on no host; use another checkpoint")
    data = tree.agree(storage.read_all(manifests.NAME) if tree.rank == found.index(True) else None)
    manifest = manifests.decode(data[found.index(True)], path)
    own = {name for name, size in manifest.files.items() if sizes.get(name) == size}
    lost = manifest.files.keys() - set().union(*tree.agree(own))
    if lost:
        raise CheckpointError(f"{storage.path}: {', '.join(sorted(lost))} went with the hosts; use another checkpoint")
    return manifest, own


def _send_files(tree: Tree, storage: HostMemory, files: list[tuple[str, int]], to: int) -> None:
    _send_object(tree, files, to)
    buffer = make_buffer(CHUNK_BYTES, pinned=False)
    for name, size in files:
        for start in range(0, size, CHUNK_BYTES):
            count = min(CHUNK_BYTES, size - start)
            storage.read(name, start, view(buffer, count))
            tree.isend(buffer[:count], to, tag=0).wait()


def _receive_chunks(tree: Tree, size: int, source: int) -> Iterator[memoryview]:
    buffer = make_buffer(CHUNK_BYTES, pinned=False)
    for start in range(0, size, CHUNK_BYTES):
        count = min(CHUNK_BYTES, size - start)
        tree.irecv(buffer[:count], source, tag=0).wait()
        yield view(buffer, count)


def _send_object(tree: Tree, value: Any, to: int) -> None:
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    tree.isend(torch.tensor([data.numel()]), to, tag=0).wait()
    tree.isend(data, to, tag=0).wait()


def _receive_object(tree: Tree, source: int) -> Any:
    size = torch.zeros(1, dtype=torch.int64)
    tree.irecv(size, source, tag=0).wait()
    data = torch.empty(int(size), dtype=torch.uint8)
    tree.irecv(data, source, tag=0).wait()
    return pickle.loads(data.numpy().tobytes())
