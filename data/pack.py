"""Documents packed into sequences of a fixed length, and sequences stacked into batches.

Shapes: B sequences, T tokens, N documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shardwright.kernels.linear_cross_entropy import IGNORED


@dataclass(frozen=True)
class Document:
    """A tokenised document and its place in the source."""

    epoch: int
    ordinal: int
    ids: np.ndarray


@dataclass(frozen=True)
class Packed:
    """One sequence of T tokens, and the place in the source of the token after it: (epoch, ordinal, offset)."""

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    after: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A microbatch of packed sequences.

    Attributes:
        ids: int64 [B, T].
        labels: int64 [B, T], the next token of the same document, -100 after its last.
        positions: int64 [B, T], restarting at 0 with every document, and with every sequence.
        bounds: int32 [N + 1], first token of each document in the flattened batch, and B * T.
        longest: tokens of the longest document.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    bounds: torch.Tensor
    longest: int

    def to(self, device: torch.device) -> Batch:
        """Copy to a device, without waiting where the memory is pinned."""
        moved = {k: getattr(self, k).to(device, non_blocking=True) for k in ("ids", "labels", "positions", "bounds")}
        return Batch(**moved, longest=self.longest)

    def pin(self) -> Batch:
        """Copy into page-locked memory, from which a device can read on its own."""
        pinned = {k: getattr(self, k).pin_memory() for k in ("ids", "labels", "positions", "bounds")}
        return Batch(**pinned, longest=self.longest)


def pack(documents: Iterable[Document], length: int, offset: int = 0) -> Iterator[Packed]:
    """Cut a stream of documents into sequences of `length` tokens; each token is predicted exactly once.

    A document may go on in the next sequence, where its positions restart. If the stream ends, the last sequence is
    filled up with tokens that are not predicted.

    Args:
        documents: in order; each ends with its separator.
        length: tokens per sequence.
        offset: tokens of the first document that earlier sequences have used.
    """
    ids, labels, positions = (np.zeros(length, dtype=np.int64) for _ in range(3))
    filled, document = 0, None
    for document in documents:
        while offset < len(document.ids):
            count = min(length - filled, len(document.ids) - offset)
            part = slice(filled, filled + count)
            ids[part] = document.ids[offset : offset + count]
            following = document.ids[offset + 1 : offset + count + 1]
            labels[part] = IGNORED
            labels[filled : filled + len(following)] = following
            positions[part] = np.arange(count)
            filled, offset = filled + count, offset + count
            if filled == length:
                yield Packed(ids.copy(), labels.copy(), positions.copy(), (document.epoch, document.ordinal, offset))
                filled = 0
        offset = 0
    if filled and document is not None:
        ids[filled:], labels[filled:], positions[filled:] = 0, IGNORED, np.arange(length - filled)
        yield Packed(ids, labels, positions, (document.epoch, document.ordinal, len(document.ids)))


def empty_sequence(length: int) -> Packed:
    """Return a sequence that predicts nothing, to fill up a batch."""
    return Packed(np.zeros(length, np.int64), np.full(length, IGNORED), np.arange(length), (0, 0, 0))


def stack(sequences: Sequence[Packed]) -> Batch:
    """Stack sequences into a batch."""
    ids, labels, positions = (
        torch.from_numpy(np.stack([getattr(s, key) for s in sequences])) for key in ("ids", "labels", "positions")
    )
    starts = np.flatnonzero(positions.flatten().numpy() == 0)
    bounds = np.append(starts, positions.numel())
    return Batch(
        ids=ids,
        labels=labels,
        positions=positions,
        bounds=torch.from_numpy(bounds.astype(np.int32)),
        longest=int(np.diff(bounds).max()),
    )
