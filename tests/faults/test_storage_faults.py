"""Disks that are full, broken or cut off from power; an S3 server that dies, hangs, comes back or cuts the line."""

import errno
import itertools
import logging
import mmap
import os
import random
import re
import resource
import socket
import subprocess
import threading
import time
from contextlib import suppress

import pytest

from shardwright.checkpoint import storage as storages
from shardwright.checkpoint.errors import CheckpointError, DamagedError
from shardwright.checkpoint.storage import MAX_ATTEMPTS, open_storage

pytest_plugins = ["support_s3"]
MIB = 2**20


@pytest.fixture
def storage(tmp_path):
    storage = open_storage(tmp_path / "step_1")
    storage.make()
    return storage


def chunks(size, chunk_bytes=MIB):
    """Yield page-aligned chunks of `size` zeros in all."""
    buffer = memoryview(mmap.mmap(-1, chunk_bytes))
    for start in range(0, size, chunk_bytes):
        yield buffer[: size - start]


def read(storage, name, start, size):
    into = memoryview(bytearray(size))
    storage.read(name, start, into)
    return bytes(into)


def failing(error, after=0):
    """A system call that fails after some successes, which `monkeypatch` can put in place of the real one."""

    def put(monkeypatch, name):
        calls, inner = itertools.count(), getattr(os, name)

        def call(*args):
            if next(calls) >= after:
                raise OSError(error, os.strerror(error))
            return inner(*args)

        monkeypatch.setattr(os, name, call)

    return put


# ---------------------------------------------------------------------------------------------------------- local disks


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call, after", [("open", 0), ("pwrite", 0), ("pwrite", 2), ("fsync", 0), ("fsync", 1)])
def test_a_disk_that_fails_leaves_no_file(storage, monkeypatch, error, call, after):
    storage.commit("m", b"before")
    with monkeypatch.context() as patch:
        failing(error, after)(patch, call)
        with pytest.raises(
            CheckpointError, match=f"{storage.path}/a cannot be written: {os.strerror(error)}; "
        ) as told:
            storage.write("a", 4 * MIB, chunks(4 * MIB))
    assert ("free space" in str(told.value)) == (error != errno.EIO)
    assert storage.sizes() == {"m": 6}


@pytest.mark.parametrize("call, after", [("open", 0), ("pwrite", 0), ("fsync", 0), ("replace", 0)])
def test_a_disk_that_fails_keeps_what_was_committed(storage, monkeypatch, call, after):
    storage.commit("m", b"before")
    with monkeypatch.context() as patch:
        failing(errno.ENOSPC, after)(patch, call)
        with pytest.raises(CheckpointError, match="No space left on device; free space there"):
            storage.commit("m", b"after")
    assert storage.sizes() == {"m": 6} and storage.read_all("m") == b"before"


def test_a_full_device(storage, tmp_path):
    (tmp_path / "step_1" / "a").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="a cannot be written: No space left on device; free space there"):
        storage.write("a", MIB, chunks(MIB))
    assert list((tmp_path / "step_1").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if mount.returncode != 0:
        pytest.skip("only the superuser mounts")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk):
    storage = open_storage(small_disk)
    storage.write("first", MIB, chunks(MIB))
    storage.commit("m", b"whole")
    with pytest.raises(CheckpointError, match="second cannot be written: No space left on device; free space there"):
        storage.write("second", 8 * MIB, chunks(8 * MIB))
    assert storage.sizes() == {"first": MIB, "m": 5}
    storage.write("second", 2 * MIB, chunks(2 * MIB))


def test_a_limit_on_the_size_of_files(storage):
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB + 12345, MIB + 12345))
        try:
            storage.write("a", 3 * MIB, chunks(3 * MIB))
        except CheckpointError as error:
            os._exit(0 if "File too large" in str(error) and storage.sizes() == {} else 1)
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("most_bytes", [4096, 5000, 65536])
def test_short_writes(storage, monkeypatch, most_bytes):
    inner, data = os.pwrite, random.Random(0).randbytes(MIB + 17)
    buffer = memoryview(mmap.mmap(-1, 2 * MIB))[: len(data)]
    buffer[:] = data
    monkeypatch.setattr(os, "pwrite", lambda file, data, start: inner(file, data[:most_bytes], start))
    storage.write("a", len(data), iter([buffer]))
    assert storage.read_all("a") == data


@pytest.mark.parametrize("call", ["fcntl", "pwrite"])
def test_a_file_system_without_direct_writes(storage, monkeypatch, call):
    import fcntl

    get_or_set, write = fcntl.fcntl, os.pwrite

    def refuse_flag(file, command, flags=0):
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return get_or_set(file, command, flags)

    def refuse_write(file, data, start):
        if get_or_set(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(file, data, start)

    monkeypatch.setattr(*((fcntl, "fcntl", refuse_flag) if call == "fcntl" else (os, "pwrite", refuse_write)))
    data = random.Random(0).randbytes(MIB + 17)
    storage.write("a", len(data), iter([memoryview(data)]))
    assert storage.read_all("a") == data


def test_a_disk_that_cannot_be_read(storage, tmp_path, monkeypatch):
    (tmp_path / "step_1" / "a").symlink_to("/proc/self/mem")  # nothing is mapped at its begin: EIO
    for attempt in (lambda: read(storage, "a", 0, 8), lambda: storage.read_all("a")):
        with pytest.raises(DamagedError, match=r"step_1/a cannot be read: .*Input/output error"):
            attempt()
    storage.write("b", 8, chunks(8))
    failing(errno.EIO)(monkeypatch, "preadv")
    with pytest.raises(DamagedError, match=r"step_1/b cannot be read: .*Input/output error"):
        read(storage, "b", 0, 8)


def test_short_reads(storage, monkeypatch):
    data, inner = random.Random(0).randbytes(10000), os.preadv
    storage.commit("a", data)
    monkeypatch.setattr(os, "preadv", lambda file, buffers, start: inner(file, [buffers[0][:4096]], start))
    assert read(storage, "a", 3, 9000) == data[3:9003]


def test_a_commit_that_dies_at_any_step_leaves_the_old_or_the_new(storage):
    """A process ends right before, or in the middle of, each of its system calls in turn."""
    old, new, seen = b"old" * 100000, b"new" * 200000, []
    for deadly in itertools.count():
        storage.commit("m", old)
        pid = os.fork()
        if pid == 0:
            try:
                die_at(deadly)
                storage.commit("m", new)
                os._exit(0)
            finally:
                os._exit(8)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, DEAD)
        seen.append("new" if storage.read_all("m") == new else "old" if storage.read_all("m") == old else "neither")
        if status == 0:
            break
    num_old = seen.count("old")
    assert seen == ["old"] * num_old + ["new"] * (len(seen) - num_old)
    assert num_old >= 4 and len(seen) - num_old >= 3
    sizes = storage.sizes()
    assert sizes.pop("m") == len(new) and all(name.endswith(".part") for name in sizes)


DEAD = 7


def die_at(deadly):
    """End this process at its system call of this number, in the middle of it if it writes."""
    calls = itertools.count()

    def deadly_call(name, inner):
        def call(*args, **options):
            if next(calls) != deadly:
                return inner(*args, **options)
            if name == "pwrite":
                with suppress(OSError):
                    inner(args[0], args[1][: len(args[1]) // 2], args[2])
            os._exit(DEAD)

        return call

    for name in ("open", "pwrite", "fsync", "replace"):
        setattr(os, name, deadly_call(name, getattr(os, name)))


def test_what_a_commit_needs_is_on_the_disk_before_it_shows(storage, monkeypatch):
    """The order of system calls: contents before names, a file before the folder that names it."""
    steps, names, inner_open = [], {}, os.open

    def open_(path, *args, **options):
        names[descriptor := inner_open(path, *args, **options)] = re.sub(
            r"\.\w+\.part", "'s copy", os.path.basename(path)
        )
        return descriptor

    monkeypatch.setattr(os, "open", open_)
    write, sync = os.pwrite, os.fsync
    monkeypatch.setattr(os, "pwrite", lambda file, *args: steps.append(("pwrite", names[file])) or write(file, *args))
    monkeypatch.setattr(os, "fsync", lambda file: steps.append(("fsync", names[file])) or sync(file))
    inner = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: steps.append(("replace", None)) or inner(*names))
    storage.commit("m", b"whole")
    parent = os.path.basename(os.path.dirname(storage.path))
    assert [step for step, _ in itertools.groupby(steps)] == [
        ("pwrite", "m's copy"),
        ("fsync", "m's copy"),
        ("fsync", "step_1"),
        ("replace", None),
        ("fsync", "step_1"),
        ("fsync", parent),
    ]


# ------------------------------------------------------------------------------------------------------- object stores


@pytest.fixture
def log(monkeypatch, caplog):
    """The repeated attempts of a test, which come quickly here."""
    monkeypatch.setattr(storages, "FIRST_PAUSE_SECONDS", 0.001)
    caplog.set_level(logging.WARNING, storages.__name__)
    return caplog


OPERATIONS = {
    "make": (lambda s: s.make(), "run cannot be created"),
    "sizes": (lambda s: s.sizes(), "run cannot be listed"),
    "folders": (lambda s: s.folders(), "run cannot be listed"),
    "read": (lambda s: read(s, "a", 0, 1), "run/a cannot be read"),
    "read_all": (lambda s: s.read_all("a"), "run/a cannot be read"),
    "write": (lambda s: s.write("b", MIB, chunks(MIB)), "run/b cannot be written"),
    "commit": (lambda s: s.commit("b", b"1"), "run/b cannot be written"),
    "remove": (lambda s: s.remove(["a"]), "run cannot be emptied"),
    "remove_folder": (lambda s: s.remove_folder(), "run cannot be deleted"),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_dead_server_is_an_error_after_some_attempts(s3, log, name):
    storage = open_storage(f"{s3.url}/run")
    storage.commit("a", b"1")
    s3.server.stop()
    operation, told = OPERATIONS[name]
    with pytest.raises(
        CheckpointError, match=f"{told}: .*at each of {MAX_ATTEMPTS} attempts; check the network"
    ) as error:
        operation(storage)
    assert not isinstance(error.value, DamagedError) and error.value.__cause__ is not None
    assert len(log.messages) == MAX_ATTEMPTS - 1
    s3.server.start()
    assert storage.sizes() == {"a": 1}


def test_a_server_that_comes_back(s3, log, monkeypatch):
    monkeypatch.setattr(storages, "FIRST_PAUSE_SECONDS", 0.2)
    storage = open_storage(f"{s3.url}/run")
    storage.commit("a", b"1")
    s3.server.stop()
    later = threading.Timer(0.3, s3.server.start)
    later.start()
    storage.write("b", MIB, chunks(MIB))
    later.join()
    assert 1 <= len(log.messages) < MAX_ATTEMPTS and "run/b is not written yet" in log.messages[0]
    assert storage.read_all("a") == b"1" and storage.read_all("b") == bytes(MIB)


@pytest.mark.parametrize("upward", [True, False], ids=["upload", "download"])
def test_a_line_that_is_cut_in_the_middle(s3, log, upward):
    storage = open_storage(f"{s3.url}/run")
    storage.write("old", 4 * MIB, chunks(4 * MIB))
    with s3.reach_by_line_cut(after_bytes=MIB, times=2, upward=upward) as line:
        if upward:
            storage.write("new", 4 * MIB, chunks(4 * MIB))
        else:
            assert read(storage, "old", 17, 3 * MIB) == bytes(3 * MIB)
    assert line.num_cuts == 2 and 1 <= len(log.messages) <= 2  # aiohttp tries once more by itself at times
    assert storage.sizes() == {"old": 4 * MIB, **({"new": 4 * MIB} if upward else {})}


def test_a_line_that_is_always_cut_leaves_no_file(s3, log):
    storage = open_storage(f"{s3.url}/run")
    with s3.reach_by_line_cut(after_bytes=MIB, times=100, upward=True) as line:
        with pytest.raises(CheckpointError, match=rf"run/new cannot be written: .*at each of {MAX_ATTEMPTS} attempts"):
            storage.write("new", 4 * MIB, chunks(4 * MIB))
        assert MAX_ATTEMPTS <= line.num_cuts <= 2 * MAX_ATTEMPTS
    assert storage.sizes() == {}


def test_an_upload_whose_answer_is_lost_leaves_no_file(s3, log):
    storage = open_storage(f"{s3.url}/run")
    refused = pytest.raises(CheckpointError, match=rf"run/new cannot be written: .*at each of {MAX_ATTEMPTS} attempts")
    with s3.reach_by_line_cut(after_bytes=100, times=100, upward=False), refused:  # "100 Continue" passes
        storage.write("new", MIB, chunks(MIB))
    assert storage.sizes() == {}


def test_a_server_that_hangs(s3, log):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        s3.reach(silent.getsockname()[1], config_kwargs={"read_timeout": 0.1, "connect_timeout": 0.1})
        with pytest.raises(CheckpointError, match=f"Timeout.*at each of {MAX_ATTEMPTS} attempts"):
            open_storage(f"{s3.url}/run").sizes()


def test_a_server_that_takes_no_more_bytes(s3, log, monkeypatch):
    monkeypatch.setattr(storages, "UPLOAD_SECONDS", 0.5)
    monkeypatch.setattr(storages, "MAX_ATTEMPTS", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        s3.reach(silent.getsockname()[1])
        with pytest.raises(CheckpointError, match=r"run/new cannot be written: FSTimeoutError.* at each of 2 attempts"):
            open_storage(f"{s3.url}/run").commit("new", bytes(16 * MIB))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "make"])  # writing may be allowed nevertheless
def test_denied_access_is_not_tried_again(s3, log, name):
    s3.reach(s3.server.port, key="an-access-key", secret="a-wrong-key")
    operation, told = OPERATIONS[name]
    with pytest.raises(CheckpointError, match=f"{told}: PermissionError: .*check the address, the credentials"):
        operation(open_storage(f"{s3.url}/run"))
    assert log.messages == []


def test_what_is_not_there_is_not_tried_again(s3, log):
    storage = open_storage(f"{s3.url}/run")
    for name in ("read", "read_all"):
        with pytest.raises(DamagedError, match=f"{s3.url}/run/a is missing"):
            OPERATIONS[name][0](storage)
    for name in ("make", "sizes", "folders", "remove", "remove_folder"):
        OPERATIONS[name][0](storage)
    assert log.messages == []


def test_pauses_grow_and_differ(monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    def fail(*args, **options):
        raise ConnectionResetError("reset")

    pauses = []
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", fail)
    monkeypatch.setattr(time, "sleep", pauses.append)
    state = random.getstate()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="ConnectionResetError: reset at each of"):
            open_storage("memory://x").commit("m", b"1")
    first, second = pauses[: MAX_ATTEMPTS - 1], pauses[MAX_ATTEMPTS - 1 :]
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        assert a != b
        assert all(0.25 * 2**number <= pause <= 0.75 * 2**number for pause in (a, b))
    assert random.getstate() == state


def test_files_that_do_not_go_are_an_error(log, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    storage = open_storage("memory://stays")
    storage.commit("m", b"1")
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "rm", lambda *args, **options: None)
        with pytest.raises(CheckpointError, match="stays cannot be emptied: OSError: m would not go at each of"):
            storage.remove(["m"])
    storage.remove(["m"])
    assert storage.sizes() == {}
