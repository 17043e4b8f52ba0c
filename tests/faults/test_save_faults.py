"""Whatever happens in the middle of a save, the newest complete checkpoint is whole, and the next save works."""

import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from support import fork, fork_each, started_world
from support_saves import IO_ERROR, NO_SPACE, NOT_ALLOWED, at, check_folder, load_seed, own_part, shrink

from shardwright import checkpoint
from shardwright.checkpoint import CheckpointError, SaveOptions, manifest
from shardwright.checkpoint.storage import LocalStorage
from shardwright.conf.load import load_config
from shardwright.trainer.saves import Saves

OPTIONS = SaveOptions(timeout_seconds=1)
OLD, REPLACED, NEW = 1, 2, 3  # seeds: of step 1, of a step 2 that is saved over, and of what is saved


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    shrink(monkeypatch)


@pytest.fixture
def folder(tmp_path, written):
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Step 1, and a step 2 for a save to replace."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        for step, seed in ((1, OLD), (2, REPLACED)):
            checkpoint.save(checkpoint.step_folder(folder, step), {"part": own_part(seed)})
    return folder


def save(path, seed, mode="sync", options=OPTIONS):
    """Save a state, spoil it as soon as that is allowed, wait; return what was said."""
    part = own_part(seed)
    try:
        pending = checkpoint.save(path, {"part": part}, mode=mode, options=options)
        pending.wait_staged()
        for name in ("copied", "ids"):
            part.state[name].zero_()
        part.state["sharded"].tensor.zero_()
        pending.wait()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


EVERYWHERE = [  # moments that both processes see
    ("before", "gather", 1),  # nothing is said
    ("before", "gather", 2),  # nothing is agreed on
    ("before", "gather", 3),  # no plan
    ("after", "gather", 3),
    ("before", "make", 1),
    ("after", "make", 1),
    ("before", "write data", 1),
    ("after", "write data", 1),
    ("within", "write data", 2),
    ("after", "write data", 3),
    ("before", "fsync data", 1),
    ("after", "fsync data", 1),
    ("after", "fsync step", 1),
    ("before", "gather", 4),  # all is written, and nothing said of it
    ("after", "gather", 4),
]
AT_COMMIT = [  # those of rank 0 alone
    ("before", "sizes", 1),
    ("before", "write manifest", 1),
    ("within", "write manifest", 1),
    ("after", "fsync manifest", 1),
    ("before", "replace", 1),
    ("after", "replace", 1),
    ("after", "fsync step", 3),
    ("before", "broadcast", 3),
    ("after", "broadcast", 3),
]
VICTIMS = ["self", "other", "both"]
MOMENTS = [(moment, index % 2) for index, moment in enumerate(EVERYWHERE)] + [(moment, 0) for moment in AT_COMMIT]
KILLS = [
    pytest.param(mode, moment, actor, victim, marks=() if index % 3 == number and index % 2 == (mode == "sync") else pytest.mark.slow)
    for mode in ("sync", "overlap")
    for index, (moment, actor) in enumerate(MOMENTS)
    for number, victim in enumerate(VICTIMS)
]  # fmt: skip


def killed(path, mode, moment, actor, victim):
    """Save as one of two processes; one of them sends SIGKILL to itself, the other or both at a moment."""
    started_world()
    pids = [0, 0]
    dist.all_gather_object(pids, os.getpid())
    own = dist.get_rank()

    def kill():
        if victim != "self":
            os.kill(pids[1 - own], signal.SIGKILL)
        if victim != "other":
            os.kill(pids[own], signal.SIGKILL)

    with at(moment if own == actor else None, kill):
        return save(path, NEW, mode)


@pytest.mark.parametrize(("mode", "moment", "actor", "victim"), KILLS, ids=str)
def test_a_kill_leaves_whole_checkpoints(folder, mode, moment, actor, victim):
    over = MOMENTS.index((moment, actor)) % 4 < 2  # half of them replace a checkpoint
    if not over:
        shutil.rmtree(folder / "step_00000002")
    before = REPLACED if over else None
    answers = fork(2, killed, checkpoint.step_folder(folder, 2), mode, moment, actor, victim)
    if moment != ("after", "broadcast", 3):  # then the other one may be through
        assert -signal.SIGKILL in answers or any("did not arrive" in str(answer) for answer in answers)
    for rank, answer in enumerate(answers):
        if answer not in ("saved", -signal.SIGKILL):
            assert answer.startswith("CheckpointError: ") and f"rank {1 - rank}" in answer, answer
    found = check_folder(folder, {1: [OLD], 2: [before, NEW]})
    if "saved" in answers or moment == ("after", "replace", 1):
        assert found[2] == NEW


REFUSALS = {  # moment, what happens, on which rank (None: all), what is said
    "no file": (("before", "open data", 1), NOT_ALLOWED, 0, "[rank 0] {path}/00000-"),
    "no folder": (("before", "mkdir", 1), NOT_ALLOWED, None, "{path} cannot be created: Permission denied"),
    "full, first rank": (("before", "write data", 2), NO_SPACE, 0, "No space left on device; free space there"),
    "full, last rank": (("within", "write data", 3), NO_SPACE, 1, "No space left on device; free space there"),
    "bad block": (("before", "write data", 1), IO_ERROR, 1, "[rank 1] {path}/00001-"),
    "bad sync": (("before", "fsync data", 1), IO_ERROR, 0, "Input/output error; repair the disk"),
    "bad folder": (("before", "fsync step", 1), IO_ERROR, 1, "Input/output error; repair the disk"),
    "full at the manifest": (("within", "write manifest", 1), NO_SPACE, 0, "No space left on device; free space there"),
    "bad sync of the manifest": (("before", "fsync manifest", 1), IO_ERROR, 0, "Input/output error"),
    "no rename": (("before", "replace", 1), IO_ERROR, 0, "{path}/manifest.safetensors cannot be written"),
}


def refused(folder, moment, act, rank):
    """Save with a fault, then without; return what was said both times, and the files between."""
    started_world()
    path = checkpoint.step_folder(folder, 2)
    with at(moment if rank in (None, dist.get_rank()) else None, act):
        first = save(path, NEW, mode="overlap")
    dist.barrier()
    files = sorted(os.listdir(path)) if os.path.exists(path) else []
    found = load_seed(checkpoint.find_complete(folder)[0])
    return first, files, found, save(path, NEW)


def test_what_the_system_refuses_is_said_on_all_and_leaves_nothing(tmp_path, written):
    calls = {}
    for number, (name, (*fault, _)) in enumerate(REFUSALS.items()):
        folder = Path(shutil.copytree(written, tmp_path / str(number)))
        if number % 2:
            shutil.rmtree(folder / "step_00000002")
        calls[name] = (folder, *fault)
    results = fork_each(2, refused, calls)
    for number, (name, (folder, *_)) in enumerate(calls.items()):
        assert isinstance(results[name], list), f"{name}: {results[name]}"
        before = [] if number % 2 else sorted(os.listdir(written / "step_00000002"))
        for first, files, found, second in results[name]:
            words = REFUSALS[name][3].format(path=folder / "step_00000002")
            assert first.startswith("CheckpointError: ") and words in first, f"{name}: {first}"
            assert (files, found, second) == (before, OLD if number % 2 else REPLACED, "saved"), name
        check_folder(folder, {1: [OLD], 2: [NEW]})


def test_a_manifest_that_has_appeared_keeps_its_files_whatever_fails_then(tmp_path, written):
    faults = {"sync": ("before", "fsync step", 3), "old files": ("before", "unlink data", 1)}
    calls = {
        name: (Path(shutil.copytree(written, tmp_path / name)), moment, IO_ERROR, 0) for name, moment in faults.items()
    }
    results = fork_each(2, refused, calls)
    for first, _, found, second in results["sync"]:
        assert "Input/output error" in first and found == NEW and second == "saved"
    for first, _, found, second in results["old files"]:
        assert first == second == "saved" and found == NEW
    for folder, *_ in calls.values():
        check_folder(folder, {1: [OLD], 2: [NEW]})


@pytest.mark.parametrize(
    ("moment", "found"),
    [
        (("before", "replace", 1), REPLACED),
        (("after", "replace", 1), NEW),
        (("after", "fsync step", 3), NEW),
        (("before", "unlink data", 1), NEW),
    ],
    ids=str,
)
def test_a_writer_that_fails_leaves_a_whole_checkpoint_too(folder, moment, found):
    part, path = own_part(NEW), folder / "step_00000002"
    with at(moment, IO_ERROR), pytest.raises((CheckpointError, OSError)), checkpoint.create(path) as writer:
        for name in ("copied", "ids"):
            writer.add(f"part.{name}", part.state[name])
        writer.add("part.sharded", part.state["sharded"].tensor.view(part.state["sharded"].shape))
        writer.values["part.seed"] = NEW
    check_folder(folder, {1: [OLD], 2: [found]})


def on_full_disk(folder):
    started_world()
    path = checkpoint.step_folder(folder, 2)
    first = save(path, NEW)
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "ballast").unlink()
    dist.barrier()
    return first, save(path, NEW)


def test_a_disk_that_is_really_full(tmp_path, written):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"only root can mount a small disk: {mounted.stderr.decode()}")
    try:
        folder = Path(shutil.copytree(written, disk / "checkpoints"))
        shutil.rmtree(folder / "step_00000002")
        (folder / "ballast").write_bytes(bytes(100 * 2**10))
        for first, second in fork(2, on_full_disk, folder):
            assert "No space left on device; free space there" in first and second == "saved"
        check_folder(folder, {1: [OLD], 2: [NEW]})
    finally:
        subprocess.run(["umount", disk], check=True)


def short_writes(folder):
    started_world()
    inner = os.pwrite
    os.pwrite = lambda descriptor, data, position: inner(descriptor, data[: max(len(data) // 3, 1)], position)
    return save(checkpoint.step_folder(folder, 2), NEW)


def test_short_writes_are_continued(folder):
    assert fork(2, short_writes, folder) == ["saved"] * 2
    check_folder(folder, {1: [OLD], 2: [NEW]})


LATE = SaveOptions(timeout_seconds=0.6)


def late(folder, moment):
    """Rank 1 sleeps at a moment of a save; then both save again, which must work at once."""
    started_world()
    with at(moment if dist.get_rank() == 1 else None, lambda: time.sleep(1.2)):
        first = save(checkpoint.step_folder(folder, 2), NEW, mode="overlap", options=LATE)
    dist.barrier()
    return first, save(checkpoint.step_folder(folder, 3), NEW, options=LATE)


def test_a_late_process_is_named_and_the_next_save_works(tmp_path, written):
    moments = {"before it saves": ("before", "gather", 1), "while it writes": ("before", "write data", 2)}
    calls = {name: (Path(shutil.copytree(written, tmp_path / name)), moment) for name, moment in moments.items()}
    results = fork_each(2, late, calls)
    for name, (folder, _) in calls.items():
        (first, then), (first_of_late, then_of_late) = results[name]
        assert "rank 1 did not arrive within 0.6 seconds" in first, first
        assert "rank 0 cannot be reached" in first_of_late, first_of_late
        assert then == then_of_late == "saved", name
        check_folder(folder, {1: [OLD], 2: [REPLACED], 3: [NEW]})


def two_in_a_row(folder, unfinished):
    """A save that rank 1 is slow to write, and at once another one."""
    started_world()
    options = SaveOptions(unfinished=unfinished)
    with at(("before", "write data", 2) if dist.get_rank() == 1 else None, lambda: time.sleep(0.4)):
        first = checkpoint.save(
            checkpoint.step_folder(folder, 3), {"part": own_part(NEW)}, mode="overlap", options=options
        )
        time.sleep(0.1)  # rank 0 has written, and waits for the answer of rank 1
        second = checkpoint.save(
            checkpoint.step_folder(folder, 4), {"part": own_part(NEW + 1)}, mode="overlap", options=options
        )
    answers = []
    ended = first.done()
    for pending in (first, second):
        try:
            pending.wait()
            answers.append("saved")
        except CheckpointError as error:
            answers.append(f"{type(error).__name__}: {error}")
    return ended, *answers, sorted(os.listdir(folder / "step_00000003"))


def test_a_save_waits_for_the_one_before_or_drops_it(tmp_path, written):
    calls = {name: (Path(shutil.copytree(written, tmp_path / name)), name) for name in ("wait", "supersede")}
    results = fork_each(2, two_in_a_row, calls)
    for ended, first, second, _ in results["wait"]:
        assert (ended, first, second) == (True, "saved", "saved")
    for ended, first, second, files in results["supersede"]:
        assert ended and second == "saved" and files == []
        assert first.startswith("SupersededError: ") and "step_00000003 is not saved: a newer save began" in first
    check_folder(calls["wait"][0], {1: [OLD], 2: [REPLACED], 3: [NEW], 4: [NEW + 1]})
    check_folder(calls["supersede"][0], {1: [OLD], 2: [REPLACED], 4: [NEW + 1]})


def test_cleaning_spares_the_save_under_way(folder, monkeypatch):
    list_folders = LocalStorage.folders  # which comes first in cleaning: let the save have got to its folder
    monkeypatch.setattr(LocalStorage, "folders", lambda storage: time.sleep(0.1) or list_folders(storage))
    config = load_config([f"checkpoint.folder={folder}", "checkpoint.unfinished=supersede"]).checkpoint
    saves = Saves(config, {"part": own_part(NEW)}, None, 0)
    saves.begin(3)
    saves.pending.wait()  # complete, but the loop has not looked yet
    with at(("before", "write data", 1), lambda: time.sleep(0.3)):
        saves.begin(4)
        saves.close()
    check_folder(folder, {2: [REPLACED], 3: [NEW], 4: [NEW]})


def test_cleaning_does_not_keep_a_damaged_checkpoint_that_was_passed_over_instead(folder):
    (folder / "step_00000002" / manifest.NAME).write_bytes(b"damaged")
    shutil.copytree(folder / "step_00000002", folder / "step_00000009")
    config = load_config([f"checkpoint.folder={folder}", "checkpoint.keep=1"]).checkpoint
    saves = Saves(config, {"part": own_part(NEW)}, None, 0)
    for step in (3, 4):
        saves.begin(step)
        saves.close()
    assert load_seed(folder / "step_00000004") == NEW
    assert sorted(os.listdir(folder)) == ["step_00000004", "step_00000009"]


def one_of_two_runs(folder, num_saves):
    """Ranks 0 and 1 are a run, and 2 and 3 another one."""
    run, rank = divmod(int(os.environ["RANK"]), 2)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store{run}", 2), rank=rank, world_size=2)
    path = checkpoint.step_folder(folder / "checkpoints", 2)
    return [save(path, 10 * (run + 1) + number, mode="overlap") for number in range(num_saves)]


def test_two_runs_in_one_folder_leave_the_checkpoint_of_one(tmp_path, folder):
    assert fork(4, one_of_two_runs, tmp_path, 6) == [["saved"] * 6] * 4
    check_folder(folder, {1: [OLD], 2: [15, 25]})


def test_two_commits_at_once_leave_one_of_them(tmp_path):
    """One comes between the write of the other and its rename."""
    storage, data = LocalStorage(tmp_path), {name: name * 1000 for name in (b"first", b"second!")}
    with at(("before", "replace", 1), lambda: storage.commit(manifest.NAME, data[b"second!"])):
        storage.commit(manifest.NAME, data[b"first"])
    assert storage.read_all(manifest.NAME) == data[b"first"]
    assert storage.sizes().keys() == {manifest.NAME}


def test_changes_after_the_copy_do_not_show_however_slow_the_storage(folder):
    ready = threading.Event()
    with at(("before", "write data", 1), ready.wait):
        part = own_part(NEW)
        pending = checkpoint.save(checkpoint.step_folder(folder, 3), {"part": part}, mode="async")
        part.state["copied"].zero_()
        part.state["sharded"].tensor.zero_()
        ready.set()
        pending.wait()
    check_folder(folder, {1: [OLD], 2: [REPLACED], 3: [NEW]})
