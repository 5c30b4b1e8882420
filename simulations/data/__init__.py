"""Data sources: examples as arrays, split once into training and held-out ones."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.kinds import DataError, Kind, Range, Registry
from prunecast.simulations.tasks import Task

__all__ = ["DATA", "DataError", "DataSource", "Examples", "keyed", "load_examples"]

_INPUT = "input-"
_KEY = re.compile(r"[a-z_]+(\.[a-z_]+)*: ")
_NAMED_BY = ("path", "name", "function")  # keys of sources, by which what is read is named


@dataclass(frozen=True)
class Examples:
    """Inputs and targets, held in memory.

    Attributes:
        inputs: one array for each input of the network, by name and in the network's order; the
            example is the first dimension, the rest and the dtypes are free.
        targets: one for each example.
        identities: whose each example is (a user, a subject, a speaker), as an integer; None where
            the data do not say.
    """

    inputs: Mapping[str, NDArray[Any]]
    targets: NDArray[Any]
    identities: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, chosen: NDArray[np.int64] | slice) -> Examples:
        """Some of the examples."""
        inputs = {name: values[chosen] for name, values in self.inputs.items()}
        whose = None if self.identities is None else self.identities[chosen]
        return Examples(inputs, self.targets[chosen], whose)

    def save(self, path: Path) -> None:
        """Write them to an ``.npz`` file."""
        inputs: dict[str, Any] = {_INPUT + name: values for name, values in self.inputs.items()}
        if self.identities is not None:
            inputs["identities"] = self.identities
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
            whose = file["identities"] if "identities" in file.files else None
            return cls(inputs, file["targets"], whose)


@dataclass(frozen=True)
class DataSource(Kind):
    """``[data]``: what is trained on.

    Attributes:
        held_out: examples kept back to measure with, drawn at random; or "test", all of those that
            the data set itself sets apart. With a number those are not touched.
        examples: how many of the others to train on, drawn at random; 0 takes all.
        fetches: whether reading it may ask the network, which no other process of a run does.
    """

    fetches: ClassVar[bool] = False

    held_out: Annotated[int | Literal["test"], Range(1)] = 1000
    examples: Annotated[int, Range(0)] = 0

    def check(self, key: str) -> None:
        """Raise `ScenarioError` for what is wrong below `key`."""

    def located(self, folder: Path) -> Self:
        """The same source, its relative paths taken from the folder of the scenario file."""
        return self

    def read(self) -> Examples:
        """All examples but those of `read_test`, targets as they are stored.

        Raises:
            DataError: a package or file is missing or damaged.
        """
        raise NotImplementedError

    def read_test(self) -> Examples | None:
        """The examples that the data set sets apart to measure with; None where it has none.

        Raises:
            DataError: see `read`.
        """
        return None


@contextmanager
def keyed(key: str) -> Iterator[None]:
    """Let a `DataError` begin with the key of the scenario to look at, if it begins with none.

    >>> with keyed("data.targets"):
    ...     raise DataError("labels count from 0")
    Traceback (most recent call last):
    prunecast.simulations.kinds.DataError: data.targets: labels count from 0
    """
    try:
        yield
    except DataError as error:
        if _KEY.match(str(error)):
            raise
        raise DataError(f"{key}: {error}") from error.__cause__


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
    # SeedSequence keeps the streams of split, partition and weights apart
    rng = np.random.default_rng([seed, 0])
    key = next((name for name in _NAMED_BY if hasattr(source, name)), "source")
    with keyed(f"data.{key}"):
        raw = source.read()
    found = _checked(raw, task)
    order = rng.permutation(len(found))
    if source.held_out == "test":
        with keyed(f"data.{key}"):
            apart = source.read_test()
        if apart is None:
            raise DataError(
                "data.held_out = 'test', but the data set apart no examples to measure with: give "
                "a number"
            )
        apart = _checked(apart, task)
        return found.take(_some(order, source)), apart.take(rng.permutation(len(apart)))
    if source.held_out >= len(found):
        raise DataError(
            f"data.held_out = {source.held_out}, but there are {len(found)} examples: lower it"
        )
    rest = _some(order[source.held_out :], source)
    return found.take(rest), found.take(order[: source.held_out])


def _some(order: NDArray[np.int64], source: DataSource) -> NDArray[np.int64]:
    """Of the examples to train on as many as the scenario asks for."""
    if source.examples > len(order):
        raise DataError(
            f"data.examples = {source.examples}, but there are {len(order)} to train on: lower it, "
            "or leave it out to take all"
        )
    return order[: source.examples or None]


def _check_numbers(values: NDArray[Any], what: str) -> None:
    broken = np.flatnonzero(np.isnan(values.reshape(len(values), -1)).any(axis=1))
    if broken.size:
        raise DataError(
            f"{what} NaN in {broken.size} of {len(values)} examples, the first is example "
            f"{broken[0]}: fill them in, or leave those examples out"
        )


def _checked(found: Examples, task: Task) -> Examples:
    """The same examples, targets as the task takes them; `DataError` for unusable ones."""
    if not len(found):
        raise DataError("data.source: the data hold no examples: give others")
    whose = {} if found.identities is None else {"identities": found.identities}
    for name, values in {**found.inputs, **whose}.items():
        if len(values) != len(found):
            what = f"input {name!r}" if name in found.inputs else name
            raise DataError(
                f"data.inputs: there are {len(values)} of {what}, but {len(found)} targets: give "
                "each example one of both"
            )
    for name, values in found.inputs.items():
        if values.dtype.kind == "f":
            _check_numbers(values, f"data.inputs: input {name!r} holds")
        elif values.dtype.kind not in "biu":
            raise DataError(
                f"data.inputs: input {name!r} is {values.dtype}: networks take numbers, convert it"
            )
    raw = task.targets_of(found.inputs, found.targets)
    if raw.dtype.kind == "f":
        _check_numbers(raw, "data.targets: targets hold")
    with keyed("data.targets"):
        wanted = task.targets(raw)
    return dataclasses.replace(found, targets=wanted)
