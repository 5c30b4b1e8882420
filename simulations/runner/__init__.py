"""Runs a scenario on Flower's simulation engine, and delivers what it trained to a device.

`run` is where to begin. This file holds the errors alone: the device's process lives in this
package too, and must import neither torch nor Flower.
"""

__all__ = ["DeviceMismatch", "EngineFailed", "ResultError", "SimulationError"]


class SimulationError(RuntimeError):
    """Base of every error that `prunecast.simulations.runner` raises."""


class EngineFailed(SimulationError):
    """The engine, or a client in it, failed; the message names the log."""


class ResultError(SimulationError):
    """A run folder's result cannot be read, or is of another schema."""


class DeviceMismatch(SimulationError):
    """The edge device computed something else than the server did on the same model."""
