"""A damaged checkpoint is refused by name, and the run goes on from the one before, saying so."""

import json
import logging
import shutil

import pytest
from support import curve, fork, small, train, train_and_listen

from shardwright import checkpoint
from shardwright.checkpoint import CheckpointError, DamagedError, manifest


@pytest.fixture(scope="module")
def run_folder(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    fork(2, train, small(corpus, folder, "train.num_steps=6", "checkpoint.every_steps=2"))
    return folder


def data_file(path):
    return sorted(path.glob("*.safetensors"))[-1]


def flip_bit(path):
    file = data_file(path)
    data = bytearray(file.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    file.write_bytes(data)
    return file


def truncate(path):
    file = data_file(path)
    file.write_bytes(file.read_bytes()[:-400])
    return file


def remove(path):
    file = data_file(path)
    file.unlink()
    return file


def cut_manifest(path):
    file = path / manifest.NAME
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def change_manifest(path):
    file = path / manifest.NAME
    file.write_text(file.read_text().replace('"optimizer.num_updates": 6', '"optimizer.num_updates": 7'))
    return file


def escape(path):
    file = path / manifest.NAME
    document = json.loads(file.read_text())
    name = next(iter(document["files"]))
    del document["xxh3"]
    body = json.loads(json.dumps(document).replace(name, "../" + name))
    file.write_text(json.dumps({**body, "xxh3": manifest._digest(body)}))
    return file


DAMAGES = [flip_bit, truncate, remove, cut_manifest, change_manifest, escape]


def refusal(overrides):
    try:
        train(overrides)
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage(corpus, tmp_path, run_folder, damage):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    newest = folder / "checkpoints" / "step_00000006"
    file = damage(newest)

    path = small(corpus, tmp_path / "other", "train.num_steps=8", f"checkpoint.resume={newest}")
    message = fork(1, refusal, path)[0]
    assert str(file) in message
    assert f"checkpoint.resume={folder}/checkpoints/step_00000004" in message

    automatic = small(corpus, folder, "train.num_steps=8", "checkpoint.every_steps=2")
    lines = fork(1, train_and_listen, automatic)[0]
    assert any("passed over" in line and str(file) in line for line in lines)
    assert any(line == f"resumed from {folder}/checkpoints/step_00000004" for line in lines)
    assert len(curve(folder)) == 8
    for kept in checkpoint.find_complete(folder / "checkpoints"):
        manifest.read(kept)


def test_all_damaged_is_refused(corpus, tmp_path, run_folder):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    for path in checkpoint.find_complete(folder / "checkpoints"):
        flip_bit(path)
    messages = fork(2, refusal, small(corpus, folder, "train.num_steps=8"))
    assert all("every checkpoint" in message and "damaged" in message for message in messages)


def test_every_flipped_bit_is_detected(tmp_path):
    import random

    import torch

    rng, part = random.Random(0), Values({"a": torch.randn(7, 5), "b": torch.arange(3)})
    checkpoint.save(tmp_path / "whole", {"part": part})
    file = data_file(tmp_path / "whole")
    data = file.read_bytes()
    first = min(box.start for t in manifest.read(tmp_path / "whole").tensors.values() for box in t.boxes)
    for _ in range(100):
        damaged = bytearray(data)
        damaged[rng.randrange(first, len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(DamagedError, match=file.name):
            checkpoint.load(tmp_path / "whole", {"part": part})


class Values:
    """A part that is its own state."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.state = state


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    import torch
    from safetensors import SafetensorError

    from shardwright.checkpoint import storage

    checkpoint.save(tmp_path / "c", {"part": Values({"a": torch.ones(4), "n": 1})})

    def no_space(tensors, path):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(storage, "save_file", no_space)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(tmp_path / "c", {"part": Values({"a": torch.zeros(4), "n": 2})})
    part = Values({"a": torch.zeros(4), "n": 0})
    checkpoint.load(tmp_path / "c", {"part": part})
    assert part.state["n"] == 1 and part.state["a"].tolist() == [1, 1, 1, 1]
    assert len(list((tmp_path / "c").iterdir())) == 2


def full_disk(overrides, failing):
    """ENOSPC on the last rank only, in the given saves; return the refusal, if any, and the errors logged."""
    import os

    from shardwright.checkpoint import storage

    calls, inner = [], storage.save_file

    def fail_second(tensors, path):
        calls.append(path)
        if len(calls) in failing and os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device")
        inner(tensors, path)

    storage.save_file = fail_second
    lines = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("shardwright.trainer").addHandler(handler)
    return refusal(overrides), lines


def test_a_full_disk_on_one_rank_is_reported_by_all_and_training_goes_on(corpus, tmp_path):
    overrides = small(corpus, tmp_path, "train.num_steps=6", "checkpoint.every_steps=2")
    for message, lines in fork(2, full_disk, overrides, (2,)):
        assert message is None
        assert len(lines) == 1 and "step 4 is not saved" in lines[0] and "[rank 1]" in lines[0]
    kept = [p.name for p in checkpoint.find_complete(tmp_path / "checkpoints")]
    assert kept == ["step_00000006", "step_00000002"]
    assert len(curve(tmp_path)) == 6


def test_a_full_disk_at_the_end_is_an_error(corpus, tmp_path):
    overrides = small(corpus, tmp_path, "train.num_steps=4", "checkpoint.every_steps=2")
    for message, _ in fork(2, full_disk, overrides, (2,)):
        assert "[rank 1]" in message and "No space left" in message
    assert [p.name for p in checkpoint.find_complete(tmp_path / "checkpoints")] == ["step_00000002"]


def test_another_format_is_neither_damaged_nor_passed_over(corpus, tmp_path, run_folder):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    file = folder / "checkpoints" / "step_00000006" / manifest.NAME
    document = json.loads(file.read_text())
    del document["xxh3"]
    document["format"] = 2
    file.write_text(json.dumps({**document, "xxh3": manifest._digest(document)}))
    message = fork(1, refusal, small(corpus, folder, "train.num_steps=8"))[0]
    assert str(file) in message and "not of format 1" in message


def elsewhere(overrides):
    """Rank 1 sees no checkpoints, as on a machine that does not share the folder."""
    import os

    from shardwright.trainer import build

    if os.environ["RANK"] == "1":
        build.find_candidates = lambda config: []
        from shardwright.checkpoint import api

        inner = api.manifests.read

        def missing(folder):
            return inner(folder / "nowhere")

        api.manifests.read = missing
    return refusal(overrides)


def test_a_folder_that_is_not_shared_is_an_error_on_all_not_a_hang(corpus, tmp_path, run_folder):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    messages = fork(2, elsewhere, small(corpus, folder, "train.num_steps=8"))
    assert all("no complete checkpoint" in message for message in messages)
