"""Data sources: examples as arrays, split once into training and held-out ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.kinds import DataError, Kind, Range, Registry
from prunecast.simulations.tasks import Task

__all__ = ["DATA", "DataError", "DataSource", "Examples", "load_examples"]

_INPUT = "input-"


@dataclass(frozen=True)
class Examples:
    """Inputs and targets, held in memory.

    Attributes:
        inputs: one array for each input of the network, by name and in the network's order; the
            example is the first dimension, the rest and the dtypes are free.
        targets: one for each example.
    """

    inputs: Mapping[str, NDArray[Any]]
    targets: NDArray[Any]

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, chosen: NDArray[np.int64] | slice) -> Examples:
        """Some of the examples."""
        inputs = {name: values[chosen] for name, values in self.inputs.items()}
        return Examples(inputs, self.targets[chosen])

    def save(self, path: Path) -> None:
        """Write them to an ``.npz`` file."""
        inputs: dict[str, Any] = {_INPUT + name: values for name, values in self.inputs.items()}
        np.savez(path, targets=self.targets, **inputs)

    @classmethod
    def load(cls, path: Path) -> Examples:
        """Read what `save` wrote."""
        with np.load(path) as file:
            inputs = {
                name.removeprefix(_INPUT): file[name]
                for name in file.files
                if name.startswith(_INPUT)
            }
            return cls(inputs, file["targets"])


@dataclass(frozen=True)
class DataSource(Kind):
    """``[data]``: what is trained on.

    Attributes:
        held_out: examples kept back to measure with, drawn at random.
    """

    held_out: Annotated[int, Range(1)] = 1000

    def check(self, key: str) -> None:
        """Raise `ScenarioError` for what is wrong below `key`."""

    def located(self, folder: Path) -> Self:
        """The same source, its relative paths taken from the folder of the scenario file."""
        return self

    def read(self) -> Examples:
        """All examples, targets as they are stored.

        Raises:
            DataError: a package or file is missing or damaged.
        """
        raise NotImplementedError


DATA: Registry[DataSource] = Registry(DataSource, default="mnist-5k", word="source")
"""The data sources: the modules beside this one."""


def load_examples(source: DataSource, task: Task, *, seed: int) -> tuple[Examples, Examples]:
    """Examples to train on, and held-out ones that no client ever sees.

    Args:
        source: of the scenario.
        task: brings the targets into its dtype and shape.
        seed: of the split.

    Raises:
        DataError: the package or file is missing, or the arrays do not fit.
    """
    found = source.read()
    if not len(found):
        raise DataError("the data hold no examples: give others")
    for name, values in found.inputs.items():
        if len(values) != len(found):
            raise DataError(f"there are {len(values)} of input {name!r}, but {len(found)} targets")
    for name, values in found.inputs.items():
        if values.dtype.kind == "f":
            broken = np.flatnonzero(np.isnan(values.reshape(len(values), -1)).any(axis=1))
            if broken.size:
                raise DataError(
                    f"input {name!r} holds NaN in {broken.size} of {len(found)} examples, the "
                    f"first is example {broken[0]}: fill them in, or leave those examples out"
                )
        elif values.dtype.kind not in "biu":
            raise DataError(f"input {name!r} is {values.dtype}: networks take numbers, convert it")
    wanted = task.targets(task.targets_of(found.inputs, found.targets))
    found = dataclasses.replace(found, targets=wanted)
    if source.held_out >= len(found):
        raise DataError(
            f"data.held_out = {source.held_out}, but there are {len(found)} examples: lower it"
        )
    # SeedSequence keeps the streams of split, partition and weights apart
    order = np.random.default_rng([seed, 0]).permutation(len(found))
    return found.take(order[source.held_out :]), found.take(order[: source.held_out])
