"""State to bytes and back, with no layout in between: usable in any PyTorch program."""

from shardwright.checkpoint.api import load, read_values, save
from shardwright.checkpoint.archive import Archive, Writer, create, open
from shardwright.checkpoint.box import Box, FlatSlice
from shardwright.checkpoint.errors import CheckpointError, DamagedError
from shardwright.checkpoint.folders import find_complete, retain, step_folder
from shardwright.checkpoint.load import LoadOptions, LoadReport
from shardwright.checkpoint.manifest import TensorInfo
from shardwright.checkpoint.save import Pending, SaveOptions, Superseded
from shardwright.checkpoint.state import Stateful

__all__ = [
    "Archive",
    "Box",
    "CheckpointError",
    "DamagedError",
    "FlatSlice",
    "LoadOptions",
    "LoadReport",
    "Pending",
    "SaveOptions",
    "Stateful",
    "Superseded",
    "TensorInfo",
    "Writer",
    "create",
    "find_complete",
    "load",
    "open",
    "read_values",
    "retain",
    "save",
    "step_folder",
]
