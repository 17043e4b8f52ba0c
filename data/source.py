"""Documents in a reproducible order: the standard library, local files, or a dataset of the Hugging Face hub."""

from __future__ import annotations

import glob
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from shardwright.data.errors import DataError
from shardwright.data.hub import use_cache_if_unreachable

if TYPE_CHECKING:
    from datasets import Dataset

    from shardwright.conf.schema import FilesDataConfig, HubDataConfig

OpenStream = Callable[[int, int], Iterator[str]]  # (epoch, first document) -> texts from there on
_PIECE_CHARACTERS = 65536
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


class Documents(Protocol):
    """A source whose documents have ordinals 0, 1, 2, ... in each epoch."""

    def read(self, epoch: int, ordinal: int) -> str | None:
        """Return a document's text, or None past the end of the epoch. Each reader asks in ascending order."""
        ...


class IndexedDocuments:
    """Documents with random access, in a new order each epoch: a pure function of seed and epoch."""

    def __init__(self, dataset: Dataset, text_field: str, indices: np.ndarray, seed: int) -> None:
        self._dataset, self._text_field, self._indices, self._seed = dataset, text_field, indices, seed
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, epoch: int, ordinal: int) -> str | None:
        """See `Documents`."""
        if ordinal >= len(self._indices):
            return None
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = self._indices[permutation(self._seed, epoch, len(self._indices))]
        return self._dataset[int(self._orders[epoch][ordinal])][self._text_field] or ""


class StreamedDocuments:
    """Documents read once through, in the stream's own order, by one reader that deals them to its lanes.

    What one lane passes over on its way is kept for the other lanes that `wanted` names.

    Args:
        open_stream: (epoch, first ordinal) -> the texts from there on.
        wanted: whether this process will ever ask for an ordinal.
        first: the earliest (epoch, ordinal) that will be asked for; later epochs are read from their beginning.
    """

    def __init__(self, open_stream: OpenStream, wanted: Callable[[int], bool], first: tuple[int, int]) -> None:
        self._open, self._wanted, self._first = open_stream, wanted, first
        self._streams: dict[int, Iterator[str]] = {}
        self._next: dict[int, int] = {}
        self._kept: dict[tuple[int, int], str] = {}

    def read(self, epoch: int, ordinal: int) -> str | None:
        """See `Documents`."""
        if (epoch, ordinal) in self._kept:
            return self._kept.pop((epoch, ordinal))
        if epoch not in self._streams:
            self._next[epoch] = self._first[1] if epoch == self._first[0] else 0
            self._streams[epoch] = self._open(epoch, self._next[epoch])
        for text in self._streams[epoch]:
            here = self._next[epoch]
            self._next[epoch] += 1
            if here == ordinal:
                return text
            if self._wanted(here):
                self._kept[epoch, here] = text
        return None


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return an order of `count` documents: by a key each, from a generator whose stream no release changes."""
    keys = np.random.Philox(key=(epoch << 64) + seed % 2**64).random_raw(count)
    return np.argsort(keys, kind="stable")


def split_holdout(dataset: Dataset, text_field: str, num_holdout: int, seed: int) -> tuple[IndexedDocuments, list[str]]:
    """Keep `num_holdout` documents (at most a tenth) out of training; the choice does not depend on `seed`.

    Raises:
        DataError: the column is missing, or there are fewer than two documents.
    """
    if text_field not in dataset.column_names:
        raise DataError(
            f"data.text_field={text_field} is no column of the data; it has {', '.join(dataset.column_names)}; use one"
        )
    if len(dataset) < 2:
        raise DataError(f"data: {len(dataset)} documents found; at least 2 are needed, one of them held out; add some")
    order = permutation(0, 0, len(dataset))
    cut = max(1, min(num_holdout, len(dataset) // 10))
    held_out = [dataset[int(i)][text_field] or "" for i in order[:cut]]
    return IndexedDocuments(dataset, text_field, order[cut:], seed), held_out


def load_stdlib() -> Dataset:
    """Read the sources of this Python's standard library, one document per file, in the order of their paths."""
    datasets = _datasets()
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages"}.isdisjoint(path.parts):
            try:
                texts.append(path.read_text("utf-8"))
            except UnicodeDecodeError:  # the standard library ships broken files to test its own parser
                continue
    if not texts:
        raise DataError(f"data=stdlib: no sources under {root}; this Python is stripped; use data=files data.path=...")
    return datasets.Dataset.from_dict({"text": texts})


def load_files(config: FilesDataConfig) -> Dataset:
    """Load local files; a .txt file becomes documents of up to 65,536 characters, cut at line ends.

    Raises:
        DataError: nothing matches, the kinds are mixed or unknown, or a file cannot be parsed.
    """
    datasets = _datasets()
    patterns = [config.path] if isinstance(config.path, str) else list(config.path)
    files: list[str] = []
    for pattern in patterns:
        found = sorted(p for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
        if not found:
            raise DataError(f"data.path={pattern} matches no file; give an existing file or a glob that matches some")
        files += found
    suffixes = {Path(f).suffix for f in files}
    if len(suffixes) != 1 or not suffixes <= set(_BUILDERS):
        raise DataError(
            f"data.path={config.path} finds files ending in {', '.join(sorted(suffixes))}; "
            f"all must end alike, in one of {', '.join(_BUILDERS)}; narrow the glob"
        )
    builder = _BUILDERS[suffixes.pop()]
    options = {"sample_by": "document"} if builder == "text" else {}
    try:
        dataset = datasets.load_dataset(builder, data_files=files, split="train", **options)
    except StopIteration:  # what the library makes of files without a single document
        raise DataError(f"data.path={config.path} holds no documents; give files with text") from None
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise DataError(f"data.path={config.path} cannot be read as {builder} ({cause}); repair the files") from error
    return dataset.map(_cut_pieces, batched=True, batch_size=8) if builder == "text" else dataset


def _cut_pieces(batch: dict[str, list[str]]) -> dict[str, list[str]]:
    pieces = []
    for text in batch["text"]:
        start = 0
        while start < len(text):
            end = start + _PIECE_CHARACTERS
            if end < len(text):
                end = text.rfind("\n", start, end) + 1 or end
            pieces.append(text[start:end])
            start = end
    return {"text": pieces}


def open_hub(config: HubDataConfig) -> OpenStream:
    """Return a function (epoch, first document) -> texts of a hub dataset or local dataset folder, streamed.

    Raises:
        DataError: it cannot be found or reached, or lacks the column.
    """
    use_cache_if_unreachable()
    datasets = _datasets()
    try:
        stream = datasets.load_dataset(config.name, config.subset, split=config.split, streaming=True)
        first = next(iter(stream), None)
    except (datasets.exceptions.DatasetsError, ValueError, OSError, RuntimeError) as error:
        raise DataError(
            f"data.name={config.name} (subset {config.subset}, split {config.split}) cannot be opened "
            f"({str(error).splitlines()[0]}); check the name, the split and the network"
        ) from error
    if first is None:
        raise DataError(f"data.name={config.name}, split {config.split}, has no documents; choose another split")
    if config.text_field not in first:
        raise DataError(
            f"data.text_field={config.text_field} is no column of {config.name}; it has {', '.join(first)}; use one"
        )

    def open_stream(epoch: int, start: int) -> Iterator[str]:
        rows: Iterable[dict[str, Any]] = stream.skip(start) if start else stream
        return ((row[config.text_field] or "") for row in rows)

    return open_stream


def read_first(open_stream: OpenStream, count: int) -> list[str]:
    """Return the first texts of a stream: its held-out part."""
    return [text for text, _ in zip(open_stream(0, 0), range(count), strict=False)]


def _datasets() -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    return datasets
