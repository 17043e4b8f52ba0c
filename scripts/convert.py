"""Convert checkpoints: convert.py reshard|to-hf|from-hf|to-dcp|from-dcp|from-deepspeed SOURCE TARGET. See --help."""

from __future__ import annotations

import argparse
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from shardwright.observe.log import CONSOLE, configure_logging

if TYPE_CHECKING:  # what needs torch is imported by the commands: the help and a misspelt option do not wait for it
    import torch

    from shardwright.checkpoint import Archive, TensorInfo
    from shardwright.checkpoint.files import Entry
    from shardwright.checkpoint.storage import Storage

HELP = """Convert a checkpoint, saved at any layout, on one machine without a GPU; memory does not grow with it.

  convert.py reshard runs/a/checkpoints/step_00001000 s3://bucket/weights --only model --dtype bf16
  convert.py to-hf runs/a/checkpoints/step_00001000 exported --dtype bf16
  convert.py from-hf Llama-3.1-8B runs/b/start

A checkpoint is a local folder or a URL (s3://bucket/folder); folders of other frameworks are local.
Status 0: TARGET is complete, 2: refused, and there is no new TARGET.
"""
FILE_BYTES = 512 * 2**20  # unless asked for otherwise
PIECE_BYTES = 64 * 2**20  # of a tensor, in memory at once
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
POLL_SECONDS = 0.5
MANIFEST = "manifest.safetensors"


@dataclass(frozen=True)
class Job:
    """A conversion that can begin.

    Attributes:
        run: writes a target.
        num_bytes: about how many it will write; None: not known.
    """

    run: Callable[[str], None]
    num_bytes: int | None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; what cannot be converted ends with status 2 and one message."""
    args = _parse(argv)
    try:
        _convert(args)
    except Exception as error:
        if not type(error).__module__.startswith("shardwright."):
            raise
        from shardwright.scripts.train import refuse

        refuse(error)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, prepare: Callable[..., Job], mark: str, what: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        command.add_argument("source", metavar="SOURCE", help="what to read")
        command.add_argument("target", metavar="TARGET", help="what to write: a new folder")
        command.add_argument("--overwrite", action="store_true", help="replace TARGET, if it is what is written here")
        command.set_defaults(prepare=prepare, mark=mark)
        return command

    tokenizer = "as data.tokenizer of a run (default: that of SOURCE)"
    dtype = "cast floats (default: leave them)"

    command = add("reshard", _reshard, MANIFEST, "write a checkpoint with other files, of equal size")
    sizes = command.add_mutually_exclusive_group()
    sizes.add_argument("--files", type=_count, metavar="N", help="number of files")
    sizes.add_argument("--max-file-size", type=_size, metavar="SIZE", help="of tensor data in a file (default 512MiB)")
    command.add_argument("--dtype", choices=DTYPES, help=dtype)
    command.add_argument("--only", choices=["model"], help="leave out the state of the optimizer")

    command = add("to-hf", _to_hf, "config.json", "write the model as a folder of the Hugging Face hub")
    command.add_argument("--dtype", choices=DTYPES, help=dtype)
    command.add_argument("--tokenizer", help=tokenizer)
    command.add_argument("--max-shard-size", type=_size, metavar="SIZE", default="5GB", help="of a file (default 5GB)")

    command = add("from-hf", _from_hf, MANIFEST, "make a checkpoint of a folder of the Hugging Face hub")
    command.add_argument("--name", help="of the model (default: that of the folder)")
    command.add_argument("--tokenizer", help=tokenizer)
    command.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="that registers its family")

    add("to-dcp", _to_dcp, ".metadata", "write a checkpoint for torch.distributed.checkpoint")

    command = add("from-dcp", _from_dcp, MANIFEST, "make a checkpoint of one of torch.distributed.checkpoint")
    command.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="keys to leave out, as rng.*")

    add("from-deepspeed", _from_deepspeed, MANIFEST, "make a checkpoint of one of DeepSpeed, ZeRO stage 1 to 3")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(|[kmgt]i?)b?", text.lower())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 8:
        raise argparse.ArgumentTypeError(f"{text} is no size of 8 bytes or more; write it as 512MiB or 5GB")
    return size


def _convert(args: argparse.Namespace) -> None:
    from shardwright.checkpoint.storage import open_storage

    configure_logging(0, 1)
    target = open_storage(args.target)
    _check_target(target, args)
    job = args.prepare(args, target)
    with _moved_aside(target, args), _progress(job, target) as written_bytes:
        started = time.monotonic()
        job.run(target.path)
        seconds = max(time.monotonic() - started, 1e-9)
    size = written_bytes()
    print(f"{target.path}: {decimal(size)} in {seconds:.1f} s, {decimal(int(size / seconds))}/s")


# The target.


def _check_target(target: Storage, args: argparse.Namespace) -> None:
    """Let nothing be overwritten that was not meant.

    Raises:
        CheckpointError: there is something.
    """
    from shardwright.checkpoint import CheckpointError

    files = target.sizes()
    held = [*files, *target.folders()]
    if held and not args.overwrite:
        raise CheckpointError(f"{target.path} exists and is not empty; give a new folder, or --overwrite to replace it")
    if held and args.mark not in files:
        raise CheckpointError(
            f"{target.path} holds {held[0]} and no {args.mark}: --overwrite replaces only what it would write; "
            "remove it, or give another folder"
        )
    if not target.is_local and (args.mark != MANIFEST or (held and args.prepare is _from_hf)):
        what = "this is written to local folders only" if args.mark != MANIFEST else "this replaces local folders only"
        raise CheckpointError(f"{target.path}: {what}; give one, and copy it there")


@contextmanager
def _moved_aside(target: Storage, args: argparse.Namespace) -> Iterator[None]:
    """Put a folder out of the way of what will not overwrite it, and back if that fails."""
    if args.prepare not in (_to_hf, _from_hf, _to_dcp) or not (target.is_local and target.sizes()):
        yield  # the others replace a checkpoint when the new one is complete
        return
    folder = Path(target.path).resolve()
    aside = folder.rename(folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:12]}.old"))
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        raise
    shutil.rmtree(aside)


@contextmanager
def _progress(job: Job, target: Storage) -> Iterator[Callable[[], int]]:
    """Show how far a job is, by the bytes that lie in its target; yield what counts them."""
    before = _bytes_in(target)
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(TextColumn("{task.description}"), *columns, console=CONSOLE, disable=not CONSOLE.is_terminal) as bar:
        task, done = bar.add_task("written", total=job.num_bytes), threading.Event()

        def watch() -> None:
            most = 0  # what is replaced goes at the end
            while not done.wait(POLL_SECONDS):
                with suppress(Exception):  # a file that is renamed meanwhile; the next look will do
                    most = max(most, _bytes_in(target) - before)
                    bar.update(task, completed=most)

        watcher = threading.Thread(target=watch, daemon=True)
        if CONSOLE.is_terminal:
            watcher.start()
        try:
            yield partial(_bytes_in, target)
        finally:
            done.set()
        if CONSOLE.is_terminal:
            watcher.join()
            bar.update(task, completed=job.num_bytes)


def _bytes_in(target: Storage) -> int:
    """Count the bytes of a target, and of the hidden folders that become it when they are complete."""
    folder = Path(target.path)
    parts = folder.parent.glob(f".{folder.name}-*.part/*") if target.is_local else []
    return sum(target.sizes().values()) + sum(path.stat().st_size for path in parts)


# The commands: each checks what it can before anything is written.


def _to_hf(args: argparse.Namespace, target: Storage) -> Job:
    from shardwright import checkpoint
    from shardwright.models.convert import export_to_hub

    dtype = _dtype(args.dtype)
    options = {"dtype": dtype, "tokenizer": args.tokenizer, "max_shard_bytes": args.max_shard_size}
    tensors = _select(checkpoint.open(args.source), only="model", dtype=dtype)
    return Job(partial(export_to_hub, args.source, **options), _sum_bytes(tensors))


def _from_hf(args: argparse.Namespace, target: Storage) -> Job:
    from shardwright.models.convert import import_from_hub

    source = _local(args.source)
    options = {"name": args.name, "tokenizer": args.tokenizer, "plugins": args.plugin}
    return Job(partial(import_from_hub, source, **options), _bytes_of(source.glob("*.safetensors")))


def _to_dcp(args: argparse.Namespace, target: Storage) -> Job:
    from shardwright import checkpoint
    from shardwright.checkpoint.interop.dcp import export_to_dcp

    return Job(partial(export_to_dcp, args.source), _sum_bytes(checkpoint.open(args.source).tensors))


def _from_dcp(args: argparse.Namespace, target: Storage) -> Job:
    from shardwright.checkpoint.interop.dcp import import_from_dcp

    source = _local(args.source)
    return Job(partial(import_from_dcp, source, skip=args.skip), _bytes_of(source.glob("*.distcp")))


def _from_deepspeed(args: argparse.Namespace, target: Storage) -> Job:
    from shardwright.checkpoint.interop.deepspeed import import_from_deepspeed
    from shardwright.checkpoint.interop.deepspeed_files import find_files

    source = _local(args.source)
    return Job(partial(import_from_deepspeed, source), _bytes_of(find_files(source).optimizer))


def _reshard(args: argparse.Namespace, target: Storage) -> Job:
    from shardwright import checkpoint
    from shardwright.checkpoint import CheckpointError

    archive = checkpoint.open(args.source)
    tensors = _select(archive, only=args.only, dtype=_dtype(args.dtype))
    total, limit = _sum_bytes(tensors), target.max_file_bytes // 2  # as when a run saves
    file_bytes = -(-total // (8 * args.files)) * 8 if args.files else args.max_file_size or min(FILE_BYTES, limit)
    if file_bytes > limit:
        raise CheckpointError(
            f"{target.path} takes files up to {decimal(limit)}, and not of {decimal(file_bytes)}; ask for smaller ones"
        )
    values = {name: v for name, v in archive.values.items() if not (args.only and name.startswith("optimizer."))}
    return Job(partial(rewrite, archive, tensors, values, max_file_bytes=file_bytes), total)


def _select(archive: Archive, *, only: str | None, dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    """Return the tensors to write, and as what."""
    from shardwright.checkpoint import CheckpointError, TensorInfo

    tensors = {
        name: TensorInfo(dtype if dtype and info.dtype.is_floating_point else info.dtype, info.shape)
        for name, info in archive.tensors.items()
        if not only or name.startswith(f"{only}.")
    }
    if only and not tensors:
        raise CheckpointError(f"{archive.storage.path} has no tensor {only}.*; use one that has")
    return tensors


def _local(source: str) -> Path:
    """Return the folder of another framework.

    Raises:
        CheckpointError: it is not local.
    """
    from shardwright.checkpoint import CheckpointError
    from shardwright.checkpoint.storage import open_storage

    storage = open_storage(source)
    if not storage.is_local:
        raise CheckpointError(f"{source}: folders of other frameworks are read from local disks only; copy it to one")
    return Path(storage.path)


def _dtype(short: str | None) -> torch.dtype | None:
    import torch

    return getattr(torch, DTYPES[short]) if short else None


def _bytes_of(files: Any) -> int | None:
    return sum(path.stat().st_size for path in files) or None


def _sum_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(info.num_bytes for info in tensors.values())


# Resharding.


def rewrite(
    archive: Archive, tensors: Mapping[str, TensorInfo], values: Mapping[str, Any], target: str, *, max_file_bytes: int
) -> None:
    """Write tensors of a checkpoint to another one; what is held in memory is one piece of one.

    Args:
        archive: to read.
        tensors: by name, with the dtypes that they shall have.
        values: of the new checkpoint.
        target: where to; may be what is read.
        max_file_bytes: of tensor data in a file.

    Raises:
        CheckpointError: what is read is damaged, or the target cannot be written. There is no new checkpoint then.
    """
    from shardwright import checkpoint

    def load(entry: Entry) -> torch.Tensor:
        return archive.read(entry.name, entry.box).to(entry.info.dtype)

    with checkpoint.create(target) as writer:
        for entries in deal(tensors, max_file_bytes):
            writer.add_file([(entry, partial(load, entry)) for entry in entries])
        writer.values |= values


def deal(tensors: Mapping[str, TensorInfo], max_file_bytes: int) -> Iterator[list[Entry]]:
    """Yield what goes to each file: as few as the limit allows, of equal size to 8 bytes per file.

    The tensors' bytes are strung together, widest dtypes first, and the string is cut. A cut goes through at most one
    tensor, and makes two boxes of it for every dim.
    """
    from shardwright.checkpoint.archive import split
    from shardwright.checkpoint.box import Box, decompose
    from shardwright.checkpoint.files import Entry

    total, limit = _sum_bytes(tensors), max(max_file_bytes // 8, 1) * 8
    num_files = max(-(-total // limit), 1)
    share = -(-total // (8 * num_files)) * 8  # whole elements of any dtype
    entries: list[Entry] = []
    room = share
    for name, info in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        width, numel, first = info.dtype.itemsize, info.num_bytes // info.dtype.itemsize, 0
        if not numel:
            entries.append(Entry(name, info, Box((0,) * len(info.shape), info.shape)))
        while first < numel:
            if not room:
                yield entries
                entries, room = [], share
            end = min(first + room // width, numel)
            boxes = (piece for box in decompose(info.shape, first, end) for piece in split(box, PIECE_BYTES // width))
            entries += [Entry(name, info, box) for box in boxes]
            room -= (end - first) * width
            first = end
    if entries:
        yield entries


if __name__ == "__main__":
    main()
