"""The state in the memory of the hosts outlives a process, and a host."""

import os
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from support import curve, fork, small, started_world, train, train_and_listen
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from shardwright import checkpoint
from shardwright.checkpoint import CheckpointError, HostMemory

HOSTS = ["left", "left", "right", "right"]
WHOLE = torch.arange(7000.0).reshape(70, 100)
PLACEMENTS = {"both": [Shard(0), Shard(1)], "rows": [Replicate(), Shard(0)], "copied": [Replicate(), Replicate()]}


def test_the_backup_is_on_another_host_and_shares_no_group_if_it_can():
    assert checkpoint.choose_shift(["a"] * 4) == 0
    assert checkpoint.choose_shift(["a", "b", "a", "b"]) in (1, 3)
    grid = np.stack(np.unravel_index(np.arange(8), (4, 2)), axis=1)
    shift = checkpoint.choose_shift([f"host{rank // 2}" for rank in range(8)], grid)
    pairs = [(grid[rank], grid[(rank + shift) % 8]) for rank in range(8)]
    assert all((a != b).all() for a, b in pairs)
    assert all(rank // 2 != (rank + shift) % 8 // 2 for rank in range(8))


class Part:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.state = state


def make(folder, values):
    world = started_world()
    mesh = init_device_mesh("cpu", (2, 2))
    tensors = {name: distribute_tensor(values.clone(), mesh, p) for name, p in PLACEMENTS.items()}
    memory = HostMemory(folder / HOSTS[world.rank], HOSTS, checkpoint.choose_shift(HOSTS))
    return memory, Part({**tensors, "n": 5 if values is WHOLE else 0})


def keep(folder):
    memory, part = make(folder, WHOLE)
    for step in (3, 4):
        checkpoint.save(memory.child(f"step_{step:08d}"), {"part": part})


def recall(folder):
    memory, part = make(folder, torch.zeros_like(WHOLE))
    steps = checkpoint.steps_in_memory(memory)
    checkpoint.load(memory.child(f"step_{steps[0]:08d}"), {"part": part})
    whole = [t.full_tensor() for t in part.state.values() if isinstance(t, DTensor)]
    return steps, part.state["n"], all(torch.equal(tensor, WHOLE) for tensor in whole)


def test_one_host_is_enough_and_none_is_an_error(tmp_path):
    fork(4, keep, tmp_path)
    assert fork(4, recall, tmp_path) == [([4, 3], 5, True)] * 4
    shutil.rmtree(tmp_path / "left")
    assert fork(4, recall, tmp_path) == [([4, 3], 5, True)] * 4
    next((tmp_path / "right" / "step_00000004").glob("00000-*")).unlink()
    assert all("went with the hosts" in message for message in fork(4, refused, tmp_path))


def refused(folder):
    with pytest.raises(CheckpointError) as error:
        recall(folder)
    return str(error.value)


def on_two_hosts(overrides, kill_step, function):
    """Train as two hosts of two processes each; the last process is killed before a step, if one is given."""
    rank = int(os.environ["RANK"])
    socket.gethostname = lambda: HOSTS[rank]

    def kill(run, step, batches):
        if step == kill_step and rank == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == kill_step:
            os._exit(0)  # as torchrun ends the others

    return train(overrides, kill) if kill_step else function(overrides)


def test_a_run_goes_on_from_memory_after_a_host_is_lost(corpus, tmp_path):
    overrides = small(
        corpus,
        tmp_path / "run",
        "train.num_steps=6",
        "checkpoint.every_steps=3",
        "checkpoint.memory_every_steps=1",
        f"checkpoint.memory_folder={tmp_path}/memory",
    )
    fork(4, on_two_hosts, overrides, 5, None)
    shutil.rmtree(tmp_path / "memory" / "left")
    lines = fork(4, on_two_hosts, overrides, None, train_and_listen)[0]
    resumed = next(line for line in lines if line.startswith("resumed from"))
    assert "/memory/" in resumed and resumed.endswith("step_00000004")
    assert [list(Path(tmp_path, "memory", host).iterdir()) for host in ("left", "right")] == [[], []]
    fork(4, train, small(corpus, tmp_path / "whole", "train.num_steps=6"))
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
