"""Look into checkpoints: checkpoints.py list|tree|stats|diff|verify PATH ... See --help."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.tree import Tree

if TYPE_CHECKING:  # what needs torch is imported by the commands: the help and a misspelt option do not wait for it
    import torch

    from shardwright.checkpoint import Archive
    from shardwright.checkpoint.storage import Storage

HELP = """Look into checkpoints, without the program that wrote them.

  checkpoints.py list runs/a
  checkpoints.py tree runs/a/checkpoints/step_00001000 --depth 2
  checkpoints.py diff runs/a/checkpoints/step_00001000 s3://bucket/copy
  checkpoints.py verify runs/a

PATH is a checkpoint, local or a URL (s3://bucket/folder); for list and verify also the folder of a run.
Status 0: well, 1: it differs (diff) or is damaged (verify), 2: there is no checkpoint that can be read.
"""
MANIFEST = "manifest.safetensors"
STEP = re.compile(r"step_(\d+)")
OF_RANK = re.compile(r"(\d+)-\d+-[0-9a-f]+\.safetensors")  # as processes that save together name their files
MAX_SHOWN = 60  # characters of a value


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; without a checkpoint it ends with status 2 and one message."""
    args = _parse(argv)
    try:
        status = args.run(args)
    except Exception as error:
        if not type(error).__module__.startswith("shardwright."):
            raise
        from shardwright.scripts.train import refuse

        refuse(error)
    sys.exit(status)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[..., int], what: str, *paths: str, nargs: str | None = None) -> Any:
        command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        for path in paths:
            command.add_argument(path.lower(), metavar=path, nargs=nargs)
        command.set_defaults(run=run)
        return command

    add("list", _list, "list the checkpoints of a run, those that are not finished or damaged too", "PATH")
    tree = add("tree", _tree, "show what a checkpoint holds: tensors, and values", "PATH")
    form = tree.add_mutually_exclusive_group()
    form.add_argument("--depth", type=_count, default=99, metavar="N", help="names down to N dots only")
    form.add_argument("--json", action="store_true", help="the whole manifest as JSON, without checksums")
    tree.add_argument("--boxes", action="store_true", help="where each box of a tensor lies")
    stats = add("stats", _stats, "read tensors, and show numbers of their finite elements, and bytes by file", "PATH")
    stats.add_argument("--tensors", default="*", metavar="PATTERN", help="names to read, as 'model.*.weight'")
    add("diff", _diff, "compare two checkpoints, bit by bit", "A", "B")
    verify = "read every byte, and hold it against its checksum; the files' own headers against the manifest"
    add("verify", _verify, verify, "PATH", nargs="+")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def _open(path: str) -> Archive:
    from shardwright import checkpoint

    return checkpoint.open(path)


def _find(path: str) -> list[Storage]:
    """Return the checkpoints that a path stands for, by step, unfinished ones too.

    Raises:
        CheckpointError: there is none.
    """
    from shardwright.checkpoint import CheckpointError
    from shardwright.checkpoint.storage import open_storage

    storage = open_storage(path)
    if MANIFEST in storage.sizes():
        return [storage]
    names = storage.folders()
    if "checkpoints" in names:
        storage = storage.child("checkpoints")
        names = storage.folders()
    found = {name: storage.child(name) for name in names}
    found = {name: child for name, child in found.items() if STEP.fullmatch(name) or MANIFEST in child.sizes()}
    if not found:
        raise CheckpointError(f"{path} is no complete checkpoint and holds none; give a folder with a {MANIFEST}")
    return [found[name] for name in sorted(found, key=lambda name: (_step_of(name), name))]


def _step_of(name: str) -> int:
    match = STEP.fullmatch(name)
    return int(match[1]) if match else -1


def _console() -> Console:
    """Return standard output; for a program that reads it, no line is broken."""
    width = None if sys.stdout.isatty() else 10_000
    return Console(width=width, markup=False, highlight=False, emoji=False)


def _plain(text: str) -> str:
    """Return a name that a stranger may have chosen without what steers a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(*columns: str, title: str | None = None) -> Table:
    """Return a table whose first column is of names, and the others of numbers."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


# list


def _list(args: argparse.Namespace) -> int:
    from shardwright.checkpoint import CheckpointError, DamagedError

    table = _table("checkpoint", "step", "state", "size", "tensors", "parameters", "tokens", "when", "run")
    troubles = []
    for storage in _find(args.path):
        sizes, name = storage.sizes(), storage.path.rpartition("/")[2]
        step, state, facts = str(_step_of(name)) if STEP.fullmatch(name) else "", "not finished", [""] * 3
        run = ""
        if MANIFEST in sizes:
            try:
                archive = _open(storage.path)
                state, step = "complete", str(archive.values.get("progress.step", step))
                facts, run = _facts(archive), _run_name(archive.values)
            except CheckpointError as error:
                state = "damaged" if isinstance(error, DamagedError) else "unreadable"
                troubles.append(str(error))
        table.add_row(_plain(name), step, state, decimal(sum(sizes.values())), *facts, _when(storage, sizes), run)
    _console().print(table)
    for trouble in troubles:
        print(_plain(trouble))
    return 0


def _facts(archive: Archive) -> list[str]:
    numels = [math.prod(info.shape) for name, info in archive.tensors.items() if name.startswith("model.")]
    tokens = archive.values.get("progress.tokens", "")
    return [f"{len(archive.tensors):,}", f"{sum(numels):,}" if numels else "", f"{tokens:,}" if tokens != "" else ""]


def _run_name(values: Mapping[str, Any]) -> str:
    config = values.get("progress.config")
    run = config.get("run") if isinstance(config, dict) else None
    return _plain(str(run.get("name", ""))) if isinstance(run, dict) else ""


def _when(storage: Storage, sizes: Mapping[str, int]) -> str:
    """Return when a checkpoint was completed, or the last of its files written, in local time."""
    from fsspec.core import url_to_fs

    try:
        files, root = url_to_fs(storage.path)
        names = [MANIFEST] if MANIFEST in sizes else list(sizes)
        times = [files.modified(f"{root}/{name}") for name in names]
    except (OSError, ValueError, NotImplementedError):  # deleted meanwhile; or the storage does not know
        return ""
    return max(times).astimezone().strftime("%Y-%m-%d %H:%M") if times else ""


# tree


@dataclass
class Node:
    """A name's part between two dots.

    Attributes:
        label: what it is itself, if anything.
        details: one line each.
        children: what its name begins.
        num_tensors, num_bytes: at and below it.
    """

    label: str = ""
    details: list[str] = field(default_factory=list)
    children: dict[str, Node] = field(default_factory=dict)
    num_tensors: int = 0
    num_bytes: int = 0

    def place(self, name: str, num_tensors: int = 0, num_bytes: int = 0) -> Node:
        """Return the node of a dotted name below this one, after adding to what is above it."""
        node = self
        for part in ["", *name.split(".")]:
            node = node.children.setdefault(part, Node()) if part else node
            node.num_tensors += num_tensors
            node.num_bytes += num_bytes
        return node

    def draw(self, tree: Tree, depth: int) -> None:
        """Add the children to a tree, `depth` levels of them."""
        for part, node in self.children.items():
            held = f"tensors: {node.num_tensors}, {decimal(node.num_bytes)}" if node.num_tensors else "values"
            label = node.label or held
            branch = tree.add(f"{_plain(part)}  {label}" + (" ..." if node.children and depth == 1 else ""))
            for detail in node.details:
                branch.add(detail)
            if depth > 1:
                node.draw(branch, depth - 1)


def _tree(args: argparse.Namespace) -> int:
    archive = _open(args.path)
    if args.json:
        json.dump(_as_json(archive, boxes=args.boxes), sys.stdout, indent=2)
        print()
        return 0
    tensors, values = Node(), Node()
    for name, info in archive.tensors.items():
        rows = _rows(archive, name)
        node = tensors.place(name, 1, info.num_bytes)
        files = {row["file"] for row in rows}
        node.label = f"{_dtype(info.dtype)} {list(info.shape)}, {decimal(info.num_bytes)}"
        node.label += f", boxes: {len(rows)}, files: {len(files)}"
        node.details = [_describe_box(row) for row in rows] if args.boxes else []
    for name, value in _flatten(archive.values):
        values.place(name).label = _shorten(value)
    files = archive.manifest.files
    tree = Tree(f"{_plain(args.path)}  {decimal(sum(files.values()))}, files: {len(files)}")
    for title, node in ((f"tensors: {len(archive.tensors)}", tensors), (f"values: {len(archive.values)}", values)):
        node.draw(tree.add(title), args.depth)
    _console().print(tree)
    return 0


def _rows(archive: Archive, name: str) -> list[dict[str, Any]]:
    """Return the stored boxes of a tensor."""
    manifest, num_dims = archive.manifest, len(archive.tensors[name].shape)
    rows = []
    for row in manifest.rows(name):
        box = manifest.boxes.box(row, num_dims)
        start = int(manifest.boxes.start[row])
        rows.append({"file": manifest.file_of(row), "start": start, "offsets": box.offsets, "sizes": box.sizes})
    return rows


def _describe_box(row: Mapping[str, Any]) -> str:
    ranges = (f"{first}:{first + size}" for first, size in zip(row["offsets"], row["sizes"], strict=True))
    return f"[{', '.join(ranges)}] in {row['file']} from byte {row['start']} on"


def _as_json(archive: Archive, *, boxes: bool) -> dict[str, Any]:
    tensors = {}
    for name, info in archive.tensors.items():
        rows = _rows(archive, name)
        tensors[name] = {
            "dtype": _dtype(info.dtype),
            "shape": info.shape,
            "bytes": info.num_bytes,
            "num_boxes": len(rows),
        }
        tensors[name] |= {"boxes": rows} if boxes else {}
    return {
        "path": archive.storage.path,
        "tensors": tensors,
        "values": archive.values,
        "files": archive.manifest.files,
    }


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 4]} ..."


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield values by dotted name, those of nested tables one by one."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# stats


def _stats(args: argparse.Namespace) -> int:
    from shardwright.checkpoint import CheckpointError
    from shardwright.scripts.checkpoint_contents import Numbers

    archive = _open(args.path)
    numbers = {name: Numbers() for name in archive.tensors if fnmatch(name, args.tensors)}
    if not numbers:
        raise CheckpointError(f"{args.path} has no tensor {args.tensors}; `tree` shows their names")
    for name, _, data in archive.stream(numbers):
        numbers[name].see(data)
    table = _table("tensor", "dtype", "shape", "min", "max", "mean", "std", "norm", "NaN", "inf")
    for name, seen in numbers.items():
        info = archive.tensors[name]
        shown = [seen.least, seen.most, seen.mean, seen.std, seen.norm] if seen.count else []
        texts = [f"{number:.6g}" for number in shown] or [""] * 5
        counts = [str(count or "") for count in (seen.num_nan, seen.num_inf)]
        table.add_row(_plain(name), _dtype(info.dtype), str(list(info.shape)), *texts, *counts)
    console = _console()
    console.print(table)
    _show_balance(console, archive, list(numbers))
    return 0


def _show_balance(console: Console, archive: Archive, names: Sequence[str]) -> None:
    """Show how many bytes of some tensors each rank wrote, or each file holds if no ranks saved together."""
    files = archive.manifest.files
    ranks = {file: f"rank {int(match[1])}" for file in files if (match := OF_RANK.fullmatch(file))}
    owners = ranks if len(ranks) == len(files) else dict(zip(files, files, strict=True))
    sizes, num_boxes = dict.fromkeys(owners.values(), 0), dict.fromkeys(owners.values(), 0)
    for name in names:
        for row in _rows(archive, name):
            owner = owners[row["file"]]
            sizes[owner] += math.prod(row["sizes"]) * archive.tensors[name].dtype.itemsize
            num_boxes[owner] += 1
    mean = sum(sizes.values()) / max(len(sizes), 1)
    table = _table("written by" if owners is ranks else "file", "boxes", "size", "of the mean")
    for owner, size in sizes.items():
        table.add_row(owner, f"{num_boxes[owner]:,}", decimal(size), f"{size / mean:.1%}" if mean else "")
    console.print(table)


# diff


def _diff(args: argparse.Namespace) -> int:
    from shardwright.scripts.checkpoint_contents import compare

    a, b = _open(args.a), _open(args.b)
    table = _table("tensor", "A", "B", "elements that differ", "max abs", "max rel")
    for name in dict.fromkeys([*a.tensors, *b.tensors]):
        p, q = a.tensors.get(name), b.tensors.get(name)
        shown = [f"{_dtype(info.dtype)} {list(info.shape)}" if info else "none" for info in (p, q)]
        numbers = [""] * 3
        if p and q and p.shape == q.shape:
            gap = compare(a, b, name)
            numbers = [f"{gap.count:,}", f"{gap.absolute:.3g}", f"{gap.relative:.3g}"]
            if p == q and not gap.count:
                continue
        table.add_row(_plain(name), *shown, *numbers)
    values = _table("value", "A", "B")
    x, y = dict(_flatten(a.values)), dict(_flatten(b.values))
    for name in dict.fromkeys([*x, *y]):
        shown = [_shorten(each[name]) if name in each else "none" for each in (x, y)]
        if name not in x or name not in y or x[name] != y[name]:
            values.add_row(_plain(name), *shown)
    console = _console()
    for each in (table, values):
        if each.row_count:
            console.print(each)
    equal = len(a.tensors.keys() | b.tensors.keys()) - table.row_count
    print(f"tensors: {equal} equal, {table.row_count} differ; values: {values.row_count} differ")
    return 1 if table.row_count or values.row_count else 0


# verify


def _verify(args: argparse.Namespace) -> int:
    from shardwright.checkpoint import DamagedError
    from shardwright.scripts.checkpoint_contents import check

    storages = [storage for path in args.path for storage in _find(path)]
    started, size, num_damaged, num_complete = time.monotonic(), 0, 0, 0
    for storage in storages:
        if MANIFEST not in storage.sizes():
            print(f"{storage.path} is not finished", flush=True)
            continue
        num_complete += 1
        try:
            archive = _open(storage.path)
            troubles = list(check(archive))
            size += sum(archive.manifest.files.values())
        except DamagedError as error:
            troubles = [str(error)]
        num_damaged += bool(troubles)
        for trouble in troubles:
            print(_plain(trouble), flush=True)
    seconds = max(time.monotonic() - started, 1e-9)
    print(
        f"checkpoints: {num_complete - num_damaged} whole, {num_damaged} damaged; "
        f"{decimal(size)} read in {seconds:.1f} s, {decimal(int(size / seconds))}/s"
    )
    return 1 if num_damaged else 0


if __name__ == "__main__":
    main()
