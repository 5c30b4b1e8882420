"""Runs a scenario on Flower's simulation engine, and delivers what it trained to a device."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prunecast.simulations.runner.errors import (
    DeviceMismatch,
    EngineFailed,
    ResultError,
    SimulationError,
)

if TYPE_CHECKING:
    from prunecast.simulations.runner.inprocess import InProcessGrid
    from prunecast.simulations.runner.result import read_ledger, read_result
    from prunecast.simulations.runner.run import new_run_folder, run_scenario

__all__ = [
    "DeviceMismatch",
    "EngineFailed",
    "InProcessGrid",
    "ResultError",
    "SimulationError",
    "new_run_folder",
    "read_ledger",
    "read_result",
    "run_scenario",
]

_LAZY = {
    "InProcessGrid": "inprocess",
    "new_run_folder": "run",
    "read_ledger": "result",
    "read_result": "result",
    "run_scenario": "run",
}


def __getattr__(name: str) -> Any:
    # the device's process lives in this package and must not import torch or flwr
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
