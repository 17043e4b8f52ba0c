"""A tokenizer's files, as a model folder of the Hugging Face hub has them."""

from __future__ import annotations

import logging
from pathlib import Path

from shardwright.checkpoint.interop.hub import read_json
from shardwright.conf import ConfigError
from shardwright.data import DataError
from shardwright.data.hub import use_cache_if_unreachable
from shardwright.data.tokenize import ByteTokenizer, load_tokenizer

logger = logging.getLogger(__name__)

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def describe_tokenizer(name: str, vocab_size: int) -> tuple[dict[str, Path], dict[str, int | None]]:
    """Return what a folder of the hub has of a tokenizer: its files by name, and its special tokens as in config.json.

    Args:
        name: as `data.tokenizer`; one that is on the hub is downloaded. `bytes` has no files there.
        vocab_size: of the model.

    Raises:
        DataError: there is no such tokenizer, or it cannot be read.
        ConfigError: it has more tokens than the model.
    """
    if name == "bytes":
        logger.info("data.tokenizer=bytes has no form on the hub; the folder has no tokenizer, 256 ends a text")
        return {}, {"bos_token_id": None, "eos_token_id": ByteTokenizer.end_id}
    folder = _find(name)
    known = load_tokenizer(str(folder))
    if known.vocab_size > vocab_size:
        raise ConfigError(
            f"data.tokenizer={name} has {known.vocab_size} tokens, model.vocab_size={vocab_size}; "
            "a model needs an embedding for each; name the tokenizer that it was trained with"
        )
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(folder / "tokenizer.json"))
    files = {f: folder / f for f in _FILES if (folder / f).is_file()}
    settings = read_json(folder / "tokenizer_config.json") if "tokenizer_config.json" in files else {}
    begin = settings.get("bos_token")
    begin = begin.get("content") if isinstance(begin, dict) else begin
    return files, {
        "bos_token_id": backend.token_to_id(begin) if isinstance(begin, str) else None,
        "eos_token_id": known.end_id,
    }


def _find(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    use_cache_if_unreachable()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise DataError(
            f"data.tokenizer={name}: it is no folder here, and the hub does not give it ({error}); "
            "name another place for it, or bytes to export none"
        ) from error
