"""Bytes of boxes in safetensors files, written with checksums and read back only if these hold."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file

from shardwright.checkpoint.box import Piece
from shardwright.checkpoint.errors import CheckpointError, DamagedError
from shardwright.checkpoint.manifest import DTYPES, StoredBox


def checksum(data: np.ndarray) -> str:
    """Return the XXH3-64 of an array's bytes, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(data.data)


def write_pieces(folder: Path, file: str, pieces: dict[str, Piece]) -> dict[str, StoredBox]:
    """Write pieces of tensors to one file and make it durable.

    Raises:
        CheckpointError: the disk refuses; the partial file is removed.
    """
    path = folder / file
    tensors = {name: piece.tensor.cpu().contiguous() for name, piece in pieces.items()}
    try:
        save_file(tensors, path)
        with open(path, "rb+") as stream:
            os.fsync(stream.fileno())
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(header_bytes))
    except (OSError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written: {error}; free or repair the disk") from error
    stored = {}
    for name, piece in pieces.items():
        first, last = (8 + header_bytes + end for end in header[name]["data_offsets"])
        digest = checksum(_bytes_of(tensors[name]))
        stored[name] = StoredBox(piece.box.offsets, piece.box.sizes, file, first, last - first, digest)
    return stored


def read_into(folder: Path, name: str, dtype: str, stored: StoredBox, target: Piece) -> None:
    """Copy what a stored box and a local piece have in common; the whole box is verified first.

    Raises:
        CheckpointError: the bytes are not those that were written, or cannot be read.
    """
    common = stored.box.intersect(target.box)
    if common is None:
        return
    path = folder / stored.file
    try:
        data = np.fromfile(path, dtype=np.uint8, count=stored.bytes, offset=stored.start)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error}; repair the disk or use another checkpoint") from error
    if data.nbytes != stored.bytes or checksum(data) != stored.xxh3:
        raise DamagedError(f"{path} is damaged: the bytes of {name} do not match their checksum; use another one")
    source = torch.from_numpy(data).view(DTYPES[dtype]).view(stored.sizes)
    with torch.no_grad():
        target.tensor[common.within(target.box)].copy_(source[common.within(stored.box)])


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def remove_others(folder: Path, keep: set[str]) -> None:
    """Delete the files that earlier, unfinished saves left in a folder."""
    for path in folder.iterdir():
        if path.is_file() and path.name not in keep:
            path.unlink(missing_ok=True)
