"""The files of a DeepSpeed checkpoint: found by name, and read without running anything that they name."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardwright.checkpoint.errors import CheckpointError, DamagedError

_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d{1,6})_)?mp_rank_(?P<part>\d{2,6})_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d{1,6})_mp_rank_(?P<part>\d{2,6})_optim_states\.pt")

# What a file may name: tensors and plain containers ...
_PLAIN = {
    "collections Counter", "collections OrderedDict", "__builtin__ set", "_codecs encode",
    "torch Size", "torch Tensor", "torch device", "torch float32", "torch float16", "torch bfloat16",
    "torch._tensor _rebuild_from_type_v2", "torch._utils _rebuild_parameter", "torch._utils _rebuild_tensor_v2",
    "torch DoubleStorage", "torch FloatStorage", "torch HalfStorage", "torch BFloat16Storage", "torch LongStorage",
    "torch IntStorage", "torch ShortStorage", "torch CharStorage", "torch ByteStorage", "torch BoolStorage",
}  # fmt: skip
# ... and what stands in every file, or often in the client's state, but is not needed: an inert object takes its place.
_UNUSED = {
    "deepspeed.runtime.zero.config ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler LossScaler", "deepspeed.runtime.fp16.loss_scaler DynamicLossScaler",
    "deepspeed.utils.tensor_fragment fragment_address",
    "argparse Namespace", "numpy dtype", "numpy ndarray",
    "numpy.core.multiarray scalar", "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray scalar", "numpy._core.multiarray _reconstruct",
}  # fmt: skip


class Unused:
    """Stands for an object of a foreign class: takes what a pickle gives it, and keeps nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True)
class Files:
    """The files of one checkpoint.

    Attributes:
        model: one, or at ZeRO stage 3 one of each data-parallel rank.
        optimizer: one of each data-parallel rank; none at stage 0.
    """

    model: list[Path]
    optimizer: list[Path]


def find_files(source: Path) -> Files:
    """Return the files of a checkpoint, in the order of ranks.

    Args:
        source: the folder that holds `latest`, or the folder of one tag.

    Raises:
        CheckpointError: there is none, a rank is missing, or it is model-parallel or of another kind.
    """
    folder = _tag_folder(source)
    model: dict[int | None, Path] = {}
    optimizer: dict[int | None, Path] = {}
    for path in sorted(folder.glob("*.pt")):
        name = _MODEL.fullmatch(path.name) or _OPTIMIZER.fullmatch(path.name)
        if not name:
            raise CheckpointError(
                f"{path} is of a kind that is not imported, such as experts or pipeline stages; "
                "import a data-parallel ZeRO checkpoint"
            )
        if int(name["part"]):
            raise CheckpointError(
                f"{path} is of a model-parallel rank; only data-parallel checkpoints are imported; "
                "save one with tensor and pipeline parallelism 1"
            )
        ranks = model if name.re is _MODEL else optimizer
        rank = None if name["rank"] is None else int(name["rank"])
        if rank in ranks:
            raise CheckpointError(f"{ranks[rank]} and {path} are of the same rank; remove the one of another run")
        ranks[rank] = path
    if not model:
        raise CheckpointError(
            f"{folder} is no DeepSpeed checkpoint: no *_model_states.pt is there; "
            "give the folder that holds `latest`, or the folder of a tag"
        )
    return Files([model[None]] if model.keys() == {None} else _in_order(folder, model), _in_order(folder, optimizer))


def _tag_folder(source: Path) -> Path:
    latest = source / "latest"
    if not latest.is_file():
        return source
    with latest.open("rb") as file:
        tag = file.read(256).decode("utf-8", "replace").strip()
    if not tag or tag in (".", "..") or Path(tag).name != tag or "\\" in tag or not tag.isprintable():
        raise CheckpointError(f"{latest} says {tag!r}, which is no name of a folder beside it; give the tag's folder")
    if not (source / tag).is_dir():
        raise CheckpointError(f"{latest} says {tag!r}, but {source / tag} is missing; give the folder of another tag")
    return source / tag


def _in_order(folder: Path, files: Mapping[int | None, Path]) -> list[Path]:
    if None in files:
        raise CheckpointError(f"{folder} mixes ZeRO stages: {files[None].name} and others; remove those of another run")
    ranks = sorted(rank for rank in files if rank is not None)
    if ranks != list(range(len(ranks))):
        missing = next(rank for rank, other in enumerate(ranks) if rank != other)
        raise CheckpointError(
            f"{folder} lacks the file of rank {missing} beside {files[ranks[-1]].name}; copy those of all ranks there"
        )
    return [files[rank] for rank in ranks]


def load(path: Path) -> dict[str, Any]:
    """Return what a file holds: plain values, tensors mapped from the disk, and `Unused` in the place of objects.

    Nothing is run and no more memory taken than the file has bytes; what comes back can be of any shape.

    Raises:
        DamagedError: the file is missing or not whole.
        CheckpointError: it holds what no DeepSpeed checkpoint needs.
    """
    try:
        pickled = _read_pickle(path)
    except Exception as error:  # whatever a malformed file provokes, here and below
        raise DamagedError(
            f"{path} is not whole: {error}; copy it again, or save it with checkpoint.checkpoint_serialization=true"
        ) from error
    try:
        _check_names(pickled)
        # A fresh subclass each: what a pickle does to the class that it is given stays there.
        stand_ins: list[Any] = [(type("Unused", (Unused,), {}), name.replace(" ", ".")) for name in sorted(_UNUSED)]
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        raise CheckpointError(
            f"{path} is refused: {text.splitlines()[0][:300]}; use a checkpoint that you trust"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is refused: it holds no dict; use a checkpoint of DeepSpeed")
    return content


def _read_pickle(path: Path) -> bytes:
    with zipfile.ZipFile(path) as members:
        infos = members.infolist()
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise zipfile.BadZipFile("it is compressed, which torch never does")
        if sum(info.file_size for info in infos) > path.stat().st_size:
            raise zipfile.BadZipFile("its members have more bytes than the file")
        pickles = [info for info in infos if info.filename.lower().endswith(".pkl")]
        if len(pickles) != 1:
            raise zipfile.BadZipFile(f"it holds {len(pickles)} pickles instead of one")
        return members.read(pickles[0])


def _check_names(pickled: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("INST", "STACK_GLOBAL") or (
            opcode.name == "GLOBAL" and argument not in _PLAIN and argument not in _UNUSED
        ):
            raise ValueError(f"it names {argument!r}, which a DeepSpeed checkpoint has no need of")
