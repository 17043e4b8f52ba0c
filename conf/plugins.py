"""The user's own modules, imported at start: each registers what it adds."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import traceback
import zlib
from collections.abc import Iterable
from pathlib import Path

from shardwright.conf.errors import ConfigError


def import_plugins(names: Iterable[str]) -> None:
    """Import modules by name and .py files by path, each once per process.

    Raises:
        ConfigError: one cannot be imported.
    """
    for name in names:
        try:
            if name.endswith(".py"):
                _import_file(Path(name).resolve())
            else:
                importlib.import_module(name)
        except Exception as error:
            raise ConfigError(
                f"plugins: {name} cannot be imported: {_reason(error)}; each must be a module that Python finds or the "
                "path of a .py file; correct it there or in plugins"
            ) from error


def _import_file(path: Path) -> None:
    stem = re.sub(r"\W", "_", path.stem)
    name = f"plugin_{stem}_{zlib.crc32(str(path).encode()):08x}"  # files of one name in several folders stay apart
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look up their annotations
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _reason(error: Exception) -> str:
    """Say what went wrong, and where if that is in a file."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if place.filename.startswith("<") else f" ({place.filename}:{place.lineno})"
    return f"{type(error).__name__}: {error}{where}"
