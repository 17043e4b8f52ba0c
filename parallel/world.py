"""The processes of a run: who they are, which device each has, how they find each other."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from shardwright.parallel.mesh import TopologyError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those of the run, as torchrun started them; one process needs no torchrun."""

    rank: int
    num_processes: int
    device: torch.device

    @classmethod
    def from_environment(cls, device: str = "auto") -> World:
        """Read torchrun's variables and choose the device; starts nothing.

        Raises:
            TopologyError: a device was asked for that this machine lacks.
        """
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        num_gpus = torch.cuda.device_count()
        if device == "auto":
            device = "cuda" if num_gpus else "cpu"
        if device == "cuda" and local_rank >= num_gpus:
            raise TopologyError(
                f"train.device=cuda: local process {local_rank} has no GPU, this machine has {num_gpus}; "
                f"each process needs one; use --nproc-per-node {max(num_gpus, 1)} or train.device=cpu"
            )
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            num_processes=int(os.environ.get("WORLD_SIZE", 1)),
            device=torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu"),
        )

    def start(self) -> None:
        """Join the process group (collective): gloo for CPU tensors, NCCL beside it where there are GPUs.

        Under torchrun each attempt has its own keys in the store, so that a restarted group never reads what the
        failed one left, and a worker dies with its agent instead of training on as an orphan.
        """
        backend = "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _die_with_parent()
        if "MASTER_ADDR" in os.environ:
            timeout = timedelta(minutes=10)
            store, _, _ = next(dist.rendezvous("env://", self.rank, self.num_processes, timeout=timeout))
            store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        else:
            store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.num_processes)

    def stop(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def use_deterministic_algorithms() -> None:
    """Make reruns bit-identical, on GPUs at the cost of speed. Call before the first CUDA work."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
