"""Text to token ids: raw bytes, or any tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from shardwright.data.errors import DataError
from shardwright.data.hub import use_cache_if_unreachable


class Tokenizer(Protocol):
    """What the loader and the generator need of a tokenizer."""

    vocab_size: int
    end_id: int

    def encode(self, text: str) -> np.ndarray:
        """Return the int64 ids of a document's text, without the separator `end_id`."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte; 256 separates documents."""

    vocab_size = 257
    end_id = 256

    def encode(self, text: str) -> np.ndarray:
        """Return the bytes of the text."""
        return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the bytes; separators become newlines, broken characters a replacement mark."""
        return bytes(10 if i == self.end_id else i for i in ids if i <= self.end_id).decode("utf-8", "replace")


class FileTokenizer:
    """A tokenizer.json as the `tokenizers` library reads it; the separator is the end token of its config."""

    def __init__(self, path: Path, config: dict[str, object]) -> None:
        from tokenizers import Tokenizer as Backend

        self._backend = Backend.from_file(str(path))
        self.vocab_size = self._backend.get_vocab_size()
        named = config.get("eos_token")
        text = named.get("content") if isinstance(named, dict) else named
        candidates = [text, "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<|eos|>"]
        found = [self._backend.token_to_id(c) for c in candidates if isinstance(c, str)]
        known = [i for i in found if i is not None]
        if not known:
            raise DataError(
                f"data.tokenizer: {path} has no end-of-text token; documents are separated by one; "
                f"name it as eos_token in {path.parent / 'tokenizer_config.json'}"
            )
        self.end_id = known[0]

    def encode(self, text: str) -> np.ndarray:
        """Return the ids, with the special tokens that the tokenizer's own post-processor adds in front."""
        ids = self._backend.encode(text).ids
        return np.array(ids[:-1] if ids and ids[-1] == self.end_id else ids, dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return self._backend.decode(list(ids))


def load_tokenizer(name: str) -> Tokenizer:
    """Load `bytes`, a folder with tokenizer.json, or a tokenizer by its name on the Hugging Face hub.

    Raises:
        DataError: there is no such tokenizer, or it cannot be read.
    """
    if name == "bytes":
        return ByteTokenizer()
    folder = Path(name)
    path = folder / "tokenizer.json" if folder.is_dir() else _download(name, "tokenizer.json")
    if path is None or not path.is_file():
        raise DataError(
            f"data.tokenizer={name}: no tokenizer.json there; use bytes, a folder that holds one, or a hub name"
        )
    config_path = folder / "tokenizer_config.json" if folder.is_dir() else _download(name, "tokenizer_config.json")
    try:
        config = json.loads(config_path.read_text("utf-8")) if config_path and config_path.is_file() else {}
        return FileTokenizer(path, config)
    except DataError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        raise DataError(f"data.tokenizer={name}: {path} cannot be read ({error}); export it again") from error


def _download(name: str, filename: str) -> Path | None:
    use_cache_if_unreachable()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(hf_hub_download(name, filename))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        return None
