"""Who takes part in the checkpoint benchmark: Shardwright and its ablations, torch DCP, the bytecheckpoint package."""

from __future__ import annotations

import abc
import importlib
import logging
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint import _async_process_executor as process_executor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from shardwright.scripts.bench_checkpoint_program import NUM_UPDATES, Program


class InFlight(NamedTuple):
    """A save that was called: what to call until the state may change, and until the checkpoint is durable."""

    staged: Callable[[], object]
    durable: Callable[[], object]


class Contender(abc.ABC):
    """One way to save and load a program.

    Attributes:
        overlapped: whether staging goes on after the call, behind a forward and backward pass.
    """

    overlapped = False

    @abc.abstractmethod
    def save(self, path: Path, program: Program) -> InFlight:
        """Start to save to a new folder (collective)."""

    @abc.abstractmethod
    def load(self, path: Path, program: Program) -> None:
        """Fill the program (collective)."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Free what is kept from save to save."""


def _done() -> None:
    """Wait for nothing."""


@dataclass(frozen=True)
class Variant:
    """A way to use Shardwright: the mode of a save, and fields of SaveOptions and LoadOptions that are not default."""

    mode: str
    save: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "ours sync": Variant("sync"),
    "ours async": Variant("async"),
    "ours overlap": Variant("overlap"),
    "ours overlap, no plan cache": Variant("overlap", save={"cache": False}),
    "ours overlap, no balance": Variant("overlap", save={"balance": False}),
    "ours sync, no pipeline": Variant("sync", save={"pipeline": False}),
    "ours overlap, writes beside copies": Variant("overlap", save={"pipeline": True}),
    "ours overlap, reads exchanged": Variant("overlap", load={"exchange": True}),
}


class Ours(Contender):
    """`shardwright.checkpoint`, given the module and the optimizer themselves."""

    def __init__(self, variant: Variant) -> None:
        self.variant, self.overlapped = variant, variant.mode == "overlap"
        self.package: Any = importlib.import_module("shardwright.checkpoint")

    def save(self, path: Path, program: Program) -> InFlight:
        """Save with the variant's mode and options."""
        options = {"options": self.package.SaveOptions(**self.variant.save)} if self.variant.save else {}
        pending = self.package.save(path, self._parts(program), mode=self.variant.mode, **options)
        return InFlight(pending.wait_staged, pending.wait)

    def load(self, path: Path, program: Program) -> None:
        """Load with the variant's options."""
        options = {"options": self.package.LoadOptions(**self.variant.load)} if self.variant.load else {}
        self.package.load(path, self._parts(program), **options)

    @staticmethod
    def _parts(program: Program) -> dict[str, Any]:
        return {"model": program.model, "optimizer": program.optimizer}


class Dcp(Contender):
    """torch.distributed.checkpoint, given a flat dict of the tensors (no cost of collecting a state dict).

    Staged variants keep their staging memory from save to save (pinned on a GPU, shared with the writing process) and
    reuse the plan; overlapped ones stage in a thread.
    """

    def __init__(self, kind: str, staged: bool = False, overlapped: bool = False) -> None:
        self.overlapped, self.stager = overlapped, None
        self.arguments: dict[str, Any] = {}
        if kind != "sync":
            self.arguments["async_checkpointer_type"] = AsyncCheckpointerType(kind)
        if staged:
            # Pinned memory and copies that do not block are refused where there is no GPU.
            gpu = torch.cuda.is_available()
            self.stager = DefaultStager(StagingOptions(gpu, True, overlapped, gpu))
            self.arguments |= {"async_stager": self.stager, "planner": DefaultSavePlanner(enable_plan_caching=True)}
        self.save_function = dcp.save if kind == "sync" else dcp.async_save

    def save(self, path: Path, program: Program) -> InFlight:
        """Call `save` or `async_save`."""
        result: Any = self.save_function(self._state(program), checkpoint_id=path, **self.arguments)
        if isinstance(result, Future):
            return InFlight(_done, result.result)
        if self.arguments:
            return InFlight(result.staging_completion.result, result.upload_completion.result)
        return InFlight(_done, _done)

    def load(self, path: Path, program: Program) -> None:
        """Load in place."""
        state = self._state(program)
        dcp.load(state, checkpoint_id=path)
        for values in program.optimizer.state.values():
            values["step"].fill_(state["step"])

    def close(self) -> None:
        """Free the staging memory and end the writing process."""
        if self.stager is not None:
            self.stager.close()
        process_executor._CHECKPOINT_PROCESS = None  # the process ends with its last reference

    @staticmethod
    def _state(program: Program) -> dict[str, Any]:
        return {**program.tensors(), "step": NUM_UPDATES}


class ByteCheckpoint(Contender):
    """The bytecheckpoint package, through its interface for FSDP2, which takes any DTensors.

    It is given the module and the optimizer themselves, the one form that it accepts. Durable is when it says so on
    process 0, after all processes have reported to it.
    """

    def __init__(self, fast: bool) -> None:
        self.fast, self.num_saves = fast, 0
        self.package: Any = importlib.import_module("bytecheckpoint")
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("bytecheckpoint"):
                logging.getLogger(name).setLevel(logging.ERROR)

    def save(self, path: Path, program: Program) -> InFlight:
        """Save; the call returns when the files are written, `fast_saving` or not."""
        _serve_without_route()
        reported = threading.Event()
        self.num_saves += 1  # without a step it neither reports nor marks a checkpoint complete
        self.package.save(
            str(path),
            {"model": program.model, "optimizer": program.optimizer},
            framework="fsdp2",
            fast_saving=self.fast,
            global_steps=self.num_saves,
            callback=reported.set,
            ignore_append_global_steps_to_folder=True,
        )
        return InFlight(_done, partial(self._wait, reported))

    def load(self, path: Path, program: Program) -> None:
        """Load through the state dicts of module and optimizer."""
        parts = {"model": program.model, "optimizer": program.optimizer}
        self.package.load(str(path), parts, framework="fsdp2", fast_loading=self.fast)

    @staticmethod
    def _wait(reported: threading.Event) -> None:
        if dist.get_rank() == 0:
            reported.wait()
        dist.barrier()


def _serve_without_route() -> None:
    """Start the package's report service at the loopback address on a machine that has no route to the internet.

    The package asks for the address from which 8.8.8.8 is reached, and waits for ever where there is none.
    """
    context: Any = importlib.import_module("bytecheckpoint.distributed.rpc_context")
    server: Any = importlib.import_module("bytecheckpoint.utilities.server.server_lib")
    if context._addr is not None or _has_route():
        return
    server._get_local_ip = lambda: "127.0.0.1"
    address = [server.serve(server.ReportServicer(dist.get_world_size())) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(address)
    context._addr, context._stub = address[0], server.get_stub(address[0])


def _has_route() -> bool:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("8.8.8.8", 80))
    except OSError:
        return False
    return True


CONTENDERS: dict[str, Callable[[], Contender]] = {
    **{name: partial(Ours, variant) for name, variant in VARIANTS.items()},
    "dcp save": partial(Dcp, "sync"),
    "dcp async thread": partial(Dcp, "thread"),
    "dcp async process": partial(Dcp, "process"),
    "dcp async thread, staged": partial(Dcp, "thread", staged=True),
    "dcp async process, staged": partial(Dcp, "process", staged=True),
    "dcp async process, staged, overlapped": partial(Dcp, "process", staged=True, overlapped=True),
    "bytecheckpoint": partial(ByteCheckpoint, fast=False),
    "bytecheckpoint fast": partial(ByteCheckpoint, fast=True),
}
