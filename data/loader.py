"""Global batches in an order that depends on nothing but the source, the seed and a cursor.

Documents are dealt to a fixed number of lanes: lane l of L packs documents l, l + L, l + 2L, ... into sequences, on its
own. Global sequence n is the next one of lane n mod L. A data-parallel process of R owns the lanes l with l mod R equal
to its data rank, and tokenises only their documents. So every layout sees the same sequences, none tokenises what it
does not train on, and the place in the data is a table of L cursors, which any number of processes can share out anew.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shardwright.data.errors import DataError
from shardwright.data.pack import Batch, Document, Packed, empty_sequence, pack, stack
from shardwright.data.source import Documents
from shardwright.data.tokenize import Tokenizer


@dataclass(frozen=True)
class Position:
    """Where a loader stands: sequences dealt so far, and (epoch, ordinal, offset) of every lane, int64 [L, 3]."""

    cursor: int
    lanes: np.ndarray

    @classmethod
    def start(cls, num_lanes: int) -> Position:
        """Return the beginning: lane l at document l of epoch 0."""
        lanes = np.zeros((num_lanes, 3), dtype=np.int64)
        lanes[:, 1] = np.arange(num_lanes)
        return cls(0, lanes)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a process takes of each global batch."""

    sequence_length: int
    global_batch_sequences: int
    microbatch_sequences: int
    data_rank: int
    data_degree: int

    def owns(self, lane: int) -> bool:
        """Whether this process deals the sequences of a lane."""
        return lane % self.data_degree == self.data_rank


def lane_documents(
    documents: Documents, tokenizer: Tokenizer, num_lanes: int, lane: int, place: tuple[int, int]
) -> Iterator[Document]:
    """Yield the tokenised documents of one lane from (epoch, ordinal) on, for ever; empty texts are passed over.

    Raises:
        DataError: two epochs in a row hold no text for the lane.
    """
    epoch, ordinal = place
    last_seen = epoch
    while epoch - last_seen < 3:
        text = documents.read(epoch, ordinal)
        if text is None:
            epoch, ordinal = epoch + 1, lane
            continue
        if text:
            last_seen = epoch
            yield Document(epoch, ordinal, tokenize_document(tokenizer, text))
        ordinal += num_lanes
    raise DataError(
        f"data: lane {lane} of {num_lanes} finds no text in a whole epoch; the source has too few documents for "
        f"train.global_batch_sequences={num_lanes}; add documents or lower it"
    )


def tokenize_document(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return a document's ids with the separator at its end."""
    return np.append(tokenizer.encode(text), tokenizer.end_id)


class Loader:
    """Iterate over this process's microbatches of each global batch, made ahead by a thread.

    Args:
        documents: the source.
        tokenizer: text to ids.
        share: what this process takes.
        position: where to go on; `position` afterwards is the place after the last batch that was handed out.
        prefetch_batches: global batches made ahead.
        pin_memory: hand out page-locked tensors.

    Raises:
        DataError: the lanes cannot be shared out evenly.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        share: Share,
        position: Position,
        *,
        prefetch_batches: int = 2,
        pin_memory: bool = False,
    ) -> None:
        num_lanes = len(position.lanes)
        if num_lanes % share.data_degree:
            raise DataError(
                f"the data was dealt to {num_lanes} lanes when the run began; the data-parallel degree must divide "
                f"that, and is {share.data_degree}; resume with a degree that does"
            )
        self.position = position
        self._share, self._pin = share, pin_memory
        self._lanes = {
            lane: pack(
                lane_documents(documents, tokenizer, num_lanes, lane, (int(place[0]), int(place[1]))),
                share.sequence_length,
                int(place[2]),
            )
            for lane, place in enumerate(position.lanes)
            if share.owns(lane)
        }
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=prefetch_batches)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(position,), daemon=True, name="loader")
        self._thread.start()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """Return the microbatches of the next global batch; raises what went wrong while making it."""
        made = self._ready.get()
        if isinstance(made, BaseException):
            raise made
        batches, self.position = made
        return batches

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue

    def _work(self, position: Position) -> None:
        try:
            while not self._closed.is_set():
                batches, position = self._make(position)
                self._ready.put((batches, position))
        except Exception as error:
            self._ready.put(error)

    def _make(self, position: Position) -> tuple[list[Batch], Position]:
        share, lanes = self._share, position.lanes.copy()
        end = position.cursor + share.global_batch_sequences
        sequences: list[Packed] = []
        for lane in (n % len(lanes) for n in range(position.cursor, end)):
            if share.owns(lane):
                sequence = next(self._lanes[lane])
                lanes[lane] = sequence.after
                sequences.append(sequence)
        size = share.microbatch_sequences
        batches = [stack(sequences[i : i + size]) for i in range(0, len(sequences), size)]
        return [batch.pin() for batch in batches] if self._pin else batches, Position(end, lanes)


def merge_lanes(position: Position, share: Share, add_up: Callable[[torch.Tensor], torch.Tensor]) -> Position:
    """Return the position with every lane's cursor, not only those of this process's own (collective: `add_up`)."""
    own = np.array([share.owns(lane) for lane in range(len(position.lanes))])
    lanes = add_up(torch.from_numpy(position.lanes * own[:, None]))
    return Position(position.cursor, lanes.numpy())


def held_out_batches(texts: list[str], tokenizer: Tokenizer, share: Share, num_batches: int) -> list[list[Batch]]:
    """Pack the held-out texts, in order, into at most `num_batches` global batches; return this process's part.

    The sequences are the same for every layout; the last batch is filled up with sequences that predict nothing.
    """
    documents = (Document(0, i, tokenize_document(tokenizer, text)) for i, text in enumerate(texts) if text)
    size = share.global_batch_sequences
    sequences = [s for s, _ in zip(pack(documents, share.sequence_length), range(num_batches * size), strict=False)]
    sequences += [empty_sequence(share.sequence_length)] * (-len(sequences) % size)
    per_step = []
    for start in range(0, len(sequences), size):
        own = sequences[start : start + size][share.data_rank :: share.data_degree]
        step = share.microbatch_sequences
        per_step.append([stack(own[i : i + step]) for i in range(0, len(own), step)])
    return per_step
