"""The error of this package."""


class DataError(Exception):
    """Text that cannot be read, tokenised or dealt out. The text is value, rule and remedy."""
