"""Measure saving and loading beside other checkpoint packages: bench_checkpoint.py --folder FOLDER. See --help.

One command starts its own processes, which hold the state of one and the same training program, and lets every
contender save and load it on this machine. One that fails, hangs or brings back a wrong bit is listed as failed.

The bytecheckpoint package pins old versions of what it needs. Install it beside the environment, without them:
    pip install --target FOLDER --no-deps bytecheckpoint 'mmh3<4.2' 'universal-pathlib<0.3' cachetools
and put FOLDER on PYTHONPATH (grpcio and protobuf come with tensorboard).
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import re
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardwright.scripts.bench_checkpoint_page import describe, write_page
from shardwright.scripts.bench_checkpoint_peers import CONTENDERS, Contender
from shardwright.scripts.bench_checkpoint_program import Layout, Program, any_process

GRACE_SECONDS = 15
SAMPLE_SECONDS = 0.05
RESERVED_BYTES = 2**30  # of the machine's memory: a task that leaves less is ended, before something else is
MATRIX = {"cpu": 640, "cuda": 8192}
DISK_BYTES = 2**30


@dataclass(frozen=True)
class Task:
    """What a group of processes is to do: save at a layout and load it there again, or load at another layout.

    Attributes:
        path: folder for the checkpoints of a save; the checkpoint that is loaded otherwise.
        generation: what the checkpoint that is loaded must hold; None for a task that saves.
    """

    contender: str
    layout: Layout
    gib: float
    device: str
    repeats: int
    step_seconds: float
    path: Path
    generation: int | None = None


class Bench:
    """One process's part in a task."""

    def __init__(self, task: Task, rank: int) -> None:
        self.task, self.rank = task, rank
        self.device = torch.device(task.device, rank) if task.device == "cuda" else torch.device("cpu")
        self.results: dict[str, Any] = {"saves": [], "loops": [], "loads": []}
        self.program = Program(task.layout, task.gib, self.device)
        size = MATRIX[task.device]
        dtype = torch.bfloat16 if task.device == "cuda" else torch.float32
        self.matrix = torch.randn(size, size, device=self.device, dtype=dtype)
        gc.collect()
        self.contender: Contender = CONTENDERS[task.contender]()
        self.results["parameters"] = self.program.num_parameters

    def run(self) -> None:
        """Do the task."""
        task = self.task
        self.results["saves_ready"] = self.now()
        if task.generation is not None:
            self._load(task.path, task.generation)
            return
        saved, generation = task.path, 0
        for number in range(1 + task.repeats):
            saved, generation = task.path / str(number), self._save(number)
        for number in range(1 + task.repeats, 1 + 2 * task.repeats):
            saved, generation = task.path / str(number), self._loop(number)
        self.contender.close()
        gc.collect()
        self.results |= {"path": str(saved), "generation": generation}
        self._load(saved, generation)

    def now(self) -> float:
        """Return seconds, after everything that training has started on the device (copies beside it may go on)."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return time.monotonic()

    def _iterate(self) -> float:
        """Compute as a forward and backward pass does, and change nothing; return seconds."""
        start = self.now()
        torch.mm(self.matrix, self.matrix)
        return self.now() - start

    def _begin(self, number: int) -> tuple[Path, int]:
        """Make room, bring the state to a new generation, and start together."""
        if self.rank == 0:
            shutil.rmtree(self.task.path / str(number - 1), ignore_errors=True)
            os.sync()
        self.program.advance()
        dist.barrier()
        return self.task.path / str(number), self.program.generation

    def _save(self, number: int) -> int:
        """Save once with nothing beside it but, for overlapped ones, one pass; return the generation saved."""
        path, generation = self._begin(number)
        start = self.now()
        flight = self.contender.save(path, self.program)
        called = self.now()
        with ThreadPoolExecutor(1) as waiter:
            durable = waiter.submit(self._moment_of, flight.durable)
            if self.contender.overlapped:
                self._pass()
            waited = self.now()
            flight.staged()
            staged = self.now()
            self.program.advance()  # as the optimizer does: what is written must not change
            end = durable.result()
        figures = {"blocked": called - start + staged - waited, "durable": end - start}
        self.results["saves"].append({"start": start, "end": end, **figures})
        return generation

    @staticmethod
    def _moment_of(function: Callable[[], object]) -> float:
        function()
        return time.monotonic()

    def _quiet(self) -> float:
        """Return seconds per iteration while nothing is saved, and let all go on together."""
        iterations, seconds = self._pass()
        dist.barrier()
        return seconds / iterations

    def _pass(self) -> tuple[int, float]:
        """Compute for as long as a forward and backward pass; return iterations and seconds."""
        iterations, seconds = 0, 0.0
        while seconds < self.task.step_seconds:
            seconds += self._iterate()
            iterations += 1
        return iterations, seconds

    def _loop(self, number: int) -> int:
        """Train while a save is in flight; return the generation saved."""
        path, generation = self._begin(number)
        seconds_per_iteration = self._quiet()
        start = self.now()
        flight = self.contender.save(path, self.program)
        iterations, computing = 0, 0.0
        if self.contender.overlapped:
            iterations, computing = self._pass()
        flight.staged()
        self.program.advance()
        with ThreadPoolExecutor(1) as waiter:
            durable = waiter.submit(flight.durable)
            while not durable.done():
                computing += self._iterate()
                iterations += 1
            durable.result()
        seconds = self.now() - start
        expected = iterations * seconds_per_iteration
        slower = {"slower": computing / expected - 1} if iterations else {}
        self.results["loops"].append({"lost": seconds - expected, **slower})
        return generation

    def _load(self, path: Path, generation: int) -> None:
        """Load and compare, from the disk and from the page cache."""
        self.results["loads_ready"] = self.now()
        for _ in range(self.task.repeats):
            for temperature in ("cold", "warm"):
                self.program.clear()
                if temperature == "cold" and self.rank == 0:
                    drop_from_cache(path)
                dist.barrier()
                start = self.now()
                self.contender.load(path, self.program)
                end = self.now()
                wrong = self.program.differing(generation)
                if any_process(bool(wrong), self.device):
                    raise RuntimeError(f"loaded wrong bits: {len(wrong)} tensors here, {wrong[:3]}")
                self.results["loads"].append({"start": start, "end": end, temperature: end - start})


def drop_from_cache(path: Path) -> None:
    """Make a folder's files durable and take them out of the page cache."""
    for file in path.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def work(task: Task, rank: int, scratch: Path) -> None:
    """Run one process of a task and leave its results, or why there are none, in a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    try:
        if task.device == "cuda":
            torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl" if task.device == "cuda" else "gloo"
        store = f"file://{scratch}/store"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=task.layout.num_processes)
        bench = Bench(task, rank)
        results = bench.results
        bench.run()
        dist.destroy_process_group()
    except BaseException:
        results["error"] = traceback.format_exc()
        raise
    finally:
        partial = scratch / f"{rank}.part"
        partial.write_text(json.dumps(results))
        partial.rename(scratch / f"{rank}.json")


class Memory(threading.Thread):
    """Samples what processes and their descendants hold: private memory of each, and the machine's shared memory."""

    def __init__(self, pids: list[int]) -> None:
        super().__init__(daemon=True)
        self.pids, self.samples, self.ended = pids, [], threading.Event()
        self.available_bytes = float("inf")

    def run(self) -> None:
        """Sample until `ended`."""
        while not self.ended.wait(SAMPLE_SECONDS):
            total = _field_bytes("/proc/meminfo", "Shmem")
            total += sum(_field_bytes(f"/proc/{pid}/status", "RssAnon") for pid in _descendants(self.pids))
            self.samples.append((time.monotonic(), total))
            self.available_bytes = _field_bytes("/proc/meminfo", "MemAvailable")

    def peak_gib(self, ready: float, start: float, end: float) -> float:
        """Return the most that was held from `start` to `end`, above what was held at the moment `ready`."""
        before = [held for moment, held in self.samples if moment <= ready]
        during = [held for moment, held in self.samples if start <= moment <= end]
        return (max(during) - before[-1]) / 2**30 if before and during else float("nan")


def _descendants(pids: list[int]) -> Iterator[int]:
    for pid in pids:
        yield pid
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                children = task.read_text()
            except OSError:
                continue
            yield from _descendants([int(child) for child in children.split()])


def _field_bytes(path: str, field: str) -> int:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)
    except OSError:  # it has just ended
        return 0
    return int(found[1]) * 1024 if found else 0


@contextmanager
def started(task: Task, scratch: Path) -> Iterator[list[Any]]:
    """Start the processes of a task; end those that are still there when the block is left."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(task, rank, scratch)) for rank in range(task.layout.num_processes)]
    for worker in workers:
        worker.start()
    try:
        yield workers
    finally:
        pids = list(_descendants([worker.pid for worker in workers if worker.is_alive() and worker.pid]))
        for worker in workers:
            worker.terminate()
            worker.join(5)
        for pid in pids:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, 9)


def run_task(task: Task, limit_seconds: float) -> dict[str, Any]:
    """Run a task and return its figures: of every repeat the slowest process's, and peaks of memory.

    What was measured before an exception is kept, with the exception under `error`.
    """
    with tempfile.TemporaryDirectory() as name, started(task, Path(name)) as workers:
        scratch = Path(name)
        memory = Memory([worker.pid for worker in workers])
        memory.start()
        stopped = _watch(workers, memory, time.monotonic() + limit_seconds)
        memory.ended.set()
        memory.join()
        files = [scratch / f"{rank}.json" for rank in range(len(workers))]
        ranks = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        exits = [worker.exitcode for worker in workers]
    errors = [rank["error"] for rank in ranks if "error" in rank]
    if not errors and (stopped or any(exits) or not all(ranks)):
        errors = [stopped or f"processes ended with {exits}"]
    return _merge(ranks, memory) | ({"error": errors[0]} if errors else {})


def _watch(workers: list[Any], memory: Memory, deadline: float) -> str | None:
    """Wait until all processes have ended (None), or say why there is no more to wait for."""
    while any(worker.is_alive() for worker in workers):
        if time.monotonic() > deadline:
            return "not all processes had ended when the time was over (--limit-seconds)"
        if memory.available_bytes < RESERVED_BYTES:
            return f"less than {RESERVED_BYTES / 2**30:g} GiB of the machine's memory were left"
        if any(worker.exitcode for worker in workers):
            time.sleep(GRACE_SECONDS)
            return f"processes ended with {[worker.exitcode for worker in workers]}"
        time.sleep(SAMPLE_SECONDS)
    return None


def _merge(ranks: list[dict[str, Any]], memory: Memory) -> dict[str, Any]:
    merged: dict[str, Any] = {**ranks[0], "saves": [], "loops": [], "loads": []}
    for kind in ("saves", "loops", "loads"):
        for repeat in zip(*(rank.get(kind, []) for rank in ranks), strict=False):
            keys = {key for process in repeat for key in process}  # one that waited for nothing has no `slower`
            figures = {key: max(process[key] for process in repeat if key in process) for key in keys}
            if kind != "loops":
                start = min(process["start"] for process in repeat)
                figures["memory_gib"] = memory.peak_gib(merged[f"{kind}_ready"], start, figures.pop("end"))
                del figures["start"]
            merged[kind].append(figures)
    return merged


def disk_speed(folder: Path) -> dict[str, float]:
    """Return GB/s of writing one file durably through the page cache and of reading it back from the disk."""
    block, file = os.urandom(2**24), folder / "speed"
    start = time.monotonic()
    with open(file, "wb") as stream:
        for _ in range(DISK_BYTES // len(block)):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    written = time.monotonic()
    drop_from_cache(folder)
    dropped = time.monotonic()
    with open(file, "rb", buffering=0) as stream:
        while stream.read(len(block)):
            pass
    read = time.monotonic()
    file.unlink()
    return {"write": DISK_BYTES / (written - start) / 1e9, "read": DISK_BYTES / (read - dropped) / 1e9}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Let one contender save at one layout, and load there and at the other."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        disk = disk_speed(Path(folder))
        task = Task(name, args.saved_at, args.gib, args.device, args.repeats, args.step_seconds, Path(folder))
        same = run_task(task, args.limit_seconds)
        figures = {"disk": disk, "saves": same["saves"], "loops": same["loops"], "same": same["loads"], "other": []}
        figures |= {key: same[key] for key in ("parameters", "error") if key in same}
        if "error" not in same:
            moved = replace(task, layout=args.loaded_at, path=Path(same["path"]), generation=same["generation"])
            other = run_task(moved, args.limit_seconds)
            figures["other"] = other["loads"]
            figures |= {key: other[key] for key in ("error",) if key in other}
    return figures


def default_layouts(processes: int) -> tuple[Layout, Layout]:
    """Return where to save and where to load: tensor parallelism and sharding, then sharding alone."""
    tensor = 2 if processes % 2 == 0 else 1
    replicate = 2 if processes % 8 == 0 else 1
    return Layout(replicate, processes // tensor // replicate, tensor), Layout(shard=processes)


def main() -> None:
    """Run the command."""
    args = parse()
    names = [name for name in CONTENDERS if re.search(args.only, name) and name.split()[0] in ("ours", *args.peers)]
    args.folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    about = describe(args)
    results = {}
    for name in names:
        results[name] = measure(name, args)
        write_page(about, results, args.output)
        blocked = [round(save["blocked"], 3) for save in results[name]["saves"]]
        error = results[name].get("error", "").strip().splitlines()
        print(f"{name}: blocked {blocked} s {error[-1] if error else ''}", flush=True)
    print(write_page(about, results, args.output))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure saving and loading beside other checkpoint packages.")
    parser.add_argument("--folder", type=Path, required=True, help="where to write checkpoints, on the disk to measure")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--gib", type=float, default=6, help="of weights and AdamW moments in fp32, all processes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the state lies")
    parser.add_argument("--saved-at", type=Layout.parse, help="layout, e.g. replicate2-tensor2")
    parser.add_argument("--loaded-at", type=Layout.parse, help="the other layout, e.g. shard4")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=["dcp", "bytecheckpoint"])
    parser.add_argument("--only", default="", help="regular expression that a contender's name must match")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step-seconds", type=float, default=1, help="pass behind which overlapped saves stage")
    parser.add_argument("--limit-seconds", type=float, default=900, help="per group of processes")
    parser.add_argument("--output", type=Path, help="page to write, PAGE.md; the raw figures go to PAGE.json")
    args = parser.parse_args()
    defaults = default_layouts(args.processes)
    args.saved_at, args.loaded_at = args.saved_at or defaults[0], args.loaded_at or defaults[1]
    for layout in (args.saved_at, args.loaded_at):
        if layout.num_processes != args.processes:
            parser.error(f"layout {layout} takes {layout.num_processes} processes, --processes is {args.processes}")
    if args.device == "cuda" and torch.cuda.device_count() < args.processes:
        parser.error(f"--processes {args.processes} needs as many GPUs, there are {torch.cuda.device_count()}")
    return args


if __name__ == "__main__":
    main()
