"""The text of a run: its tokenizer, its training documents and its held-out part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shardwright.conf.schema import FilesDataConfig, HubDataConfig, StdlibDataConfig
from shardwright.data import source
from shardwright.data.errors import DataError
from shardwright.data.loader import Position, Share
from shardwright.data.tokenize import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Text:
    """Attributes: `open` gives the training documents for a loader that goes on at a position."""

    open: Callable[[Position, Share], source.Documents]
    held_out: list[str]
    tokenizer: Tokenizer


def load_text(
    config: StdlibDataConfig | FilesDataConfig | HubDataConfig, *, vocab_size: int, num_lanes: int, seed: int
) -> Text:
    """Open the source and the tokenizer (local: no processes needed).

    Args:
        config: the `data` group.
        vocab_size: of the model.
        num_lanes: sequences of a global batch, each of which needs documents of its own.
        seed: of the order of the documents.

    Raises:
        DataError: a part cannot be read, or is too small.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size} is smaller than the {tokenizer.vocab_size} tokens of "
            f"data.tokenizer={config.tokenizer}; set model.vocab_size to at least that"
        )
    if isinstance(config, HubDataConfig):
        return _streamed(source.open_hub(config), config.holdout_documents, tokenizer)
    if isinstance(config, StdlibDataConfig):
        dataset, text_field = source.load_stdlib(), "text"
    else:
        dataset, text_field = source.load_files(config), config.text_field
    documents, held_out = source.split_holdout(dataset, text_field, config.holdout_documents, seed)
    if len(documents) < num_lanes:
        raise DataError(
            f"data={config.kind}: {len(documents)} documents for training; each sequence of a global batch needs its "
            f"own, and train.global_batch_sequences={num_lanes}; add documents or lower it"
        )
    return Text(open=lambda position, share: documents, held_out=held_out, tokenizer=tokenizer)


def _streamed(open_stream: source.OpenStream, num_holdout: int, tokenizer: Tokenizer) -> Text:
    def rest(epoch: int, start: int):
        return open_stream(epoch, start + num_holdout)

    def open_documents(position: Position, share: Share) -> source.Documents:
        num_lanes, first_epoch = len(position.lanes), position.lanes[:, 0].min()
        first = position.lanes[position.lanes[:, 0] == first_epoch, 1].min()
        place = int(first_epoch), int(first)
        return source.StreamedDocuments(rest, lambda ordinal: share.owns(ordinal % num_lanes), place)

    return Text(open=open_documents, held_out=source.read_first(open_stream, num_holdout), tokenizer=tokenizer)
