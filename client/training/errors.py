"""Errors of the training client."""

__all__ = ["ModError", "NonFiniteUpdate", "StoreError"]


class ModError(RuntimeError):
    """A message cannot be understood, or a reply cannot be encoded; Flower reports it."""


class NonFiniteUpdate(ModError):
    """Local training produced NaN or infinity."""


class StoreError(ModError):
    """The node's store cannot be written."""
