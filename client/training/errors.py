"""Errors of the training client."""

__all__ = ["ModError", "NonFiniteUpdate", "StoreError", "TrainerError", "TrainingError"]


class TrainingError(RuntimeError):
    """Base of every error that `prunecast.client.training` raises."""


class TrainerError(TrainingError):
    """Local training or evaluation cannot be done as asked."""


class ModError(TrainingError):
    """A message cannot be understood, or a reply cannot be encoded; Flower reports it."""


class NonFiniteUpdate(ModError):
    """Local training produced NaN or infinity."""


class StoreError(ModError):
    """The node's store cannot be written."""
