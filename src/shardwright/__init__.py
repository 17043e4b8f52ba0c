"""Shardwright: train large transformers on many processes, from one config, with checkpoints that load at any layout."""

__version__ = "0.1.0"
