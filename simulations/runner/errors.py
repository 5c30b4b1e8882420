"""Errors of simulation runs."""

__all__ = ["DeviceMismatch", "EngineFailed", "ResultError", "SimulationError"]


class SimulationError(RuntimeError):
    """Base of every error that `prunecast.simulations.runner` raises."""


class EngineFailed(SimulationError):
    """The engine, or a client in it, failed; the message names the log."""


class ResultError(SimulationError):
    """A run folder's result cannot be read, or is of another schema."""


class DeviceMismatch(SimulationError):
    """The edge device computed something else than the server did on the same model."""
