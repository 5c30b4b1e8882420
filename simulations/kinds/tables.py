"""Tables of a scenario file as dataclasses; every mistake names its key and the remedy."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

__all__ = ["NAME", "Range", "ScenarioError", "as_table", "build", "choice"]

_T = TypeVar("_T")

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""What may name a file or folder."""


class ScenarioError(ValueError):
    """A scenario cannot be read, or a key of it cannot be used.

    Args:
        key: the key in question, with dots (``clients.count``); empty for the file as a whole.
        problem: what is wrong.
        remedy: what to do about it.
    """

    def __init__(self, key: str, problem: str, remedy: str) -> None:
        super().__init__(f"{key + ': ' if key else ''}{problem}; {remedy}")
        self.key, self.problem, self.remedy = key, problem, remedy


class Range:
    """Of a number, such as ``Annotated[int, Range(1)]``.

    Args:
        least: the smallest value.
        most: the largest one; None for any.
        above: whether the value must be above `least`.
    """

    def __init__(self, least: float, most: float | None = None, *, above: bool = False) -> None:
        self._least, self._most, self._above = least, most, above

    def check(self, key: str, value: float) -> None:
        """Raise `ScenarioError` where `value` is outside."""
        if value <= self._least if self._above else value < self._least:
            wanted = "above" if self._above else "at least"
            raise ScenarioError(key, f"is {value}", f"it must be {wanted} {self._least}")
        if self._most is not None and value > self._most:
            raise ScenarioError(key, f"is {value}", f"it must be at most {self._most}")


def choice(key: str, value: object, allowed: Collection[str]) -> None:
    """Raise `ScenarioError` unless `value` is one of those allowed."""
    if value not in allowed:
        offered = ", ".join(sorted(allowed))
        remedy = f"choose one of {offered}" if offered else "there is none to choose: add one"
        raise ScenarioError(key, f"is {value!r}", remedy)


def as_table(value: object, key: str) -> dict[str, Any]:
    """A copy of a table; `ScenarioError` where it is none."""
    if not isinstance(value, Mapping):
        raise ScenarioError(key, f"is {value!r}", f"it is a table: write [{key}]")
    return dict(value)


def build(cls: type[_T], value: object, path: str, *, chosen_by: str = "") -> _T:
    """An instance of a dataclass from a table of its fields.

    Args:
        cls: whose fields are the keys; a `Range` may be among its annotations.
        value: the table, without the key that chose `cls`.
        path: key of the table, with dots; empty for the whole file.
        chosen_by: the key and value that chose `cls`, for messages.

    Raises:
        ScenarioError: a key is unknown, or its value of another type or out of range.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    made: dict[str, Any] = {}
    for name, given in as_table(value, path or "scenario").items():
        key = f"{path}.{name}" if path else name
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            keys = ", ".join(sorted([*known, *chosen_by.split(" = ")[:1]])).removeprefix(", ")
            raise ScenarioError(
                key,
                f"means nothing where {chosen_by}" if chosen_by else "unknown key",
                f"did you mean {near[0]!r}?" if near else f"keys: {keys}",
            )
        hint = hints[name]
        limits = getattr(hint, "__metadata__", ())  # of Annotated
        made[name] = _value(hint.__origin__ if limits else hint, given, key)
        for limit in limits:
            limit.check(key, made[name])
    return cls(**made)


def _value(hint: Any, given: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, given, key)
    if hint in (float, float | None):
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise ScenarioError(key, f"is {given!r}", "it must be a number")
        if not math.isfinite(given):
            raise ScenarioError(key, f"is {given!r}", "it must be finite")
        return float(given)
    if hint is int:
        if isinstance(given, bool) or not isinstance(given, int):
            raise ScenarioError(key, f"is {given!r}", "it must be a whole number")
        return given
    if hint is str:
        if not isinstance(given, str):
            raise ScenarioError(key, f"is {given!r}", "it must be a string in quotes")
        return given
    if typing.get_origin(hint) is typing.Literal:
        choice(key, given, typing.get_args(hint))
        return given
    if hint == tuple[str, ...]:
        if not isinstance(given, list | tuple) or not all(isinstance(v, str) for v in given):
            raise ScenarioError(key, f"is {given!r}", "it must be a list of strings")
        return tuple(given)
    return as_table(given, key)
