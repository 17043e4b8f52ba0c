"""A resumed run is the same run: bit for bit where nothing else changed, and at any other number of processes."""

import os
import random
import signal

import pytest
import torch.distributed as dist
from support import assert_close, curve, fork, small, train, train_and_listen

from shardwright import checkpoint
from shardwright.checkpoint import manifest
from shardwright.checkpoint.storage import LocalStorage

KILLED = -signal.SIGKILL


def killed_at_step(overrides, kill_step):
    def kill(run, step, batches):
        if step == kill_step:
            os.kill(os.getpid(), signal.SIGKILL)

    train(overrides, kill)


def killed_in_save(overrides, save, moment):
    """Die in the given save: with half of the data on disk, or just before the manifest gets its name."""
    calls = {"saves": 0}
    write, rename = LocalStorage.write, os.replace

    def write_half(storage, name, size, chunks):
        calls["saves"] += name.endswith(".safetensors")
        write(storage, name, size, chunks)
        if calls["saves"] == save and moment == "data":
            os.truncate(os.path.join(storage.path, name), size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def die_before(source, target):
        if calls["saves"] == save and moment == "manifest" and str(target).endswith(manifest.NAME):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    LocalStorage.write, os.replace = write_half, die_before
    train(overrides)


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    fork(1, train, small(corpus, folder, "train.num_steps=14"))
    return curve(folder)


RANDOM_STEPS = random.Random(2026).sample(range(3, 14), 3)


@pytest.mark.parametrize(
    ("how", "args"),
    [
        (killed_at_step, (2,)),  # before the first checkpoint
        *((killed_at_step, (step,)) for step in RANDOM_STEPS),
        (killed_in_save, (2, "data")),
        (killed_in_save, (3, "manifest")),
    ],
    ids=str,
)
def test_killed_and_started_again_is_bit_identical(corpus, tmp_path, uninterrupted, how, args):
    overrides = small(corpus, tmp_path, "train.num_steps=14", "checkpoint.every_steps=3")
    assert fork(1, how, overrides, *args) == [KILLED]
    assert fork(1, train, overrides) == [True]
    assert curve(tmp_path) == uninterrupted


@pytest.fixture(scope="module")
def uninterrupted_pair(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    fork(2, train, small(corpus, folder, "train.num_steps=6", "checkpoint.every_steps=2"))
    return curve(folder)


@pytest.mark.parametrize("moment", ["data", "manifest"])
def test_two_processes_killed_in_a_save_go_on_bit_identical(corpus, tmp_path, uninterrupted_pair, moment):
    overrides = small(corpus, tmp_path, "train.num_steps=6", "checkpoint.every_steps=2")
    assert KILLED in fork(2, both_killed_in_save, overrides, 2, moment)
    fork(2, train, overrides)
    assert curve(tmp_path) == uninterrupted_pair


def both_killed_in_save(overrides, save, moment):
    """As torchrun does: when one process is gone, the other goes too."""
    try:
        killed_in_save(overrides, save, moment)
    except Exception:
        os.kill(os.getpid(), signal.SIGKILL)


def counted(overrides):
    """Train, and return the ids of every sequence that this process trained on, by step."""
    seen = {}

    def count(run, step, batches):
        seen[step] = sorted(row.tobytes() for batch in batches for row in batch.ids.numpy())

    train(overrides, count)
    return seen


def merge(results):
    return {step: sorted(row for result in results for row in result[step]) for step in results[0]}


@pytest.mark.parametrize("processes", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 3])
def test_saved_on_four_resumed_on_fewer(corpus, tmp_path, uninterrupted, processes):
    overrides = small(corpus, tmp_path, "checkpoint.every_steps=5")
    whole = small(corpus, tmp_path / "whole", "train.num_steps=14")
    expected = merge(fork(1, counted, whole))
    first = merge(fork(4, counted, [*overrides, "train.num_steps=10", "schedule.decay_fraction=0"]))
    rest = merge(fork(processes, counted, [*overrides, "train.num_steps=14", "schedule.decay_fraction=0"]))
    assert list(rest) == [10, 11, 12, 13]
    for step, sequences in {**first, **rest}.items():
        assert sequences == expected[step], f"step {step} trained on other sequences"
    trained = [row for step in sorted(expected) for row in expected[step]]
    assert len(trained) == len(set(trained)) == 14 * 12

    steady = small(corpus, tmp_path / "steady", "train.num_steps=14", "schedule.decay_fraction=0")
    fork(1, train, steady)
    assert_close(curve(tmp_path), curve(tmp_path / "steady"))


def test_another_batch_size_after_a_resume_goes_on_in_the_same_order(corpus, tmp_path):
    overrides = small(corpus, tmp_path, "checkpoint.every_steps=2")
    first = merge(fork(2, counted, [*overrides, "train.num_steps=2"]))
    rest = merge(fork(2, counted, [*overrides, "train.num_steps=4", "train.global_batch_sequences=24"]))
    expected = merge(fork(1, counted, small(corpus, tmp_path / "whole", "train.num_steps=6")))
    in_order = [expected[step] for step in range(6)]
    assert [first[0], first[1]] == in_order[:2]
    assert [rest[2], rest[3]] == [sorted(in_order[2] + in_order[3]), sorted(in_order[4] + in_order[5])]


def test_a_run_that_began_from_a_path_goes_on_from_its_own_checkpoints(corpus, tmp_path):
    """The same command, killed and typed again, does not begin anew."""
    fork(1, train, small(corpus, tmp_path / "a", "train.num_steps=4", "checkpoint.every_steps=2"))
    start = f"checkpoint.resume={tmp_path}/a/checkpoints/step_00000002"
    branch = small(
        corpus, tmp_path / "b", "train.num_steps=9", "checkpoint.every_steps=2", "checkpoint.mode=sync", start
    )
    assert fork(1, killed_at_step, branch, 7) == [KILLED]
    lines = fork(1, train_and_listen, branch)[0]
    assert f"resumed from {tmp_path}/b/checkpoints/step_00000006" in lines
    whole = small(corpus, tmp_path / "whole", "train.num_steps=9")
    fork(1, train, whole)
    assert curve(tmp_path / "b") == curve(tmp_path / "whole", first=3)


def test_a_resumed_run_says_what_has_changed(corpus, tmp_path):
    fork(1, train, small(corpus, tmp_path, "train.num_steps=2"))
    lines = fork(1, train_and_listen, small(corpus, tmp_path, "train.num_steps=3", "optim.peak_lr=2e-3"))[0]
    assert "changed since the checkpoint: train.num_steps 2 -> 3, optim.peak_lr 0.001 -> 0.002" in lines


def stop_one(overrides, number):
    """A signal to one process of the group at step 3."""

    def terminate(run, step, batches):
        if step == 3 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), number)

    return train(overrides, terminate)


@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)], ids=str)
def test_a_signal_saves_on_all_and_goes_on_bit_identical(corpus, tmp_path, processes, number):
    overrides = small(corpus, tmp_path, "train.num_steps=8", "checkpoint.every_steps=null")
    assert fork(processes, stop_one, overrides, number) == [False] * processes
    (stopped,) = checkpoint.find_complete(tmp_path / "checkpoints")
    assert os.path.basename(stopped) in ("step_00000004", "step_00000005", "step_00000006")
    assert fork(processes, train, overrides) == [True] * processes
    whole = small(corpus, tmp_path / "whole", "train.num_steps=8")
    fork(processes, train, whole)
    assert curve(tmp_path) == curve(tmp_path / "whole")


def test_old_checkpoints_are_removed(corpus, tmp_path):
    overrides = small(corpus, tmp_path, "train.num_steps=8", "checkpoint.every_steps=2", "checkpoint.keep=2")
    fork(2, train, overrides)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_00000006", "step_00000008"]
