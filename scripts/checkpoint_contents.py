"""What the bytes of checkpoints say: numbers of a tensor, how far two are apart, and whether files are whole."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track

from shardwright.checkpoint import Archive, Box
from shardwright.checkpoint.archive import split
from shardwright.checkpoint.files import Entry

PIECE_NUMEL = 2**16  # so many numbers fit into a processor's cache
BOX_BYTES = 8 * 2**20
NUM_READERS = 4
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Numbers:
    """What is known of the elements of a tensor that were seen: of the finite ones, unless it says otherwise."""

    count: int = 0
    num_nan: int = 0
    num_inf: int = 0
    least: float = math.inf
    most: float = -math.inf
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    def see(self, data: torch.Tensor) -> None:
        """Take more elements in, in double precision.

        Source: Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample variances (1979).
        """
        for piece in data.flatten().split(PIECE_NUMEL):
            x = piece.double()
            if x.numel() and not math.isfinite(x.sum()):
                self.num_nan += int(x.isnan().sum())
                self.num_inf += int(x.isinf().sum())
                x = x[x.isfinite()]
            if x.numel():
                self._merge(x)

    def _merge(self, x: torch.Tensor) -> None:
        n, mean = x.numel(), x.mean().item()
        least, most = (end.item() for end in x.aminmax())
        gap, count, rest = mean - self.mean, self.count + n, x - mean
        self.squares += rest.dot(rest).item() + gap * gap * self.count * n / count
        self.mean += gap * n / count
        self.least, self.most, self.count = min(self.least, least), max(self.most, most), count

    @property
    def std(self) -> float:
        """Standard deviation, as torch's: over n - 1."""
        return math.sqrt(self.squares / max(self.count - 1, 1))

    @property
    def norm(self) -> float:
        """Root of the sum of squares."""
        return math.sqrt(self.squares + self.count * self.mean * self.mean)


@dataclass
class Gap:
    """How far two tensors of one shape are apart.

    Attributes:
        count: elements whose bits differ; whose values do, if the dtypes differ.
        absolute, relative: the largest distance of two of these, and relative to the larger of the two.
    """

    count: int = 0
    absolute: float = 0.0
    relative: float = 0.0

    def see(self, p: torch.Tensor, q: torch.Tensor) -> None:
        """Take more elements in: two flat tensors."""
        bits = BITS[p.dtype.itemsize]
        if p.dtype == q.dtype and torch.equal(p.view(bits), q.view(bits)):
            return
        x, y = p.double(), q.double()
        nan = x.isnan() & y.isnan()
        differs = p.view(bits) != q.view(bits) if p.dtype == q.dtype else (x != y) & ~nan
        self.count += int(differs.sum())
        x, y = x[differs & ~nan], y[differs & ~nan]
        if not x.numel():
            return
        gaps = (x - y).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        scales = torch.maximum(x.abs(), y.abs())
        ratios = torch.where(gaps > 0, gaps / scales, 0.0).nan_to_num(nan=math.inf)
        self.absolute = max(self.absolute, gaps.max().item())
        self.relative = max(self.relative, ratios.max().item())


def compare(a: Archive, b: Archive, name: str) -> Gap:
    """Hold the tensors of a name in two checkpoints, of equal shapes, against each other, a box at a time."""
    gap, info = Gap(), a.tensors[name]
    for box in split(Box((0,) * len(info.shape), info.shape), BOX_BYTES // info.dtype.itemsize):
        x, y = (archive.read(name, box).flatten().split(PIECE_NUMEL) for archive in (a, b))
        for pair in zip(x, y, strict=True):
            gap.see(*pair)
    return gap


def check(archive: Archive) -> Iterator[str]:
    """Read every byte of a checkpoint, and yield what is wrong with which file."""

    def read(index: int, file: str) -> list[str]:
        reader = Archive(archive.storage, archive.manifest)  # has a buffer of its own
        return list(reader.verify([file])) or list(_check_header(archive, index, file))

    files, shows = list(archive.manifest.files), Console(stderr=True)
    with ThreadPoolExecutor(NUM_READERS) as pool:
        done = pool.map(read, range(len(files)), files)
        for troubles in track(done, "verify", len(files), console=shows, transient=True, disable=not shows.is_terminal):
            yield from troubles


def _check_header(archive: Archive, index: int, file: str) -> Iterator[str]:
    """Hold a file's own header, by which other programs read it, against the manifest."""
    manifest, expected = archive.manifest, {}
    for row in (manifest.boxes.file == index).nonzero()[0].tolist():
        name = manifest.names[manifest.boxes.tensor[row]]
        info, start = archive.tensors[name], int(manifest.boxes.start[row])
        entry = Entry(name, info, manifest.boxes.box(row, len(info.shape)))
        expected[entry.key] = list(entry.box.sizes), [start, start + entry.num_bytes]
    try:
        found = _read_header(archive, file)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        yield f"{archive.storage.path}/{file}: its header is malformed: {error}"
        return
    for key in expected.keys() | found.keys():
        if expected.get(key) != found.get(key):
            yield (
                f"{archive.storage.path}/{file}: its header has {key} as {found.get(key)}, "
                f"the manifest as {expected.get(key)} (shape, bytes)"
            )


def _read_header(archive: Archive, file: str) -> dict[str, tuple[list[int], list[int]]]:
    """Return name -> shape, first and last byte, as a safetensors file says itself."""
    size = archive.manifest.files[file]
    head = bytearray(8)
    archive.storage.read(file, 0, memoryview(head))
    length = int.from_bytes(head, "little")
    if 8 + length > size:
        raise ValueError(f"{length} bytes do not fit")
    text = bytearray(length)
    archive.storage.read(file, 8, memoryview(text))
    entries = json.loads(text)
    entries.pop("__metadata__", None)
    return {key: (at["shape"], [8 + length + end for end in at["data_offsets"]]) for key, at in entries.items()}
