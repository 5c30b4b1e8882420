"""Errors of data sets."""

__all__ = ["DataError"]


class DataError(RuntimeError):
    """A data set cannot be loaded, split or partitioned."""
