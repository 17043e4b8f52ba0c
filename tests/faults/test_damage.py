"""A damaged checkpoint is refused by name, and the run goes on from the one before, saying so."""

import errno
import json
import logging
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from support import curve, fork, fork_each, small, started_world, train, train_and_listen
from support_saves import NO_SPACE, Part, at, load_seed, own_part, shrink

from shardwright import checkpoint
from shardwright.checkpoint import CheckpointError, DamagedError, LoadOptions, manifest
from shardwright.checkpoint.storage import LocalStorage
from shardwright.trainer import build


@pytest.fixture(scope="module")
def run_folder(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    fork(2, train, small(corpus, folder, "train.num_steps=6", "checkpoint.every_steps=2"))
    return folder


def data_file(path):
    return sorted(file for file in path.glob("*.safetensors") if file.name != manifest.NAME)[-1]


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
    before, text = file.read_bytes(), b'"optimizer.num_updates'
    position = before.index(b" 6", before.index(text)) + 1
    file.write_bytes(before[:position] + b"7" + before[position + 1 :])
    return file


def escape(path):
    file = path / manifest.NAME
    document = manifest.decode(file.read_bytes(), str(file))
    names = {f"../{name}": size for name, size in document.files.items()}
    file.write_bytes(manifest.encode(replace(document, files=names)))
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
        assert list(checkpoint.open(kept).verify()) == []


def test_all_damaged_is_refused(corpus, tmp_path, run_folder):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    for path in checkpoint.find_complete(folder / "checkpoints"):
        flip_bit(Path(path))
    messages = fork(2, refusal, small(corpus, folder, "train.num_steps=8"))
    assert all("every checkpoint" in message and "damaged" in message for message in messages)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """The states 1 and 2, each of two files with many blocks."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        fork(2, save_both, folder)
    return folder


def save_both(folder):
    started_world()
    for seed in (1, 2):
        checkpoint.save(folder / str(seed), {"part": own_part(seed)})


@pytest.fixture
def shrunk(monkeypatch):
    shrink(monkeypatch)


@pytest.fixture
def one_and_two(tmp_path, two_checkpoints, shrunk):
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    return tmp_path / "copy" / "1", tmp_path / "copy" / "2"


def test_every_flipped_bit_is_detected(one_and_two):
    """Anywhere in any file: headers, padding, data and manifest."""
    path, _ = one_and_two
    rng, seen = random.Random(0), set()
    files = {file: file.read_bytes() for file in path.iterdir()}
    for _ in range(100):
        file = rng.choice(list(files))
        damaged, position = bytearray(files[file]), rng.randrange(len(files[file]))
        damaged[position] ^= 1 << rng.randrange(8)
        seen.add((file.name, position < 4096))
        file.write_bytes(damaged)
        if file.name == manifest.NAME:
            with pytest.raises(DamagedError, match=manifest.NAME):
                checkpoint.open(path)
        else:
            (told,) = checkpoint.open(path).verify()
            assert file.name in told
        if file.name == manifest.NAME or position >= 4096:
            with pytest.raises(DamagedError, match=file.name):
                load_seed(path)
        else:  # a header, which takes one block here, is not needed
            assert load_seed(path) == 1
        file.write_bytes(files[file])
    assert len(seen) == 5  # both parts of two files, and a manifest of less than 4096 bytes


def data_files(path):
    return sorted(file for file in path.iterdir() if file.name != manifest.NAME)


def exchange(one, other):
    one.rename(one.with_suffix(".away"))
    other.rename(one)
    one.with_suffix(".away").rename(other)


def swap_files(one, two):
    exchange(*data_files(one))


def swap_files_of_equal_size(one, two):
    first, second = data_files(one)
    size = min(first.stat().st_size, second.stat().st_size)
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1][:size] + contents[0][size:])
    second.write_bytes(contents[0][:size] + contents[1][size:])


def swap_between_checkpoints(one, two):
    exchange(data_files(one)[0], data_files(two)[0])


def swap_manifests(one, two):
    exchange(one / manifest.NAME, two / manifest.NAME)


def cut_by_a_byte(one, two):
    os.truncate(data_files(one)[1], data_files(one)[1].stat().st_size - 1)


def cut_to_nothing(one, two):
    os.truncate(data_files(one)[0], 0)


def lengthen(one, two):
    with open(data_files(one)[0], "ab") as file:
        file.write(b"\0")


def lose_a_file(one, two):
    data_files(one)[0].unlink()


def blank_a_block(one, two):
    with open(data_files(one)[1], "r+b") as file:
        file.seek(8192)
        file.write(bytes(4096))


@pytest.mark.parametrize(
    "harm",
    [
        swap_files,
        swap_files_of_equal_size,
        swap_between_checkpoints,
        swap_manifests,
        cut_by_a_byte,
        cut_to_nothing,
        lengthen,
        lose_a_file,
        blank_a_block,
    ],
)
def test_harm_to_files_is_detected_and_a_save_repairs_it(one_and_two, harm):
    harm(*one_and_two)
    with pytest.raises(DamagedError, match="/1/"):
        load_seed(one_and_two[0])
    for path in one_and_two:
        checkpoint.save(path, {"part": own_part(3)})
        assert load_seed(path) == 3


def test_a_lost_manifest_is_no_checkpoint(one_and_two):
    (one_and_two[0] / manifest.NAME).unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint") as caught:
        load_seed(one_and_two[0])
    assert not isinstance(caught.value, DamagedError)


def load_with_faults(path, fault, exchange):
    """Load on two processes; on rank 1, reads come short or fail."""
    rank, inner, calls = started_world().rank, os.preadv, []

    def read(descriptor, buffers, offset):
        calls.append(offset)
        if fault == "fails" and len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return inner(descriptor, [buffers[0][: max(len(buffers[0]) // 2, 1)]], offset)

    os.preadv = read if rank == 1 else inner
    try:
        return load_seed(path, options=LoadOptions(exchange=exchange))
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.preadv = inner


def test_short_reads_are_continued_and_failed_ones_told_to_all(one_and_two):
    calls = {
        (fault, exchange): (one_and_two[0], fault, exchange) for fault in ("short", "fails") for exchange in (0, 1)
    }
    for (fault, exchange), answers in fork_each(2, load_with_faults, calls).items():
        if fault == "short":
            assert answers == [1, 1]
        else:
            assert isinstance(answers, list), answers
            assert all("DamagedError" in a and "Input/output error" in a for a in answers), (exchange, answers)


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path):
    checkpoint.save(tmp_path / "c", {"part": Part(a=torch.ones(4), n=1)})
    with at(("within", "write data", 1), NO_SPACE), pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(tmp_path / "c", {"part": Part(a=torch.zeros(4), n=2)})
    part = Part(a=torch.zeros(4), n=0)
    checkpoint.load(tmp_path / "c", {"part": part})
    assert part.state["n"] == 1 and part.state["a"].tolist() == [1, 1, 1, 1]
    assert len(list((tmp_path / "c").iterdir())) == 2


def full_disk(overrides, failing):
    """ENOSPC on the last rank only, in the given saves; return the refusal, if any, and the errors logged."""
    calls, inner = [], LocalStorage.write

    def write(storage, name, size, chunks):
        calls.append(name)
        if len(calls) in failing and os.environ["RANK"] == "1":
            with at(("before", "write data", 1), NO_SPACE):
                return inner(storage, name, size, chunks)
        return inner(storage, name, size, chunks)

    LocalStorage.write = write
    lines = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("shardwright.trainer").addHandler(handler)
    return refusal(overrides), lines


def test_a_full_disk_on_one_rank_is_reported_by_all_and_training_goes_on(corpus, tmp_path):
    overrides = small(corpus, tmp_path, "train.num_steps=6", "checkpoint.every_steps=2")
    for message, lines in fork(2, full_disk, overrides, (2,)):
        assert message is None
        assert len(lines) == 1 and "training goes on" in lines[0]
        assert "step_00000004/00001-" in lines[0] and "[rank 1]" in lines[0] and "No space left" in lines[0]
    kept = [os.path.basename(path) for path in checkpoint.find_complete(tmp_path / "checkpoints")]
    assert kept == ["step_00000006", "step_00000002"]
    assert len(curve(tmp_path)) == 6


def test_a_full_disk_at_the_end_is_an_error(corpus, tmp_path):
    overrides = small(corpus, tmp_path, "train.num_steps=4", "checkpoint.every_steps=2")
    for message, _ in fork(2, full_disk, overrides, (2,)):
        assert "[rank 1]" in message and "No space left" in message
    kept = [os.path.basename(path) for path in checkpoint.find_complete(tmp_path / "checkpoints")]
    assert kept == ["step_00000002"]


def test_another_format_is_neither_damaged_nor_passed_over(corpus, tmp_path, run_folder):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    file = folder / "checkpoints" / "step_00000006" / manifest.NAME
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["format"] = "3"
    head = json.dumps(header).encode()
    body = len(head).to_bytes(8, "little") + head + data[8 + size : -8]
    file.write_bytes(body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little"))
    message = fork(1, refusal, small(corpus, folder, "train.num_steps=8"))[0]
    assert str(file) in message and "of format 3, this version reads 2" in message


def elsewhere(overrides):
    """Rank 1 sees no checkpoints, as on a machine that does not share the folder."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("shardwright.trainer").addHandler(handler)
    if os.environ["RANK"] == "1":
        build.find_candidates = lambda config: []
        read = LocalStorage.read
        LocalStorage.read = lambda storage, name, *where: read(storage.child("nowhere"), name, *where)
    return refusal(overrides), lines


def test_a_folder_that_is_not_shared_is_an_error_on_all_not_a_hang(corpus, tmp_path, run_folder):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    for message, lines in fork(2, elsewhere, small(corpus, folder, "train.num_steps=8")):
        assert "every checkpoint" in message and "damaged" in message
        assert any("nowhere" in line and "is missing" in line for line in lines)
