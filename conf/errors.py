"""The error of this package."""


class ConfigError(Exception):
    """A configuration that cannot be run. The text is value, rule and remedy."""
