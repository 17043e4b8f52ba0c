"""State to bytes and back, with no layout in between: usable in any PyTorch program."""

from shardwright.checkpoint.api import Stateful, find_complete, load, read_values, retain, save, step_folder
from shardwright.checkpoint.errors import CheckpointError, DamagedError

__all__ = [
    "CheckpointError",
    "DamagedError",
    "Stateful",
    "find_complete",
    "load",
    "read_values",
    "retain",
    "save",
    "step_folder",
]
