"""Where the files of a checkpoint lie: a local folder, or one of an object store.

An object store is named by a URL, such as `s3://bucket/folder`, and reached through fsspec, which needs a package for
most protocols (s3: `pip install 'shardwright[s3]'`). S3 is set up by the variables that all its tools read:
`AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY` (or `AWS_PROFILE`, or the role of the machine), `AWS_REGION`, and for a
server other than Amazon's `AWS_ENDPOINT_URL`. Any option of fsspec's file system can be given as
`FSSPEC_<PROTOCOL>_<OPTION>`, such as `FSSPEC_S3_ENDPOINT_URL`; these are read when Python imports fsspec.
"""

from __future__ import annotations

import abc
import errno
import logging
import os
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs

from shardwright.checkpoint.disk import read_at, sync_folder, write_at
from shardwright.checkpoint.errors import CheckpointError, DamagedError

CHUNK_BYTES = 64 * 2**20
MAX_ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 0.5
UPLOAD_SECONDS = 300  # for a file; a server that takes no more bytes would hold it for ever

_URL = re.compile(r"(?P<protocol>[A-Za-z][\w+.-]+):/{1,3}(?P<rest>.*)")
_HOPELESS = (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError, ValueError, TypeError)
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space there"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give a folder that may be written"),
}

_logger = logging.getLogger(__name__)
_random = random.SystemRandom()  # neither equal after a fork nor that of the training
_kept: set[Any] = set()  # file systems: in a forked process, collecting one of the parent waits for its thread, in vain

T = TypeVar("T")


class Storage(abc.ABC):
    """One folder of files. Names are plain file names, never paths. All methods may be called from several threads.

    Attributes:
        path: as given, for messages.
        is_local: whether it is a folder of the operating system.
        max_file_bytes: files that are written should not be larger.
        read_bytes: how much to read at once: little enough for processor caches, unless each read has to travel.
        num_readers: how many threads of a process should read: a disk that serves many processes likes few streams.
        shared: whether all processes see the same files.
    """

    path: str
    is_local: bool
    max_file_bytes: int
    read_bytes: int
    num_readers: int
    shared = True

    @abc.abstractmethod
    def make(self) -> None:
        """Create the folder, and those above it, unless there.

        Raises:
            CheckpointError: it cannot be created.
        """

    @abc.abstractmethod
    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file in the folder itself by name; nothing if there is no folder.

        Raises:
            CheckpointError: it cannot be listed.
        """

    @abc.abstractmethod
    def folders(self) -> list[str]:
        """Return the names of the folders in this one; nothing if there is none.

        Raises:
            CheckpointError: it cannot be listed.
        """

    @abc.abstractmethod
    def child(self, name: str) -> Storage:
        """Return the storage of a folder in this one, there or not."""

    @abc.abstractmethod
    def read(self, name: str, start: int, *into: memoryview) -> None:
        """Fill buffers, one after the other, with the bytes of a file from `start` on.

        Raises:
            DamagedError: the file is missing, too short or cannot be read.
            CheckpointError: the object store refuses, or does not answer.
        """

    @abc.abstractmethod
    def read_all(self, name: str) -> bytes:
        """Return a whole, small file; raises as `read`."""

    @abc.abstractmethod
    def write(self, name: str, size: int, chunks: Iterator[memoryview]) -> None:
        """Create a file that survives a crash from then on; if this fails, for whatever reason, there is none.

        Args:
            name: of the file.
            size: of the file, in bytes.
            chunks: the bytes in order. Each is valid only until the next one is asked for. Page-aligned chunks of whole
                pages (the last one: of any size) are the fastest.

        Raises:
            CheckpointError: it cannot be written. What `chunks` raises comes through.
        """

    @abc.abstractmethod
    def commit(self, name: str, data: bytes) -> None:
        """Create or replace a small file: whole or not at all, whenever it is interrupted; it survives a crash.

        Raises:
            CheckpointError: it cannot be written.
        """

    @abc.abstractmethod
    def remove(self, names: Iterable[str]) -> None:
        """Delete files, if there.

        Raises:
            CheckpointError: one cannot be deleted.
        """

    @abc.abstractmethod
    def remove_folder(self) -> None:
        """Delete the folder, if there, with all that it holds; in no order, so delete first what marks it complete.

        Raises:
            CheckpointError: something cannot be deleted.
        """


def open_storage(path: str | Path | Storage) -> Storage:
    """Return the storage of a folder, there or not.

    Args:
        path: a local folder, `file:///folder`, or a URL that fsspec knows: `s3://bucket/folder`, `memory://folder`. A
            storage is returned as it is.

    Raises:
        CheckpointError: the protocol is unknown, or its package is missing.
    """
    if isinstance(path, Storage):
        return path
    url = _URL.fullmatch(str(path))  # with one slash too: that is what pathlib makes of a URL
    if url is None:
        return LocalStorage(Path(path))
    protocol, rest = url["protocol"].lower(), url["rest"]
    if protocol == "file":
        return LocalStorage(Path("/") / rest)
    return RemoteStorage(f"{protocol}://{rest.rstrip('/')}")


class LocalStorage(Storage):
    """A folder that the operating system knows, local or mounted.

    Writes go past the page cache where they can: that is faster, and leaves the cache to the training.
    """

    is_local = True
    max_file_bytes = 2**40
    read_bytes = 8 * 2**20
    num_readers = 2

    def __init__(self, folder: Path) -> None:
        self.path = str(folder)
        self._folder = folder

    def make(self) -> None:
        """Create the folder, and those above it."""
        missing = [folder for folder in (self._folder, *self._folder.parents) if not folder.exists()]
        with _refused(self._folder, "created"):
            self._folder.mkdir(parents=True, exist_ok=True)
            for folder in missing:
                sync_folder(folder.parent)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file by name."""
        sizes = {}
        for entry in self._entries():
            with _refused(entry.path, "listed"), suppress(FileNotFoundError):  # deleted meanwhile
                if entry.is_file():
                    sizes[entry.name] = entry.stat().st_size
        return sizes

    def folders(self) -> list[str]:
        """Return the names of the folders in this one."""
        return [entry.name for entry in self._entries() if entry.is_dir()]

    def child(self, name: str) -> LocalStorage:
        """Return the storage of a folder in this one."""
        return LocalStorage(self._folder / name)

    def read(self, name: str, start: int, *into: memoryview) -> None:
        """Fill buffers with the bytes of a file from `start` on."""
        path, size = self._folder / name, sum(map(len, into))
        with _unreadable(path), open(path, "rb", buffering=0) as file:
            count = read_at(file.fileno(), into, start)
        if count != size:
            raise _too_short(path, start, size, count)

    def read_all(self, name: str) -> bytes:
        """Return a whole file."""
        path = self._folder / name
        with _unreadable(path):
            return path.read_bytes()

    def write(self, name: str, size: int, chunks: Iterator[memoryview]) -> None:
        """Create a file that survives a crash from then on."""
        path, position = self._folder / name, 0
        with _refused(path, "written"):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for chunk in chunks:
                with _refused(path, "written"):
                    write_at(descriptor, chunk, position)
                position += len(chunk)
            assert position == size, f"{path}: {position} bytes came, not {size}"
            with _refused(path, "written"):
                os.fsync(descriptor)
                sync_folder(self._folder)
        except BaseException:
            with suppress(OSError):
                path.unlink()
            raise
        finally:
            os.close(descriptor)

    def commit(self, name: str, data: bytes) -> None:
        """Create or replace a file: whole or not at all."""
        path, temporary = self._folder / name, self._folder / f"{name}.{uuid.uuid4().hex[:12]}.part"
        self.write(temporary.name, len(data), iter([memoryview(data)]))
        try:
            with _refused(path, "written"):
                os.replace(temporary, path)
                sync_folder(self._folder)
                sync_folder(self._folder.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise

    def remove(self, names: Iterable[str]) -> None:
        """Delete files, if there."""
        for name in names:
            with _refused(self._folder / name, "deleted"):
                (self._folder / name).unlink(missing_ok=True)

    def remove_folder(self) -> None:
        """Delete the folder with all that it holds."""
        with _refused(self._folder, "deleted"), suppress(FileNotFoundError):
            shutil.rmtree(self._folder)

    def _entries(self) -> list[os.DirEntry[str]]:
        with _refused(self._folder, "listed"), suppress(FileNotFoundError, NotADirectoryError):
            return list(os.scandir(self._folder))
        return []


@contextmanager
def _refused(path: str | Path, done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "repair the disk or give another folder")
        raise CheckpointError(f"{path} cannot be {done}: {error.strerror or error}; {remedy}") from error


@contextmanager
def _unreadable(path: str | Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is missing; use another checkpoint") from error
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error}; repair the disk or use another checkpoint") from error


def _too_short(path: str | Path, start: int, wanted: int, there: int) -> DamagedError:
    return DamagedError(f"{path} is damaged: it has {there} of {wanted} bytes from {start} on; use another checkpoint")


class RemoteStorage(Storage):
    """A folder of an object store, or of another file system that fsspec knows.

    What fails is tried again after growing pauses, `MAX_ATTEMPTS` times in all, unless it is hopeless: a file that is
    not there, or access that is denied. A file is one upload, which the store makes visible when it is complete.
    """

    is_local = False
    read_bytes = CHUNK_BYTES
    num_readers = 4
    max_file_bytes = CHUNK_BYTES  # so that an upload is held in memory and can be tried again

    def __init__(self, path: str) -> None:
        if re.search(r"[*?\[]", path):
            raise CheckpointError(f"{path} holds one of * ? [, which are patterns to fsspec; give a path without them")
        self.path = path
        self._root: str = _connect(path)[1]

    def make(self) -> None:
        """Create the folder. An object store has none, but its bucket must be there."""

        def make(files: Any) -> None:
            if self._root.startswith("/"):
                files.makedirs(self._root, exist_ok=True)
            else:
                with suppress(FileExistsError, PermissionError):  # writing may be allowed where asking is not
                    files.mkdir(self._root, create_parents=False)  # a misspelt bucket is not to be made

        with self._no_bucket("created"):
            self._attempt(self.path, "created", make)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file by name."""
        return {name: entry["size"] for name, entry in self._entries().items() if entry["type"] == "file"}

    def folders(self) -> list[str]:
        """Return the names of the folders in this one."""
        return [name for name, entry in self._entries().items() if entry["type"] == "directory"]

    def child(self, name: str) -> RemoteStorage:
        """Return the storage of a folder in this one."""
        return RemoteStorage(f"{self.path}/{name}")

    def read(self, name: str, start: int, *into: memoryview) -> None:
        """Fill buffers with the bytes of a file from `start` on."""
        size = sum(map(len, into))
        file, stop = f"{self._root}/{name}", start + size

        def fetch(files: Any) -> bytes:
            try:
                return files.cat_file(file, start=start, end=stop)
            except OSError as error:
                if error.errno == errno.EINVAL and files.size(file) <= start:  # S3 refuses ranges beyond the end
                    return b""
                raise

        with _unreadable(f"{self.path}/{name}"):
            data = self._attempt(f"{self.path}/{name}", "read", fetch) if size else b""
        if len(data) != size:
            raise _too_short(f"{self.path}/{name}", start, size, len(data))
        left = memoryview(data)
        for part in into:
            part[:], left = left[: len(part)], left[len(part) :]

    def read_all(self, name: str) -> bytes:
        """Return a whole file."""
        with _unreadable(f"{self.path}/{name}"):
            return self._attempt(f"{self.path}/{name}", "read", lambda files: files.cat_file(f"{self._root}/{name}"))

    def write(self, name: str, size: int, chunks: Iterator[memoryview]) -> None:
        """Create a file."""
        data = b"".join([bytes(chunk) for chunk in chunks])
        assert len(data) == size, f"{self.path}/{name}: {len(data)} bytes came, not {size}"
        try:
            self.commit(name, data)
        except BaseException:
            with suppress(Exception):  # an upload may have arrived, and only the answer not
                _connect(self.path)[0].rm_file(f"{self._root}/{name}")
            raise

    def commit(self, name: str, data: bytes) -> None:
        """Create or replace a file: whole or not at all."""

        def upload(files: Any) -> None:
            limit = {"timeout": UPLOAD_SECONDS} if files.async_impl else {}
            files.pipe_file(f"{self._root}/{name}", data, **limit)

        with self._no_bucket("written"):
            self._attempt(f"{self.path}/{name}", "written", upload)

    def remove(self, names: Iterable[str]) -> None:
        """Delete files, if there."""
        wanted = set(names)

        def remove(files: Any) -> None:
            if there := wanted & self._list(files).keys():
                with suppress(FileNotFoundError):
                    files.rm([f"{self._root}/{name}" for name in sorted(there)])
            if left := wanted & self._list(files).keys():  # s3fs does not say so
                raise OSError(f"{', '.join(sorted(left))} would not go")

        self._attempt(self.path, "emptied", remove)

    def remove_folder(self) -> None:
        """Delete the folder with all that it holds."""
        with suppress(FileNotFoundError):
            self._attempt(self.path, "deleted", lambda files: files.rm(self._root, recursive=True))

    def _entries(self) -> dict[str, dict[str, Any]]:
        return self._attempt(self.path, "listed", self._list)

    def _list(self, files: Any) -> dict[str, dict[str, Any]]:
        """Return what fsspec says about files and folders by name."""
        try:
            entries = files.ls(self._root, detail=True)
        except FileNotFoundError:
            return {}
        inside = f"{self._root}/"
        names = {entry["name"].rstrip("/").removeprefix(inside): entry for entry in entries}
        # fsspec lists a file as itself
        return {name: entry for name, entry in names.items() if "/" not in name}

    def _attempt(self, path: str, done: str, operation: Callable[[Any], T]) -> T:
        """Run an operation of the file system, again if it fails; only FileNotFoundError comes through as it is."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return operation(_connect(self.path)[0])
            except FileNotFoundError:
                raise
            except Exception as error:
                cause = f"{type(error).__name__}: {error}"
                if isinstance(error, _HOPELESS):
                    raise CheckpointError(
                        f"{path} cannot be {done}: {cause}; check the address, the credentials and their rights"
                    ) from error
                if attempt == MAX_ATTEMPTS:
                    raise CheckpointError(
                        f"{path} cannot be {done}: {cause} at each of {attempt} attempts; check the network"
                    ) from error
            pause = FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * _random.uniform(0.5, 1.5)
            _logger.warning(f"{path} is not {done} yet: {cause}; trying again in {pause:.1f} s")
            time.sleep(pause)

    @contextmanager
    def _no_bucket(self, done: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path} cannot be {done}: {error}; create the bucket first") from error


def _connect(path: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path there.

    Asked for at every use: connections and the thread that serves them do not survive a fork; fsspec keeps one instance
    for each process. Listings are not cached, since other processes write there too.
    """
    try:
        files, root = url_to_fs(path, use_listings_cache=False)
    except ImportError as error:
        remedy = "run pip install 'shardwright[s3]'" if path.startswith("s3:") else "install the package that it names"
        raise CheckpointError(f"{path} cannot be opened: {error}; {remedy}") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be opened: {error}; give a URL that fsspec knows and reaches") from error
    if hasattr(files, "retries"):
        files.retries = 1  # of s3fs: those of its nested calls multiply with each other and with ours
    _kept.add(files)
    return files, root
