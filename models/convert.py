"""Checkpoints to folders of the Hugging Face hub and back, on one process, tensor by tensor.

Bits stay as they are both ways, unless an export is asked for in another dtype.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from shardwright import checkpoint
from shardwright.checkpoint import CheckpointError, DamagedError
from shardwright.checkpoint.archive import Archive
from shardwright.checkpoint.interop.hub import (
    MAX_SHARD_BYTES,
    HubTensor,
    LazyTensor,
    read_json,
    read_tensors,
    write_folder,
)
from shardwright.conf import ConfigError
from shardwright.conf.load import from_dict, load_config, to_dict
from shardwright.conf.plugins import import_plugins
from shardwright.conf.schema import MODEL_CONFIGS, ModelConfig
from shardwright.kernels import Kernels
from shardwright.models.hub_tokenizer import describe_tokenizer
from shardwright.models.registry import FAMILIES, Family, HubFormat

logger = logging.getLogger(__name__)

_EXPORTED = (torch.float32, torch.bfloat16)
_NARROWER = (torch.bfloat16, torch.float16)  # than the float32 of a run, which holds all their values


def export_to_hub(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model of a checkpoint as a folder that transformers loads.

    `max_position_embeddings` is the sequence length of the run (raise it in config.json if the model reaches further);
    the end of text is that of its tokenizer.

    Args:
        source: a complete checkpoint.
        target: folder to write, which must not exist; it appears complete or not at all.
        dtype: float32 or bfloat16; None: as in the checkpoint.
        tokenizer: as `data.tokenizer`; None: that of the run.
        max_shard_bytes: of tensor data in a file, as far as single tensors allow; so much memory is needed.

    Raises:
        CheckpointError: the checkpoint is not complete, damaged or of another model; the target cannot be written.
        ConfigError: the hub's model cannot be this one.
        DataError: the tokenizer is not found.
    """
    if dtype not in (None, *_EXPORTED):
        raise ConfigError(f"dtype={dtype}: weights are exported as float32 or bfloat16, which have their range")
    archive = checkpoint.open(source)
    saved = archive.values.get("progress.config")
    if not isinstance(saved, dict) or not {"model", "train", "data"} <= saved.keys():
        raise CheckpointError(f"{source} does not hold the config of its run as progress.config; use one that does")
    import_plugins(saved.get("plugins", []))
    model = _decode(saved["model"])
    hub = _hub_format(model.kind)
    config = hub.to_hub(model, saved["train"]["sequence_length"])
    files, special = describe_tokenizer(tokenizer or saved["data"]["tokenizer"], model.vocab_size)
    tensors = _plan_export(archive, hub, model, dtype)
    written = _spell(next(iter(tensors.values())).dtype)
    config = {"architectures": [hub.architecture], **config, **special, "dtype": written, "torch_dtype": written}
    generation = {"_from_model_config": True, **special}
    write_folder(
        target,
        tensors,
        {"config.json": config, "generation_config.json": generation, **files},
        max_shard_bytes=max_shard_bytes,
    )
    size = sum(tensor.num_bytes for tensor in tensors.values())
    logger.info(f"wrote {model.name} to {target}: {len(tensors)} tensors, {size / 2**30:.3g} GiB of {written}")


def import_from_hub(
    source: str | Path,
    target: str | Path,
    *,
    name: str | None = None,
    tokenizer: str | None = None,
    plugins: Sequence[str] = (),
) -> None:
    """Write the model of a hub folder as a checkpoint of weights, at step 0, without optimizer state.

    The weights keep their dtype. The checkpoint holds a whole config: this model and tokenizer, the model's longest
    context as sequence length, and for all else what a run has by default.

    Args:
        source: folder with config.json and safetensors.
        target: checkpoint to write; there must be none yet.
        name: of the model; None: that of the folder.
        tokenizer: as `data.tokenizer`; None: the folder, or `bytes` if it has no tokenizer.json.
        plugins: as in the config of a run, to register the family.

    Raises:
        CheckpointError: the folder is damaged, or not of the model that its config.json says; the target cannot be
            written.
        ConfigError: no family has this architecture, or the family cannot be this model.
    """
    folder = Path(source).resolve()
    import_plugins(plugins)
    raw = read_json(folder / "config.json")
    hub = _find_format(raw)
    fields, context_tokens = hub.from_hub(raw)
    tokenizer = tokenizer or _own_tokenizer(folder)
    name = name or re.sub(r"[^A-Za-z0-9_.-]", "_", folder.name).lstrip("._-") or "imported"
    config = from_dict(_complete({**fields, "name": name}, context_tokens, tokenizer, plugins))
    mapping, wanted = hub.tensors(config.model), _plain_tensors(FAMILIES[config.model.kind], config.model)
    _check_complete(hub, mapping, set(wanted))
    tensors = read_tensors(folder)
    _check_tensors(folder, tensors, hub, mapping, wanted)
    _refuse_existing(target)
    shapes = {part: tuple(tensor.shape) for part, tensor in wanted.items()}
    with checkpoint.create(target) as writer:
        for hub_name, holds in mapping.items():
            if not holds.copy:
                for part, tensor in holds.split(tensors[hub_name].load(), shapes).items():
                    writer.add(f"model.{part}", tensor)
        writer.values |= {"progress.step": 0, "progress.tokens": 0, "progress.config": to_dict(config)}
    logger.info(f"wrote {name} to {target}: {len(wanted)} tensors; weights only, for checkpoint.resume={target}")


def _decode(raw: dict[str, Any]) -> ModelConfig:
    """Decode the model config of a checkpoint, whatever the rest of its config is."""
    kind = raw.get("kind", "")
    if kind not in MODEL_CONFIGS:
        raise ConfigError(
            f"model.kind={kind} is not registered; known: {', '.join(MODEL_CONFIGS)}; "
            "the plugins that the checkpoint names must register it"
        )
    try:
        return TypeAdapter(MODEL_CONFIGS[kind]).validate_json(json.dumps(raw))
    except ValidationError as error:
        raise ConfigError(f"model of the checkpoint: {error}; export it with the version that wrote it") from None


def _hub_format(kind: str) -> HubFormat:
    found = FAMILIES[kind].hub
    if found is None:
        raise ConfigError(f"model.kind={kind} has no form on the hub; register its family with a HubFormat")
    return found


def _find_format(raw: dict[str, Any]) -> HubFormat:
    """Return the format of the family that config.json names."""
    known = {family.hub.architecture: family.hub for family in FAMILIES.values() if family.hub}
    named = raw.get("architectures")
    found = [known[name] for name in (named if isinstance(named, list) else []) if name in known]
    if not found:
        raise ConfigError(
            f"config.json: architectures={named} is of no family; known: {', '.join(known)}; "
            "import one of these, or name the plugin that registers its family with a HubFormat"
        )
    return found[0]


def _plain_tensors(family: Family, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of the plain model, without memory."""
    with torch.device("meta"):
        return family.build(config, Kernels()).state_dict()


def _check_complete(hub: HubFormat, mapping: Mapping[str, HubTensor], names: set[str]) -> None:
    mapped = {part for holds in mapping.values() for part in holds.parts}
    if mapped != names:
        raise ConfigError(
            f"the HubFormat of {hub.architecture} does not map {', '.join(sorted(mapped ^ names))}; "
            "each tensor of the plain model must have its place; correct its `tensors`"
        )


def _plan_export(
    archive: Archive, hub: HubFormat, model: ModelConfig, dtype: torch.dtype | None
) -> dict[str, LazyTensor]:
    mapping, wanted = hub.tensors(model), _plain_tensors(FAMILIES[model.kind], model)
    _check_complete(hub, mapping, set(wanted))
    held = {name.removeprefix("model."): info for name, info in archive.tensors.items() if name.startswith("model.")}
    shapes = {part: tuple(tensor.shape) for part, tensor in wanted.items()}
    found = {part: tuple(info.shape) for part, info in held.items()}
    wrong = sorted(part for part in {*shapes, *found} if shapes.get(part) != found.get(part))
    if wrong:
        raise CheckpointError(
            f"{wrong[0]} is {found.get(wrong[0], 'missing')} in the checkpoint, its config makes it "
            f"{shapes.get(wrong[0], 'unknown')}; they must agree; use a checkpoint as a run saved it"
        )

    def load(holds: HubTensor, dtype: torch.dtype) -> torch.Tensor:
        return holds.join([archive.read(f"model.{part}") for part in holds.parts]).to(dtype)

    planned = {}
    for name, holds in mapping.items():
        if not holds.copy:
            stored = held[holds.parts[0]].dtype
            to = dtype if dtype and stored.is_floating_point else stored
            planned[name] = LazyTensor(to, holds.shape(shapes), partial(load, holds, to))
    return planned


def _check_tensors(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    hub: HubFormat,
    mapping: Mapping[str, HubTensor],
    wanted: Mapping[str, torch.Tensor],
) -> None:
    """Hold a folder's tensors against the model that its config.json describes, before they are converted."""
    unknown = [n for n in tensors if n not in mapping and not any(fnmatch(n, pattern) for pattern in hub.derived)]
    missing = [name for name, holds in mapping.items() if not holds.copy and name not in tensors]
    if unknown or missing:
        raise CheckpointError(
            f"{folder} {f'lacks {missing[0]}' if missing else f'has {unknown[0]}'}, unlike the {hub.architecture} that "
            "its config.json describes; they must agree; get the folder again"
        )
    shapes = {part: tuple(tensor.shape) for part, tensor in wanted.items()}
    originals = {holds.parts: name for name, holds in mapping.items() if not holds.copy}
    for name, holds in mapping.items():
        if name in tensors:
            _check_tensor(folder / name, tensors[name], holds.shape(shapes), wanted[holds.parts[0]].dtype)
            if holds.copy:
                _check_copy(folder, name, originals[holds.parts], tensors)


def _check_tensor(place: Path, tensor: LazyTensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{place} is {list(tensor.shape)}, config.json makes it {list(shape)}; they must agree; "
            "get the folder again"
        )
    if tensor.dtype != dtype and not (dtype == torch.float32 and tensor.dtype in _NARROWER):
        raise CheckpointError(
            f"{place} is {_spell(tensor.dtype)}, a run has it as {_spell(dtype)}, which must hold all its values; "
            "use a folder in float32, bfloat16 or float16"
        )


def _check_copy(folder: Path, name: str, original: str, tensors: Mapping[str, LazyTensor]) -> None:
    if not torch.equal(tensors[name].load(), tensors[original].load()):
        raise CheckpointError(
            f"{folder}: {name} and {original} differ, and config.json ties them; set tie_word_embeddings to false there"
        )


def _refuse_existing(target: str | Path) -> None:
    try:
        checkpoint.open(target)
    except DamagedError:
        pass
    except CheckpointError:
        return
    raise CheckpointError(f"{target} holds a checkpoint; an import is written anew; choose another folder")


def _own_tokenizer(folder: Path) -> str:
    if (folder / "tokenizer.json").is_file():
        return str(folder)
    logger.info(f"{folder} has no tokenizer.json; data.tokenizer=bytes is noted in its place")
    return "bytes"


def _complete(model: dict[str, Any], context_tokens: int, tokenizer: str, plugins: Sequence[str]) -> dict[str, Any]:
    """Return a whole config round a model."""
    plain, folder = to_dict(load_config()), f"runs/{model['name']}"
    plain["model"], plain["plugins"] = model, list(plugins)
    plain["run"] = {"name": model["name"], "folder": folder}
    plain["checkpoint"]["folder"] = f"{folder}/checkpoints"
    plain["train"]["sequence_length"] = context_tokens
    plain["data"]["tokenizer"] = tokenizer
    return plain


def _spell(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
