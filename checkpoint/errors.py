"""The error of this package."""


class CheckpointError(Exception):
    """A checkpoint that cannot be written, found or trusted. The text is value, rule and remedy."""


class DamagedError(CheckpointError):
    """A checkpoint that is not what was written: bytes or files are missing or changed. An older one may be whole."""
