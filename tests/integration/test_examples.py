"""The examples of docs/examples as a user runs them: interrupted, resumed, and each from another's checkpoint."""

import importlib
import sys

import pytest
import torch.distributed as dist
from support import ROOT, command, fork

FOLDER = ROOT / "docs" / "examples"
EXAMPLES = {"checkpoint_plain": 1, "checkpoint_ddp": 2, "checkpoint_fsdp2": 2, "checkpoint_tensor_parallel": 2}


def run(name, folder, steps):
    """Run an example in forked processes and return the loss of the first."""
    losses = fork(EXAMPLES[name], run_here, name, str(folder), steps)
    assert len(set(losses)) == 1
    return losses[0]


def run_here(name, folder, steps):
    sys.path.insert(0, str(FOLDER))
    loss = importlib.import_module(name).main(folder, steps)
    assert not dist.is_initialized()
    return loss


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_goes_on_where_it_was(tmp_path, name):
    expected = run(name, tmp_path / "whole", 15)
    first = run(name, tmp_path / "parts", 7)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["step_00000005"]
    assert run(name, tmp_path / "parts", 15) == expected != first


def test_each_example_goes_on_from_the_checkpoint_of_the_one_before(tmp_path):
    expected = run("checkpoint_plain", tmp_path / "whole", 25)
    steps = 5
    for name in [*EXAMPLES, "checkpoint_plain"]:
        loss = run(name, tmp_path / "mixed", steps)
        steps += 5
    assert abs(loss - expected) < 1e-5 * expected


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_as_a_command(tmp_path, name):
    processes = 0 if name == "checkpoint_plain" else EXAMPLES[name]
    runs = [command(str(tmp_path), str(n), script=FOLDER / f"{name}.py", processes=processes) for n in (7, 10)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr + runs[1].stderr
    assert "goes on" not in runs[0].stderr and f"goes on from {tmp_path}/step_00000005" in runs[1].stderr
