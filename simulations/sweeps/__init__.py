"""Sweeps over a scenario's keys: the table ``[sweep]``, and the points of its space.

`study.Sweep` runs one. This module is what a scenario file needs to be read; nothing here trains.
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from prunecast.simulations.kinds import Range, ScenarioError, build

__all__ = ["SEPARATOR", "Parameter", "SweepSpec", "applied", "load_spec"]

SEPARATOR = "."
_MAX_GRID = 10_000
_MAX_CORNERS = 256
_VARIED = ("arms", "clients.fraction", "model", "rounds", "strategy", "training")
_RANGE = ("low", "high", "step", "log")
_LISTED = "list values, or give a table with low and high"

Value = bool | int | float | str


@dataclass(frozen=True)
class Parameter:
    """One key of the scenario that is varied: either among choices, or within a range.

    Attributes:
        key: with dots.
        choices: all values; empty for a range.
        low, high: the ends of a range, both in it; whole numbers give whole numbers.
        step: between values; None for any number, or every whole one.
        log: whether the logarithm is drawn evenly.
    """

    key: str
    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether it is a range of whole numbers."""
        return not self.choices and all(isinstance(v, int) for v in (self.low, self.high))

    def ends(self) -> tuple[Value, ...]:
        """The values that are looked at before anything is trained."""
        return self.choices or (self.low, self.high)

    def points(self) -> tuple[Value, ...]:
        """All values; empty where a range has no step."""
        if self.choices:
            return self.choices
        step = self.step or (1 if self.whole and not self.log else None)
        if step is None:
            return ()
        count = math.floor((self.high - self.low) / step + 1e-9)
        # rounded: 0.5 + 3 * 0.1 is no decimal fraction that anybody would write
        found = [self.low + number * step for number in range(count + 1)]
        return tuple(found if self.whole else (round(value, 12) for value in found))


@dataclass(frozen=True)
class SweepSpec:
    """``[sweep]``: which keys are varied, and how.

    Attributes:
        sampler: "grid", every combination; "random"; or "nsga2", which begins at random and then
            crosses the points that no other beats in both bytes and the task's metric.
        trials: how many points; 0 for the whole grid, or 20.
        population: of each generation of "nsga2".
        seed: of the sampling; the scenario's trains.
        arm: that is varied; empty for the first that publishes versions, or trains.
        repeats: how often each point is trained, with the scenario's seed and those after it.
        parameters: ``[sweep.parameters]``, scenario keys to values or ranges.
    """

    sampler: Literal["grid", "random", "nsga2"] = "nsga2"
    trials: Annotated[int, Range(0)] = 0
    population: Annotated[int, Range(2)] = 10
    seed: Annotated[int, Range(0)] = 1
    arm: str = ""
    repeats: Annotated[int, Range(1)] = 1
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many points are trained."""
        if self.sampler == "grid":
            size = math.prod(len(parameter.points()) for parameter in self.space())
            return min(self.trials or size, size)
        return self.trials or 20

    def space(self) -> list[Parameter]:
        """The keys that are varied, in the order of their names.

        Raises:
            ScenarioError: a range or a list is none.
        """
        found = dict(_flat(self.parameters, ""))
        return [_parameter(key, found[key]) for key in sorted(found)]

    def check(self, key: str) -> None:
        """Raise `ScenarioError` for what is wrong below `key`, whatever the scenario is."""
        space = self.space()
        if not space:
            remedy = "name keys, such as training.learning_rate = [0.02, 0.05]"
            raise ScenarioError(f"{key}.parameters", "nothing is varied", remedy)
        for parameter in space:
            if not any(_below(parameter.key, table) for table in _VARIED):
                raise ScenarioError(
                    parameter.key,
                    "is not varied by a sweep",
                    f"vary keys of {', '.join(_VARIED)}",
                )
            if self.sampler == "grid" and not parameter.points():
                raise ScenarioError(
                    parameter.key,
                    "has no step, and a grid needs one",
                    "add step, list values, or choose sweep.sampler = 'random'",
                )
        size = math.prod(len(parameter.points()) for parameter in space)
        if self.sampler == "grid" and size > _MAX_GRID:
            problem = f"a grid of {size:,} points"
            raise ScenarioError(
                f"{key}.parameters", problem, f"stay below {_MAX_GRID:,}, or sample at random"
            )
        if self.sampler == "nsga2" and self.count <= self.population:
            raise ScenarioError(
                f"{key}.trials",
                f"is {self.count}, and nsga2 draws the first {self.population} at random",
                "raise it, lower sweep.population, or choose sweep.sampler = 'random'",
            )

    def probes(self) -> Iterator[dict[str, Value]]:
        """Points at the ends of the space: all combinations, or each end by itself if too many."""
        ends = {parameter.key: parameter.ends() for parameter in self.space()}
        if math.prod(map(len, ends.values())) <= _MAX_CORNERS:
            for values in itertools.product(*ends.values()):
                yield dict(zip(ends, values, strict=True))
            return
        first = {key: values[0] for key, values in ends.items()}
        for key, values in ends.items():
            for value in values:
                yield {**first, key: value}


def load_spec(path: Path) -> SweepSpec:
    """Read the table ``[sweep]`` from a TOML file of its own.

    Raises:
        ScenarioError: the file cannot be read, or a key of it is unusable.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError("", f"{path} is not TOML ({error})", "correct that line") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ScenarioError("", f"cannot read {path} ({reason})", "name a TOML file") from error
    if other := next((name for name in table if name != "sweep"), None):
        problem = f"unknown key in {path}"
        raise ScenarioError(other, problem, "it holds the table [sweep] alone")
    return build(SweepSpec, table.get("sweep", {}), "sweep")


def applied(table: Mapping[str, Any], point: Mapping[str, Value]) -> dict[str, Any]:
    """A scenario's mapping with the values of a point in their places.

    Raises:
        ScenarioError: a key leads through something that is no table.
    """
    changed = dict(table)
    for key, value in point.items():
        *tables, last = key.split(SEPARATOR)
        inside = changed
        for place, name in enumerate(tables):
            below = inside.get(name, {})
            if not isinstance(below, Mapping):
                path = SEPARATOR.join(tables[: place + 1])
                raise ScenarioError(key, f"{path} is no table", "name a key of the scenario")
            inside[name] = dict(below)
            inside = inside[name]
        inside[last] = value
    return changed


def _below(key: str, table: str) -> bool:
    return key == table or key.startswith(table + SEPARATOR)


def _flat(table: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """Keys with dots: TOML takes those that are not quoted for tables in tables."""
    for name, value in table.items():
        key = f"{path}{SEPARATOR}{name}" if path else name
        if isinstance(value, Mapping) and not value.keys() & set(_RANGE):
            yield from _flat(value, key)
        else:
            yield key, value


def _parameter(key: str, given: Any) -> Parameter:
    if isinstance(given, Mapping):
        return _range(key, given)
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ScenarioError(key, f"is {given!r}, which is nothing to vary over", _LISTED)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in given)
    kinds = {type(value) for value in given}
    if not kinds <= {bool, int, float, str} or not (numbers or len(kinds) == 1):
        raise ScenarioError(
            key, f"lists {list(given)!r}", "list numbers, strings or booleans alone"
        )
    if numbers and not all(map(math.isfinite, given)):
        raise ScenarioError(key, f"lists {list(given)!r}", "list finite numbers")
    if len(set(given)) < len(given):
        raise ScenarioError(key, f"lists {list(given)!r}", "name each value once")
    return Parameter(key, tuple(given))


def _range(key: str, given: Mapping[str, Any]) -> Parameter:
    for name in given:
        if name not in _RANGE:
            raise ScenarioError(f"{key}.{name}", "unknown key", f"keys: {', '.join(_RANGE)}")
    for name in ("low", "high", "step"):
        value = given.get(name, None if name != "step" else 1)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            found = "is missing" if name not in given else f"is {value!r}"
            raise ScenarioError(f"{key}.{name}", found, "it must be a number")
    if not isinstance(given.get("log", False), bool):
        raise ScenarioError(f"{key}.log", f"is {given['log']!r}", "it is true or false")
    low, high, step = given["low"], given["high"], given.get("step")
    log = given.get("log", False)
    if low >= high:
        raise ScenarioError(key, f"reaches from {low} to {high}", "low must be below high")
    if log and (low <= 0 or step is not None):
        problem = "has a step" if step is not None else f"begins at {low}"
        raise ScenarioError(key, f"is logarithmic and {problem}", "leave out log, or that")
    if step is not None and not 0 < step <= high - low:
        raise ScenarioError(f"{key}.step", f"is {step}", "it must be above 0 and within the range")
    if isinstance(step, float) and isinstance(low, int) and isinstance(high, int):
        low, high = float(low), float(high)
    return Parameter(key, (), low, high, step, log)
