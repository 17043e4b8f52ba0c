"""Every kind of storage keeps the same promises: a local folder, fsspec's memory, and a real S3 server."""

import fcntl
import gc
import itertools
import mmap
import os
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from shardwright.checkpoint import disk
from shardwright.checkpoint.errors import CheckpointError, DamagedError
from shardwright.checkpoint.storage import CHUNK_BYTES, LocalStorage, RemoteStorage, open_storage

pytest_plugins = ["support_s3"]
MIB = 2**20
numbers = itertools.count()


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request, tmp_path):
    if request.param == "s3":
        return open_storage(f"{request.getfixturevalue('s3').url}/runs/step_1")
    return open_storage(
        tmp_path / "runs" / "step_1" if request.param == "local" else f"memory://{next(numbers)}/step_1"
    )


def some_bytes(size, seed=0):
    return random.Random(seed).randbytes(size)


def aligned(data):
    buffer = memoryview(mmap.mmap(-1, max(len(data), 1)))[: len(data)]
    buffer[:] = data
    return buffer


def cut(data, size):
    """Yield the chunks of some bytes, all in the same buffer."""
    buffer = memoryview(mmap.mmap(-1, size))
    for start in range(0, len(data), size):
        part = data[start : start + size]
        buffer[: len(part)] = part
        yield buffer[: len(part)]


def read(storage, name, start, size):
    into = memoryview(bytearray(size))
    storage.read(name, start, into)
    return bytes(into)


def test_of_nothing(storage):
    assert storage.sizes() == {} and storage.folders() == []
    storage.remove(["a", "b"])
    storage.remove([])
    storage.remove_folder()
    for attempt in (lambda: read(storage, "a", 0, 1), lambda: storage.read_all("a")):
        with pytest.raises(DamagedError, match=f"{storage.path}/a is missing"):
            attempt()


def test_what_is_written_is_read(storage):
    storage.make()
    storage.make()
    sizes = [0, 1, 4095, 4096, 4097, MIB, 3 * MIB, 3 * MIB + 4096, 3 * MIB + 17]
    for size in sizes:
        data = some_bytes(size, size)
        storage.write(f"f{size}", size, cut(data, MIB))
        assert storage.read_all(f"f{size}") == data
        assert read(storage, f"f{size}", 0, size) == data
    assert storage.sizes() == {f"f{size}": size for size in sizes}
    for start, size in [(0, 0), (5, 11), (MIB - 1, 2), (3 * MIB, 17), (3 * MIB + 16, 1), (4097, 2 * MIB)]:
        assert read(storage, f"f{sizes[-1]}", start, size) == data[start : start + size]


def test_a_short_file_is_damaged(storage):
    storage.make()
    storage.write("a", 10, iter([aligned(b"0123456789")]))
    for start, size in [(0, 11), (9, 2), (10, 1), (11, 1), (MIB, MIB)]:
        with pytest.raises(DamagedError, match=f"{storage.path}/a is damaged"):
            read(storage, "a", start, size)


def test_write_and_commit_replace(storage):
    storage.make()
    for data in (b"first, longer", b"second"):
        storage.write("a", len(data), iter([aligned(data)]))
        storage.commit("m", data)
        assert storage.read_all("a") == storage.read_all("m") == data
    assert storage.sizes() == {"a": 6, "m": 6}
    storage.commit("m", b"")
    assert storage.read_all("m") == b""


def test_folders(storage):
    runs = open_storage(storage.path.rpartition("/")[0])
    for name in ("step_1", "step_10"):
        child = runs.child(name)
        assert child.path == f"{runs.path}/{name}" and type(child) is type(storage)
        child.make()
        child.commit("m", name.encode())
        child.child("deeper").make()
        child.child("deeper").commit("d", b"d")
    runs.commit("file", b"")
    assert sorted(runs.folders()) == ["step_1", "step_10"] and runs.sizes() == {"file": 0}
    assert storage.sizes() == {"m": 6} and storage.folders() == ["deeper"]
    storage.remove_folder()
    assert storage.sizes() == {} and runs.folders() == ["step_10"]
    assert runs.child("step_10").read_all("m") == b"step_10"
    assert runs.child("step_10").child("deeper").sizes() == {"d": 1}


def test_remove(storage):
    storage.make()
    for name in "abc":
        storage.commit(name, b"x")
    storage.remove(name for name in ["a", "c", "none"])
    assert storage.sizes() == {"b": 1}


def test_what_the_chunks_raise_comes_through_and_leaves_nothing(storage):
    def chunks():
        yield aligned(bytes(MIB))
        raise OSError("the tensor is gone")

    storage.make()
    with pytest.raises(OSError, match=r"^the tensor is gone$"):
        storage.write("a", 2 * MIB, chunks())
    assert storage.sizes() == {}


def test_many_threads(storage):
    storage.make()
    data = some_bytes(4 * MIB)

    def write(index):
        storage.write(f"f{index}", len(data), cut(data, MIB))
        return all(
            read(storage, f"f{index}", start, MIB) == data[start : start + MIB] for start in range(0, 4 * MIB, MIB)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write, range(8)))
    assert len(storage.sizes()) == 8


def test_many_commit_at_once(storage):
    storage.make()
    contents = [bytes([index]) * 100000 for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda data: storage.commit("m", data), contents))
    assert storage.read_all("m") in contents
    assert storage.sizes() == {"m": 100000}


def test_a_forked_process_uses_it_and_so_does_its_parent(storage):
    storage.make()
    storage.commit("parent", b"1")
    pid = os.fork()
    if pid == 0:
        try:
            storage.commit("child", storage.read_all("parent") + b"2")
            os._exit(storage.sizes() != {"parent": 1, "child": 2})
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    expected = {"parent": 1} if "memory" in storage.path else {"parent": 1, "child": 2}  # memory is not shared
    assert storage.sizes() == expected


def test_a_forked_process_leaves_the_connections_of_its_parent_alone(s3, monkeypatch):
    import s3fs

    closed = []
    monkeypatch.setattr(s3fs.S3FileSystem, "close_session", staticmethod(lambda *args: closed.append(args)))
    s3.reach(s3.server.port, max_concurrency=3)  # a new file system, which takes the close_session of this test
    open_storage(f"{s3.url}/run").commit("a", b"1")
    pid = os.fork()
    if pid == 0:
        gc.collect()
        os._exit(len(closed))
    assert os.waitpid(pid, 0)[1] == 0


def test_fork_while_other_threads_use_it(storage):
    storage.make()
    storage.commit("a", b"1")
    done = threading.Event()

    def work():
        while not done.is_set():
            storage.read_all("a")

    with ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(work) for _ in range(2)]
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                try:
                    os._exit(storage.read_all("a") != b"1")
                finally:
                    os._exit(2)
            assert os.waitpid(pid, 0)[1] == 0
        done.set()
        for job in busy:
            job.result()


def test_a_listing_is_never_old(s3):
    storage = open_storage(f"{s3.url}/run")
    storage.commit("a", b"1")
    assert storage.sizes() == {"a": 1}
    others = fsspec.filesystem("s3", skip_instance_cache=True)
    others.pipe_file(f"{s3.url}/run/b", b"of another process")
    others.rm_file(f"{s3.url}/run/a")
    others.pipe_file(f"{s3.url}/other/c", b"")
    assert storage.sizes() == {"b": 18}
    assert sorted(open_storage(s3.url).folders()) == ["other", "run"]


def test_a_whole_chunk_goes_to_s3_in_one_request(s3, monkeypatch):
    import s3fs

    storage, calls, inner = open_storage(f"{s3.url}/run"), [], s3fs.S3FileSystem._call_s3

    async def record(self, method, *args, **kwargs):
        calls.append(method)
        return await inner(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", record)
    assert storage.max_file_bytes == CHUNK_BYTES
    storage.write("a", CHUNK_BYTES, iter([aligned(bytes(CHUNK_BYTES))]))
    assert calls == ["put_object"]
    assert (s3.folder / "run" / "a").stat().st_size == CHUNK_BYTES


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_a_file_is_an_empty_folder_to_an_object_store(request, kind):
    root = request.getfixturevalue("s3").url if kind == "s3" else f"memory://{next(numbers)}"
    open_storage(f"{root}/run").commit("file", b"1")
    assert open_storage(f"{root}/run").child("file").sizes() == {}
    assert open_storage(f"{root}/run").child("file").folders() == []


def test_a_missing_bucket_is_refused_and_not_made(s3):
    storage = open_storage("s3://misspelt/run")
    for attempt in (storage.make, lambda: storage.commit("m", b"1"), lambda: storage.write("a", 0, iter([]))):
        with pytest.raises(CheckpointError, match="create the bucket first"):
            attempt()
    assert storage.sizes() == {}
    assert not (s3.server.folder / "misspelt").exists()


def test_open_storage(tmp_path):
    for path in (tmp_path, str(tmp_path), f"file://{tmp_path}", Path(f"file://{tmp_path}")):
        storage = open_storage(path)
        assert isinstance(storage, LocalStorage) and storage.path == str(tmp_path) and storage.is_local
    assert isinstance(open_storage("runs/a:b"), LocalStorage)
    for path in ("memory://a/b", "memory://a/b/", Path("memory://a/b")):
        storage = open_storage(path)
        assert isinstance(storage, RemoteStorage) and storage.path == "memory://a/b" and not storage.is_local


def test_open_storage_refuses(monkeypatch):
    with pytest.raises(CheckpointError, match=r"nosuch://x cannot be opened.*nosuch"):
        open_storage("nosuch://x")
    with pytest.raises(CheckpointError, match="patterns"):
        open_storage("memory://runs/[1]")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(CheckpointError, match=r"pip install 'shardwright\[s3\]'"):
        open_storage("s3://bucket/x")


@pytest.fixture
def direct_writes(tmp_path, monkeypatch):
    """The writes of a test: (bytes, whether they went past the page cache)."""
    with open(tmp_path / "probe", "wb") as file:
        if not disk._set_direct(file.fileno(), True):
            pytest.skip("the file system of the temporary folder knows no direct writes")
    writes, inner = [], os.pwrite

    def record(descriptor, data, position):
        writes.append((len(data), bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)))
        return inner(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", record)
    return writes


def test_whole_blocks_go_past_the_page_cache(tmp_path, direct_writes):
    storage, data = open_storage(tmp_path / "x"), some_bytes(3 * MIB + 4096 + 17)
    storage.make()
    storage.write("a", len(data), cut(data, 2 * MIB))
    assert direct_writes == [(2 * MIB, True), (MIB + 4096, True), (17, False)]


def test_buffers_at_odd_addresses_go_through_it(tmp_path, direct_writes):
    storage, data = open_storage(tmp_path / "x"), some_bytes(MIB)
    storage.make()
    odd = aligned(b"1" + data + bytes(4095))[1 : MIB + 1]
    storage.write("a", MIB, iter([odd]))
    assert storage.read_all("a") == data
    assert direct_writes == [(MIB, True), (MIB, False)]


def test_a_folder_with_a_file_in_its_place(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    storage = open_storage(tmp_path / "file" / "x")
    for attempt in (storage.make, lambda: storage.write("a", 0, iter([])), lambda: storage.commit("a", b"")):
        with pytest.raises(CheckpointError, match=f"{storage.path}.* cannot be .*: .*; "):
            attempt()
