"""Shardwright: train large transformers on many processes, from one config, with checkpoints that load at any layout."""

from importlib.metadata import version

__version__ = version("shardwright")
