"""Who writes what: every box once, the load spread over those that hold it.

Planned once by rank 0 from what all processes hold, then kept while nobody's tensors change.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from shardwright.checkpoint.archive import split
from shardwright.checkpoint.box import Box
from shardwright.checkpoint.errors import CheckpointError
from shardwright.checkpoint.exchange import Absent, Tree
from shardwright.checkpoint.files import Entry
from shardwright.checkpoint.manifest import TensorInfo

_SHARED_BYTES = 16 * 2**20  # a box that several processes hold is dealt out to them in parts of this size
_SEED = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, eq=False)
class Held:
    """The boxes that one process holds, as columns: tensor [N] is an index of `infos`, extents [N, 2, D] are padded."""

    infos: dict[str, TensorInfo]
    tensor: np.ndarray
    extents: np.ndarray

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Held:
        """Return the columns of some entries."""
        infos = {entry.name: entry.info for entry in entries}
        index = {name: i for i, name in enumerate(infos)}
        num_dims = max((len(entry.info.shape) for entry in entries), default=0)
        extents = np.zeros((len(entries), 2, num_dims), dtype=np.int64)
        for row, entry in enumerate(entries):
            extents[row, 0, : len(entry.box.offsets)] = entry.box.offsets
            extents[row, 1, : len(entry.box.sizes)] = entry.box.sizes
        return cls(infos, np.array([index[entry.name] for entry in entries], dtype=np.int64), extents)


@dataclass(frozen=True)
class Part:
    """What a process writes: a box, and which of its own pieces it is cut from."""

    entry: Entry
    piece: int


def plan(tree: Tree, entries: Sequence[Entry], max_bytes: int, *, balance: bool) -> list[Part]:
    """Return what this process writes of what it holds (collective).

    Args:
        tree: of the processes.
        entries: the pieces of tensors that this process holds, each box once.
        max_bytes: no part is larger, as far as single rows allow.
        balance: deal out boxes that several hold by bytes; otherwise the first of them writes each.

    Raises:
        CheckpointError: processes hold different tensors under one name, or one did not answer; on all processes.
    """
    held = tree.gather(Held.of(entries))
    answers: Sequence[list[tuple[int, int, int]] | str] | None = None
    if held is not None:
        try:
            answers = assign(held, balance=balance)
        except CheckpointError as error:
            answers = [str(error)] * tree.size
    answer = tree.scatter(answers)
    if isinstance(answer, str):
        raise CheckpointError(answer)
    parts = []
    for row, share, num_shares in answer:
        entry = entries[row]
        boxes = [entry.box] if num_shares == 1 else cut(entry, num_shares)[share : share + 1]
        for box in boxes:
            for small in split(box, max(max_bytes // entry.info.dtype.itemsize, 1)):
                parts.append(Part(Entry(entry.name, entry.info, small), row))
    return parts


def cut(entry: Entry, num_shares: int) -> list[Box]:
    """Cut a box that several hold into at most so many parts along its first long dim; the same on every process."""
    box = entry.box
    dim = next((dim for dim, size in enumerate(box.sizes) if size > 1), None)
    if dim is None:
        return [box]
    step = -(-box.sizes[dim] // num_shares)
    return list(split(box, step * (box.numel // box.sizes[dim])))


def assign(held: Sequence[Held | Absent], *, balance: bool) -> list[list[tuple[int, int, int]]]:
    """Choose one of its holders for every box.

    Boxes that one process alone holds are fixed; then, largest first, each other goes to the holder with the fewest
    bytes so far (worst fit). Large ones are cut into shares first.

    Args:
        held: by rank.
        balance: otherwise the first holder is chosen.

    Returns:
        By rank: (row of its `Held`, share, number of shares) of what it writes.

    Raises:
        CheckpointError: processes hold different tensors under one name, or one is absent.
    """
    present = [h for h in held if isinstance(h, Held)]
    for other in held:
        if isinstance(other, Absent):
            raise CheckpointError(f"no plan of what to save: {other.reason}; see what that rank does")
    rank, row, num_bytes, key = _columns(present)
    order = np.lexsort((rank, key))
    first = np.concatenate(([True], key[order][1:] != key[order][:-1])) if len(order) else np.zeros(0, bool)
    starts = np.flatnonzero(first)
    counts = np.diff(np.append(starts, len(order)))
    chosen: list[list[tuple[int, int, int]]] = [[] for _ in held]
    single = order[starts[(counts == 1) | (not balance)]]
    for r, i in zip(rank[single].tolist(), row[single].tolist(), strict=True):
        chosen[r].append((i, 0, 1))
    if balance:
        load = np.bincount(rank[single], weights=num_bytes[single], minlength=len(held))
        shared = [order[start : start + n] for start, n in zip(starts.tolist(), counts.tolist(), strict=True) if n > 1]
        _deal(shared, rank, row, num_bytes, load.tolist(), chosen)
    return chosen


def _deal(
    shared: list[np.ndarray],
    rank: np.ndarray,
    row: np.ndarray,
    num_bytes: np.ndarray,
    load: list[float],
    chosen: list[list[tuple[int, int, int]]],
) -> None:
    shares = []
    for holders in shared:
        size = int(num_bytes[holders[0]])
        num_shares = max(min(len(holders), -(-size // _SHARED_BYTES)), 1)
        shares += [(-size / num_shares, int(holders[0]), share, num_shares, holders) for share in range(num_shares)]
    heapq.heapify(shares)
    while shares:
        size, _, share, num_shares, holders = heapq.heappop(shares)
        best = min(holders.tolist(), key=lambda i: load[rank[i]])
        load[rank[best]] -= size
        chosen[rank[best]].append((int(row[best]), share, num_shares))


def _columns(held: list[Held]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return rank, row in the rank's `Held`, bytes and identity of every box of all processes."""
    infos: dict[str, TensorInfo] = {}
    ranks, rows, sizes, keys = [], [], [], []
    num_dims = max((h.extents.shape[2] for h in held), default=0)
    for rank, h in enumerate(held):
        for name, info in h.infos.items():
            if infos.setdefault(name, info) != info:
                raise CheckpointError(
                    f"{name} is {info} on rank {rank}, and {infos[name]} on another; all processes must hold parts of "
                    "the same tensors"
                )
        names = np.array([xxhash.xxh3_64_intdigest(name.encode()) for name in h.infos] or [0], dtype=np.uint64)
        widths = np.array([info.dtype.itemsize for info in h.infos.values()] or [0], dtype=np.int64)
        dims = np.array([len(info.shape) for info in h.infos.values()] or [0], dtype=np.int64)
        inside = np.arange(h.extents.shape[2]) < dims[h.tensor][:, None]
        padded = np.zeros((len(h.tensor), 2, num_dims), dtype=np.int64)
        padded[:, :, : h.extents.shape[2]] = h.extents
        ranks.append(np.full(len(h.tensor), rank))
        rows.append(np.arange(len(h.tensor)))
        sizes.append(np.where(inside, h.extents[:, 1], 1).prod(axis=1) * widths[h.tensor])
        keys.append(_mix(names[h.tensor], padded.reshape(len(h.tensor), 2 * num_dims)))
    return np.concatenate(ranks), np.concatenate(rows), np.concatenate(sizes), np.concatenate(keys)


def _mix(key: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Hash rows of integers to 64 bits. Two that collide would leave a hole, which the manifest's check refuses."""
    for column in columns.T:
        key = (key ^ (column.astype(np.uint64) + _SEED)) * np.uint64(0xFF51AFD7ED558CCD)
        key ^= key >> np.uint64(32)
    return key
