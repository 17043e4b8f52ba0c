"""Checkpoints of other programs: read, written, converted."""
