"""Measure the metadata of a huge checkpoint in several forms: bench_manifest.py --folder FOLDER. See --help.

Names and shapes are those of Llama 3 405B with its AdamW moments in fp32; every tensor is cut into row blocks, dealt
over one file per rank, as fully sharded training does. Each form is written and read in a process of its own: what
Shardwright keeps (columns), the same as plain JSON objects, and the pickled metadata of torch DCP.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from shardwright.checkpoint import manifest as manifests
from shardwright.checkpoint.manifest import Boxes, Manifest, TensorInfo
from shardwright.conf.load import load_config
from shardwright.kernels import Kernels
from shardwright.models.registry import FAMILIES

HEADER_BYTES = 8
STEPS = ("encode", "write", "read", "decode")


def tensors_of(model: str) -> dict[str, TensorInfo]:
    """Return names and shapes of a model's weights and AdamW moments, in order of name."""
    config = load_config([f"model={model}"]).model
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in FAMILIES[config.kind].build(config, Kernels()).named_parameters()}
    named = {f"model.{name}": shape for name, shape in shapes.items()}
    for key in ("exp_avg", "exp_avg_sq"):
        named |= {f"optimizer.moments.{name}.{key}": shape for name, shape in shapes.items()}
    return {name: TensorInfo(torch.float32, shape) for name, shape in sorted(named.items())}


def make_manifest(tensors: dict[str, TensorInfo], num_boxes: int, num_ranks: int) -> Manifest:
    """Cut all tensors into row blocks, as equal in number as rows allow, and deal these over the ranks' files."""
    shapes = np.array([(*info.shape, 1)[:2] for info in tensors.values()], dtype=np.int64)
    most = range(num_boxes // len(tensors), shapes[:, 0].max() + 1)
    limit = next((n for n in most if np.minimum(shapes[:, 0], n).sum() >= num_boxes), most[-1])
    counts = np.minimum(shapes[:, 0], max(limit, 1))
    tensor = np.repeat(np.arange(len(tensors)), counts)
    index = np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows, columns = shapes[tensor].T
    first, last = index * rows // counts[tensor], (index + 1) * rows // counts[tensor]
    offsets = np.stack([first, np.zeros_like(first)], axis=1)
    sizes = np.stack([last - first, columns], axis=1)
    num_bytes = sizes.prod(axis=1) * 4
    file = (index + tensor) % num_ranks
    order = np.argsort(file, kind="stable")
    before = np.cumsum(num_bytes[order]) - num_bytes[order]
    held = np.bincount(file, weights=num_bytes, minlength=num_ranks).astype(np.int64)
    start = np.empty_like(before)
    start[order] = HEADER_BYTES + before - (np.cumsum(held) - held)[file[order]]
    files = {f"{rank:05d}-00000-0123456789ab.safetensors": HEADER_BYTES + int(n) for rank, n in enumerate(held)}
    num_digests = sum(manifests.num_blocks(size) for size in files.values())
    digests = np.random.default_rng(0).integers(2**64, size=num_digests, dtype=np.uint64)
    boxes = Boxes(tensor.astype(np.uint32), file.astype(np.uint32), start, offsets, sizes)
    return Manifest(tensors, {"progress.step": 1000}, files, boxes, digests)


def _boxes(manifest: Manifest) -> Iterator[tuple[str, str, int, list[int], list[int]]]:
    """Yield tensor, file, start, offsets and sizes of every box."""
    names, files, boxes = list(manifest.tensors), list(manifest.files), manifest.boxes
    dims = [len(info.shape) for info in manifest.tensors.values()]
    columns = (boxes.tensor, boxes.file, boxes.start, boxes.offsets, boxes.sizes)
    for tensor, file, start, offsets, sizes in zip(*(column.tolist() for column in columns), strict=True):
        yield names[tensor], files[file], start, offsets[: dims[tensor]], sizes[: dims[tensor]]


def json_objects(manifest: Manifest) -> dict[str, Any]:
    """Return the manifest as objects for JSON: one per box, with a checksum of its own."""
    tensors: dict[str, Any] = {
        name: {"dtype": "float32", "shape": list(info.shape), "boxes": []} for name, info in manifest.tensors.items()
    }
    for number, (name, file, start, offsets, sizes) in enumerate(_boxes(manifest)):
        digest = f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"
        tensors[name]["boxes"].append(
            {"offsets": offsets, "sizes": sizes, "file": file, "start": start, "xxh3": digest}
        )
    return {"format": 1, "tensors": tensors, "values": manifest.values, "files": manifest.files}


def dcp_metadata(manifest: Manifest) -> Metadata:
    """Return what torch DCP keeps of the same boxes (it has no checksums)."""
    tensors: dict[str, Any] = {
        name: TensorStorageMetadata(TensorProperties(info.dtype), torch.Size(info.shape), [])
        for name, info in manifest.tensors.items()
    }
    places = {}
    for name, file, start, offsets, sizes in _boxes(manifest):
        tensors[name].chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        places[MetadataIndex(name, torch.Size(offsets))] = _StorageInfo(file, start, int(np.prod(sizes)) * 4)
    return Metadata(tensors, storage_data=places)


FORMS: dict[str, tuple[Callable[[Manifest], Any], Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    "columns": (lambda manifest: manifest, manifests.encode, lambda data: manifests.decode(data, manifests.NAME)),
    "JSON objects": (json_objects, lambda objects: json.dumps(objects).encode(), json.loads),
    "DCP metadata, pickled": (dcp_metadata, pickle.dumps, pickle.loads),
}


def work(form: str, step: str, args: argparse.Namespace, num_boxes: int, results: Any) -> None:
    """Write or read one form; send seconds, bytes, boxes, and memory above what was held before there were any."""
    prepare, encode, decode = FORMS[form]
    path = args.folder / "manifest"
    figures: dict[str, float] = {}
    if step == "write":
        tensors = tensors_of(args.model)
        before = _reset_peak()
        manifest = make_manifest(tensors, num_boxes, args.ranks)
        figures["boxes"] = len(manifest.boxes)
        prepared = prepare(manifest)
        del manifest
        figures["held_gib"] = _memory("VmRSS") - before
        _reset_peak()
        data = _timed(figures, "encode", lambda: encode(prepared))
        _timed(figures, "write", lambda: _write(path, data))
        figures["bytes"] = len(data)
    else:
        before = _reset_peak()
        data = _timed(figures, "read", path.read_bytes)
        kept = _timed(figures, "decode", lambda: decode(data))
        del kept
    figures[f"{step}_peak_gib"] = _memory("VmHWM") - before
    results.put(figures)


def _timed(figures: dict[str, float], key: str, function: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = function()
    figures[key] = time.perf_counter() - start
    return result


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _memory(field: str) -> float:
    """Return GiB of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 2**20


def _reset_peak() -> float:
    """Begin to count the peak of memory anew; return GiB held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def measure(form: str, args: argparse.Namespace, num_boxes: int) -> dict[str, float]:
    """Write and read one form once, each in a new process."""
    context = multiprocessing.get_context("spawn")
    figures: dict[str, float] = {}
    for step in ("write", "read"):
        results = context.SimpleQueue()
        process = context.Process(target=work, args=(form, step, args, num_boxes, results))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{form}: the process that was to {step} {num_boxes} boxes ended with {process.exitcode}")
        figures |= results.get()
    (args.folder / "manifest").unlink()
    return figures


def row(form: str, figures: dict[str, float], scale: float) -> str:
    """Return a row of the table; a scale other than 1 extrapolates."""
    label = form if scale == 1 else f"{form}, extrapolated"
    numbers = [figures["boxes"] / 1e6, figures["bytes"] / 1e6, *(figures[step] for step in STEPS)]
    numbers += [figures[key] for key in ("held_gib", "write_peak_gib", "read_peak_gib")]
    digits = (2, 1, *[2] * (len(numbers) - 2))
    return f"| {label} | " + " | ".join(f"{n * scale:,.{d}f}" for n, d in zip(numbers, digits, strict=True)) + " |"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure the metadata of a huge checkpoint in several forms.")
    parser.add_argument("--folder", type=Path, required=True, help="where to write it")
    parser.add_argument("--model", default="llama3_405b")
    parser.add_argument("--ranks", type=int, default=8960)
    parser.add_argument("--boxes", type=float, default=10e6)
    parser.add_argument("--objects", type=float, default=1e6, help="boxes for forms made of objects; extrapolated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file for the raw figures")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    head = ("form", "million boxes", "MB", *(f"{step} s" for step in STEPS), "held GiB", "write GiB", "read GiB")
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --: |" * (len(head) - 1)]
    raw = {}
    for form in FORMS:
        count = int(args.boxes) if form == "columns" else int(min(args.objects, args.boxes))
        raw[form] = [measure(form, args, count) for _ in range(args.repeats)]
        best = min(raw[form], key=lambda figures: figures["encode"] + figures["decode"])
        lines.append(row(form, best, 1))
        if count < args.boxes:
            lines.append(row(form, best, args.boxes / best["boxes"]))
    print("\n".join(lines))
    if args.output:
        args.output.write_text(json.dumps(raw, indent=1))


if __name__ == "__main__":
    main()
