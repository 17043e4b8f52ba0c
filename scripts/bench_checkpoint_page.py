"""The page that the checkpoint benchmark writes: what was measured where, tables, failures."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

PACKAGES = ("torch", "shardwright", "bytecheckpoint")
MEANING = """\
Seconds are those of the slowest process; each is the median of the repeats, with the least and the greatest.
*Blocked*: until the state may be changed again (for overlapped saves: the call, and what is left to wait after a pass
of {step:g} s). *Durable*: from the call until the checkpoint is complete and synced, on all processes. *First* includes
what is set up once per run. *Lost*: how much later training is when a save is over than it would be without it, with
matrix products on every process from the moment the call returns; *slower*: how much longer these products take
meanwhile. *Memory*: the most that all processes and their helpers hold above the state itself, private and shared; the
page cache is not counted.

Every load is compared bit for bit, and the state is changed as soon as a contender allows it. *Cold*: the files were
dropped from the page cache; *warm*: read a second time. Every save goes to a new folder, and syncs it.
"""


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Return what is to be known about a run before it starts."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": _command(args.folder),
        "machine": _machine(args),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "load_average": os.getloadavg()[0],
        "gib": args.gib,
        "saved_at": str(args.saved_at),
        "loaded_at": str(args.loaded_at),
        "processes": args.processes,
        "step_seconds": args.step_seconds,
    }


def write_page(about: dict[str, Any], results: dict[str, Any], output: Path | None) -> str:
    """Return the page; write it, and the raw figures beside it, if `output` names a file."""
    text = page(about, results, None if output is None else output.with_suffix(".json").name)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".md").write_text(text)
        output.with_suffix(".json").write_text(json.dumps({"about": about, "results": results}, indent=1))
    return text


def page(about: dict[str, Any], results: dict[str, Any], raw: str | None) -> str:
    """Return the page as Markdown."""
    parameters = max((result.get("parameters", 0) for result in results.values()), default=0)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    disk = {kind: spread(result["disk"][kind] for result in results.values()) for kind in ("write", "read")}
    failed = {name: result["error"].strip() for name, result in results.items() if "error" in result}
    lines = [
        "# Saving and loading checkpoints, side by side",
        "",
        f"{about['date']}, {about['machine']}; {versions}. One run: {parameters / 1e6:.0f}M parameters and their AdamW "
        f"moments in fp32 ({about['gib']:g} GiB) on {about['processes']} processes. The disk, measured before each "
        f"contender, writes {disk['write']} GB/s and reads {disk['read']} GB/s through the page cache, one stream. "
        f"Load average at the start: {about['load_average']:.1f}.",
        "",
        *([f"Raw figures: [{raw}]({raw}).", ""] if raw else []),
        f"    {about['command']}",
        "",
        MEANING.format(step=about["step_seconds"]),
        f"## Saving at {about['saved_at']}",
        "",
        *_table(("contender", *_SAVING), ((name, *_saving(result)) for name, result in results.items())),
        "",
        f"## Loading at {about['saved_at']}, and at {about['loaded_at']}",
        "",
        *_table(("contender", *_LOADING), ((name, *_loading(result)) for name, result in results.items())),
        "",
    ]
    if failed:
        lines += ["## Failed", "", *(f"- {name}: `{error.splitlines()[-1]}`" for name, error in failed.items()), ""]
    return "\n".join(lines)


_SAVING = ("blocked first s", "blocked s", "durable first s", "durable s", "lost s", "slower", "memory GiB")
_LOADING = ("same, cold s", "same, warm s", "other, cold s", "other, warm s", "memory GiB")


def _saving(result: dict[str, Any]) -> list[str]:
    saves, loops = result["saves"], result["loops"]
    cells = []
    for key in ("blocked", "durable"):
        values = [save[key] for save in saves]
        cells += [spread(values[:1]), spread(values[1:])]
    slower = [loop["slower"] for loop in loops if "slower" in loop]
    memory = max((save["memory_gib"] for save in saves), default=None)
    return [
        *cells,
        spread(loop["lost"] for loop in loops),
        f"{median(slower):.0%}" if slower else "-",
        "-" if memory is None else f"{memory:.2f}",
    ]


def _loading(result: dict[str, Any]) -> list[str]:
    loads = [(where, load) for where in ("same", "other") for load in result[where]]
    cells = [
        spread(load[heat] for place, load in loads if place == where and heat in load)
        for where in ("same", "other")
        for heat in ("cold", "warm")
    ]
    memory = max((load["memory_gib"] for _, load in loads), default=None)
    return [*cells, "-" if memory is None else f"{memory:.2f}"]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---", *("--:" for _ in head[1:])), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def spread(values: Iterable[float]) -> str:
    """Return a median, with the least and greatest value where there are several."""
    listed = sorted(values)
    if not listed:
        return "-"
    if len(listed) == 1:
        return f"{listed[0]:.2f}"
    return f"{median(listed):.2f} ({listed[0]:.2f} to {listed[-1]:.2f})"


def _command(folder: Path) -> str:
    words = ["FOLDER" if word == str(folder) else word for word in sys.argv[1:]]
    return shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *words])


def _machine(args: argparse.Namespace) -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [f"{os.cpu_count()} cores {cpu[1] if cpu else platform.machine()}", f"{memory:.0f} GiB memory"]
    if args.device == "cuda":
        parts.append(f"{args.processes} x {torch.cuda.get_device_name(0)}")
    return ", ".join([*parts, f"folder on {_filesystem(args.folder)}"])


def _filesystem(folder: Path) -> str:
    resolved, mounts = folder.resolve(), Path("/proc/mounts").read_text().splitlines()
    found = [(Path(point), kind) for _, point, kind, *_ in map(str.split, mounts) if resolved.is_relative_to(point)]
    return max(found, key=lambda mount: len(mount[0].parts))[1]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
