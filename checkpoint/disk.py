"""Bytes from and to a file of the operating system, completely."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path

_MAX_PARTS = 1024  # of one read, in Linux
_BLOCK_BYTES = 4096  # direct writes are made of whole ones, in file and memory
_O_DIRECT = getattr(os, "O_DIRECT", 0)


def read_at(descriptor: int, into: Iterable[memoryview], position: int) -> int:
    """Fill buffers, one after the other, from a position on; return the bytes read, fewer where the file ends."""
    left, start = deque(part for part in into if part), position
    while left:
        count = os.preadv(descriptor, list(itertools.islice(left, _MAX_PARTS)), position)
        if count == 0:
            break
        position += count
        while left and count >= len(left[0]):
            count -= len(left.popleft())
        if count:
            left[0] = left[0][count:]
    return position - start


def write_at(descriptor: int, data: memoryview, position: int) -> None:
    """Write all bytes of a chunk: whole blocks directly, where the file system and the address allow it."""
    direct = _set_direct(descriptor, True)
    while data:
        if len(data) < _BLOCK_BYTES and direct:
            direct = _set_direct(descriptor, False)
        count = len(data) // _BLOCK_BYTES * _BLOCK_BYTES if direct else len(data)
        try:
            count = os.pwrite(descriptor, data[:count], position)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            direct, count = _set_direct(descriptor, False), 0
        data, position = data[count:], position + count


def _set_direct(descriptor: int, wanted: bool) -> bool:
    """Let writes go past the page cache, or not; return whether they do."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_O_DIRECT
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _O_DIRECT if wanted else flags)
    except OSError:  # some file systems know no direct writes
        return False
    return wanted and _O_DIRECT != 0


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the answer of file systems that need no such thing
            raise
    finally:
        os.close(descriptor)
