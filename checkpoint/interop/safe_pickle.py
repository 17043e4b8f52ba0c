"""Pickles from strangers: read without running anything that they name."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, cast

import torch

from shardwright.checkpoint.errors import CheckpointError

# Enough for plain data and objects, as protocols 2 to 5 write them. Left out are sets, whose members are hashed, other
# ways to call, the registry of extensions, and persistent ids.
_OPCODES = b"".join(
    (
        pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK,
        pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1,
        pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE,
        pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
        pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS,
        pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET,
        pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD,
    )
)  # fmt: skip


class Record:
    """Stands for a class that a pickle names: keeps what the pickle says of an instance, and does nothing.

    Attributes:
        args: what the instance was made with.
        state: what it holds.
    """

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load(data: bytes, allowed: Mapping[tuple[str, str], Any], source: str) -> Any:
    """Unpickle, with a table instead of imports.

    Nothing is called but what the table holds. With records in it, nothing changes outside of the result, and memory
    stays within a multiple of the size of the data. The result can still be of any form: check all that is used.

    Args:
        data: the pickle, of protocol 2 to 5.
        allowed: (module, name) as in the pickle -> a subclass of `Record`, or a constant.
        source: name of the file, for messages.

    Raises:
        CheckpointError: the pickle is malformed or names anything else.
    """
    return _guarded(lambda: _Unpickler(data, allowed).load(), source, "use a checkpoint that you trust")


def load_torch(file: Slice | BinaryIO, size_bytes: int, source: str) -> Any:
    """Return what `torch.save` wrote, on the CPU: tensors and plain values, never an object of a foreign class.

    A file that unpacks to more bytes than it has is refused.

    Args:
        file: seekable, with `readinto`; nothing but that one object.
        size_bytes: of the file.
        source: name of the file, for messages.

    Raises:
        CheckpointError: the file is malformed or names what `torch.load(weights_only=True)` does not admit.
    """

    def read() -> Any:
        with zipfile.ZipFile(cast(BinaryIO, file)) as members:
            inflated = any(member.compress_type != zipfile.ZIP_STORED for member in members.infolist())
            if inflated or sum(member.file_size for member in members.infolist()) > size_bytes:
                raise ValueError("it would unpack to more bytes than it has")
        file.seek(0)
        try:
            return torch.load(cast(BinaryIO, file), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # whose text goes on about how to load it all the same
            named = re.search(r"GLOBAL (\S+)", str(error))
            raise ValueError(f"it names {named[1]}" if named else "it holds more than tensors and values") from error

    return _guarded(read, source, "skip that entry, or use a checkpoint that you trust")


class Slice(io.RawIOBase):
    """Bytes [start, start + length) of a file, as a file of their own.

    Args:
        file: seekable; not closed with this.
        start: first byte.
        length: in bytes.
    """

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to a byte, counted from the start, the present one or the end."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if origin + offset < 0:
            raise OSError(f"byte {origin + offset} is before the start")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer as far as bytes are left."""
        wanted = memoryview(buffer)[: self._left]
        self._file.seek(self._start + self._position)
        count = self._file.readinto(wanted)  # type: ignore[attr-defined]
        self._position += count
        return count

    def read(self, size: int = -1, /) -> bytes:
        """Return that many bytes, or all that are left."""
        return super().read(self._left if size < 0 else min(size, self._left)) or b""

    @property
    def _left(self) -> int:
        return max(self._length - self._position, 0)


# The one in Python: the one in C takes as much memory as a file's memo indices ask for.
_PythonUnpickler: Any = pickle._Unpickler


class _Unpickler(_PythonUnpickler):
    dispatch = {code: _PythonUnpickler.dispatch[code] for code in _OPCODES}  # noqa: RUF012

    def __init__(self, data: bytes, allowed: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which it has no business with")
        return self._allowed[module, name]

    def load_setitem(self) -> None:
        _check_key(self.stack[-2])
        super().load_setitem()

    def load_setitems(self) -> None:
        for key in self.stack[::2]:
            _check_key(key)
        super().load_setitems()

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], Record):  # such as a class, which would get new attributes
            raise pickle.UnpicklingError("it gives a state to what is no record")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def _check_key(key: Any) -> None:
    if isinstance(key, tuple):  # hashing a deep one overflows the stack of the process
        raise pickle.UnpicklingError("a key of a dict is a tuple")


def _guarded(read: Callable[[], Any], source: str, remedy: str) -> Any:
    """Call `read`; whatever a malformed file provokes there is one error here."""
    try:
        return read()
    except Exception as error:
        told = isinstance(error, ValueError | pickle.UnpicklingError)
        reason = f"{'' if told else type(error).__name__} {error}".strip()[:300]
        raise CheckpointError(f"{source} is refused: {reason!r}; {remedy}") from error
