"""A run with two checkpoints, and the commands for checkpoints, run in this process: fixtures.

A module takes them with `pytest_plugins = ["support_checkpoints"]`.
PYTEST_DONT_REWRITE: modules import functions from here, too, before pytest could.
"""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import TINY

from shardwright import checkpoint
from shardwright.checkpoint import Box, manifest
from shardwright.checkpoint.box import decompose
from shardwright.conf.load import load_config, to_dict
from shardwright.kernels import Kernels
from shardwright.models.registry import FAMILIES

ODD = torch.tensor([[1.5, -2.0, math.nan], [math.inf, 0.25, -math.inf]], dtype=torch.bfloat16)


def write(path, step, scale=1.0):
    """Write a checkpoint of a run, with weights, moments and a few odd tensors; some are boxes in several files."""
    config = load_config([*TINY, "data.tokenizer=bytes", "model.vocab_size=272", "run.name=mine"])
    model = FAMILIES[config.model.kind].build(config.model, Kernels())
    generator = torch.Generator().manual_seed(5)
    with checkpoint.create(path) as writer, torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.normal_(generator=generator)
            writer.add(f"model.{name}", tensor * scale)
            writer.add(f"optimizer.moments.{name}.exp_avg", tensor * 0)
            writer.add(f"optimizer.moments.{name}.exp_avg_sq", tensor**2)
        wide = torch.randn(6, 10, 3, generator=generator, dtype=torch.float64)
        for box in [*decompose((6, 10, 3), 0, 47), *decompose((6, 10, 3), 47, 180)]:
            writer.add("odd.wide", wide[box.within(Box((0, 0, 0), (6, 10, 3)))], shape=(6, 10, 3), offsets=box.offsets)
        writer.add("odd.floats", ODD)
        writer.add("odd.flags", torch.tensor([True, False, True]))
        writer.add("odd.none", torch.zeros(0, 4, dtype=torch.int16))
        writer.add("odd.count", torch.tensor(2**40 + step))
        writer.values |= {"progress.step": step, "progress.tokens": 128 * step, "progress.config": to_dict(config)}
        writer.values |= {"optimizer.num_updates": step}
    return path


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write(folder / "checkpoints" / "step_00000002", 2)
    write(folder / "checkpoints" / "step_00000004", 4, scale=1.5)
    return folder


@pytest.fixture(scope="session")
def saved(run_folder):
    """A checkpoint that no test changes."""
    return str(run_folder / "checkpoints" / "step_00000004")


@pytest.fixture
def own(run_folder, tmp_path):
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


@pytest.fixture
def use(capsys):
    """Run a command in this process; return its status and what it printed."""

    def use(script, *line):
        capsys.readouterr()
        try:
            script.main([str(word) for word in line])
            status = 0
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return use


def rows(text):
    """The rows of all tables: first cell -> the other cells."""
    lines = (line.strip().replace("┃", "│") for line in text.splitlines())
    cells = ([cell.strip() for cell in line[1:-1].split("│")] for line in lines if line[:1] == "│")
    return {first: rest for first, *rest in cells}


def data_file(path):
    return sorted(file for file in Path(path).glob("*.safetensors") if file.name != manifest.NAME)[-1]


def flip_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    file.write_bytes(data)
    return file


def assert_same(one, other, names=None):
    """Tensors are the same bit for bit."""
    a, b = checkpoint.open(one), checkpoint.open(other)
    names = a.tensors.keys() if names is None else names
    assert names and names <= b.tensors.keys()
    for name in names:
        x, y = a.read(name), b.read(name)
        assert x.dtype == y.dtype and x.shape == y.shape, name
        assert torch.equal(x.flatten().view(torch.uint8), y.flatten().view(torch.uint8)), name


def refused(done):
    """What was said in one line by a command that was refused."""
    assert done.status == 2 and done.out == "" and done.err.count("\n") == 1, done
    return done.err
