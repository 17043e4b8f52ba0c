"""State to bytes and back, with no layout in between: usable in any PyTorch program."""

from shardwright.checkpoint.api import load, prepare, read_values, save, steps_in_memory
from shardwright.checkpoint.archive import Archive, Writer, create, open
from shardwright.checkpoint.box import Box, FlatSlice
from shardwright.checkpoint.errors import CheckpointError, DamagedError
from shardwright.checkpoint.folders import find_complete, retain, step_folder
from shardwright.checkpoint.job import Pending, SupersededError
from shardwright.checkpoint.load import LoadOptions, LoadReport
from shardwright.checkpoint.manifest import TensorInfo
from shardwright.checkpoint.memory import HostMemory, choose_shift
from shardwright.checkpoint.save import SaveOptions
from shardwright.checkpoint.state import Stateful

__all__ = [
    "Archive",
    "Box",
    "CheckpointError",
    "DamagedError",
    "FlatSlice",
    "HostMemory",
    "LoadOptions",
    "LoadReport",
    "Pending",
    "SaveOptions",
    "Stateful",
    "SupersededError",
    "TensorInfo",
    "Writer",
    "choose_shift",
    "create",
    "find_complete",
    "load",
    "open",
    "prepare",
    "read_values",
    "retain",
    "save",
    "step_folder",
    "steps_in_memory",
]
