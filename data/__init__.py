"""Token batches with an exact position: documents -> tokens -> packed sequences -> microbatches."""

from shardwright.data.errors import DataError

__all__ = ["DataError"]
