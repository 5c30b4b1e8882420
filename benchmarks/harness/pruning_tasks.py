"""What is trained to see what pruning costs: two tasks of their own, and packaged scenarios."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prunecast.simulations.scenarios import load_scenario

if TYPE_CHECKING:
    from prunecast.simulations.data import Examples

__all__ = ["TASKS", "activity", "fashion", "fashion_apart", "task_named"]


def fashion(count: int = 4000, apart: int = 2000) -> tuple[Any, Any]:
    """The first `count` images of Fashion-MNIST, and their classes."""
    return _images(False, count)


def fashion_apart(count: int = 4000, apart: int = 2000) -> tuple[Any, Any]:
    """The first `apart` images of those that Fashion-MNIST sets apart."""
    return _images(True, apart)


def _images(apart: bool, count: int) -> tuple[Any, Any]:
    found = _named("fashion-mnist", apart).take(slice(count))
    return dict(found.inputs), found.targets


def _named(name: str, apart: bool = False) -> Examples:
    from prunecast.simulations.data.named import Named

    source = Named(name=name)
    found = source.read_test() if apart else source.read()
    assert found is not None
    return found


def activity() -> tuple[Any, Any, Any]:
    """Windows of sensors at 25 Hz, each channel of mean 0 and deviation 1; and whose they are."""
    found = _named("activity")
    [windows] = found.inputs.values()
    halved = windows.reshape(*windows.shape[:2], -1, 2).mean(3)
    middle, spread = (f((0, 2), keepdims=True) for f in (halved.mean, halved.std))
    return ((halved - middle) / spread).astype(windows.dtype), found.targets, found.identities


TASKS: dict[str, dict[str, Any]] = {
    "fashion": {
        "description": "4,000 images of Fashion-MNIST, 5 clients, Dirichlet(0.5); a CNN of 409,034",
        "rounds": 30,
        "data": {
            "source": "function",
            "function": "benchmarks.harness.pruning_tasks:fashion",
            "test": "benchmarks.harness.pruning_tasks:fashion_apart",
            "held_out": "test",
        },
        "partition": {"kind": "dirichlet", "alpha": 0.5},
        "clients": {"count": 5},
        "model": {
            "factory": "prunecast.simulations.networks.convolutional:digits_cnn",
            "initial": "drawn",
        },
        "training": {
            "epochs": 1,
            "batch_size": 16,
            "learning_rate": 0.03,
            "learning_rate_decay": 0.96,
            "momentum": 0.9,
        },
    },
    "activity": {
        "description": "Exercises from wearable sensors, 5 clients of two subjects each; "
        "convolutions along time, 136,071",
        "rounds": 30,
        "data": {
            "source": "function",
            "function": "benchmarks.harness.pruning_tasks:activity",
            "held_out": 600,
        },
        "partition": {"kind": "natural"},
        "clients": {"count": 5},
        "model": {
            "factory": "prunecast.simulations.networks.convolutional:sensor_cnn",
            "initial": "drawn",
            "options": {"channels": 6, "classes": 7, "width": 128},
        },
        "training": {
            "epochs": 2,
            "batch_size": 16,
            "learning_rate": 0.02,
            "learning_rate_decay": 0.97,
            "momentum": 0.9,
        },
    },
}
"""What is trained, as a scenario has it; both need `prunecast data get`."""


def task_named(name: str) -> dict[str, Any]:
    """What a scenario says of one of `TASKS`, or of a packaged scenario, but for its arms.

    Raises:
        ScenarioError: there is no such scenario.
    """
    if name in TASKS:
        return dict(TASKS[name])
    table = load_scenario(name).to_mapping()
    wanted = ("description", "rounds", "data", "partition", "task", "clients", "model", "training")
    return {key: table[key] for key in wanted}
