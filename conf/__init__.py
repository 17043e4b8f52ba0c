"""What a run is: YAML groups, the schema that they must satisfy, and their loader. Imports no torch."""

from shardwright.conf.errors import ConfigError

__all__ = ["ConfigError"]
