"""Registries in which adding a kind of something is adding a file, and the tables that they read.

What an arm, a data source, a partition or a task is, is a class in a module of its own, in the
packages `arms`, `data`, `partitions` and `tasks`. Its fields are the keys of its table in the
scenario file; every mistake in a table names its key and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from prunecast.common.references import load_callable

__all__ = [
    "NAME",
    "DataError",
    "Kind",
    "Matches",
    "Range",
    "Registry",
    "ScenarioError",
    "build",
    "function_named",
]

_HOME = "prunecast.simulations."

NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
"""What may name a file or folder."""


class DataError(RuntimeError):
    """A data set cannot be loaded, split or partitioned, or does not suit the task."""


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


# -- what a value must be -------------------------------------------------------------------------


class Range:
    """Of a number, such as ``Annotated[int, Range(1)]``.

    Args:
        least: the smallest value.
        most: the largest one; None for any.
        above: whether the value must be above `least`.
    """

    def __init__(self, least: float, most: float | None = None, *, above: bool = False) -> None:
        self._least, self._most, self._above = least, most, above

    def check(self, key: str, value: float | str) -> None:
        """Raise `ScenarioError` where `value` is outside."""
        if isinstance(value, str):  # a word in place of a number
            return
        if value <= self._least if self._above else value < self._least:
            wanted = "above" if self._above else "at least"
            raise ScenarioError(key, f"is {value}", f"it must be {wanted} {self._least}")
        if self._most is not None and value > self._most:
            raise ScenarioError(key, f"is {value}", f"it must be at most {self._most}")


@dataclass(frozen=True)
class Matches:
    """A regular expression that a string matches as a whole, and what to do where it does not."""

    pattern: str
    remedy: str

    def check(self, key: str, value: str) -> None:
        """Raise `ScenarioError` where `value` does not match."""
        if not re.fullmatch(self.pattern, value):
            raise ScenarioError(key, f"is {value!r}", self.remedy)


def choice(key: str, value: object, allowed: Collection[str]) -> None:
    """Raise `ScenarioError` unless `value` is one of those allowed."""
    if value not in allowed:
        offered = ", ".join(sorted(allowed))
        remedy = f"choose one of {offered}" if offered else "there is none to choose: add one"
        raise ScenarioError(key, f"is {value!r}", remedy)


# -- tables ---------------------------------------------------------------------------------------


def function_named(reference: str, key: str) -> Callable[..., Any]:
    """The function that a key names.

    Raises:
        ScenarioError: it cannot be imported.
    """
    try:
        return load_callable(reference)
    except ValueError as error:
        raise ScenarioError(
            key,
            str(error),
            "name a function as package.module:function, installed or in the current folder",
        ) from error


def _table(value: object, key: str) -> dict[str, Any]:
    """A copy of a table; `ScenarioError` where it is none."""
    if not isinstance(value, Mapping):
        raise ScenarioError(key, f"is {value!r}", f"it is a table: write [{key}]")
    return dict(value)


_T = TypeVar("_T")


def build(cls: type[_T], value: object, path: str, *, chosen_by: str = "") -> _T:
    """An instance of a dataclass from a table of its fields.

    Args:
        cls: whose fields are the keys; `Range` and `Matches` may be among its annotations.
        value: the table, without the key that chose `cls`.
        path: key of the table, with dots; empty for the whole file.
        chosen_by: the key and value that chose `cls`, for messages.

    Raises:
        ScenarioError: a key is unknown, or its value of another type or out of range.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    made: dict[str, Any] = {}
    for name, given in _table(value, path or "scenario").items():
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


_PLAIN: dict[Any, tuple[Any, str]] = {
    float: (int | float, "it must be a number"),
    int: (int, "it must be a whole number"),
    str: (str, "it must be a string in quotes"),
}


def _value(hint: Any, given: Any, key: str) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint, *others = typing.get_args(hint)  # "or None" is for keys that are not there
        words = [word for other in others for word in typing.get_args(other)]
        if isinstance(given, str) and words:
            if given not in words:
                named = ", ".join(map(repr, words))
                remedy = f"{_PLAIN[hint][1]}, or {named}"
                raise ScenarioError(key, f"is {given!r}", remedy)
            return given
    if hint in _PLAIN:
        accepted, remedy = _PLAIN[hint]
        if isinstance(given, bool) or not isinstance(given, accepted):
            raise ScenarioError(key, f"is {given!r}", remedy)
        if isinstance(given, float) and not math.isfinite(given):
            raise ScenarioError(key, f"is {given!r}", "it must be finite")
        return hint(given)
    if isinstance(hint, type) and issubclass(hint, Kind):
        return hint.registry.read(given, key)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, given, key)
    if typing.get_origin(hint) is typing.Literal:
        choice(key, given, typing.get_args(hint))
        return given
    if hint == tuple[str, ...]:
        if not isinstance(given, list | tuple) or not all(isinstance(v, str) for v in given):
            raise ScenarioError(key, f"is {given!r}", "it must be a list of strings")
        return tuple(given)
    of, table = typing.get_args(hint)[1], _table(given, key)
    if of is Any:
        return table
    return {name: _value(of, entry, f"{key}.{name}") for name, entry in table.items()}


def written(value: Any) -> Any:
    """The table of a dataclass, as `build` reads it; every default filled in, without None."""
    if isinstance(value, Mapping):
        return {key: written(entry) for key, entry in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    table = {value.registry.word: value.kind()} if isinstance(value, Kind) else {}
    given = {key: entry for key, entry in vars(value).items() if entry is not None}
    return {**table, **written(given)}


# -- kinds ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of something; the fields of a subclass are the keys of its table.

    Attributes:
        registry: where kinds of the same thing are found.
        unused: keys that mean nothing to this kind, but may be there as empty strings.
    """

    registry: ClassVar[Registry[Any]]
    unused: ClassVar[Collection[str]] = ()

    @classmethod
    def kind(cls) -> str:
        """What a scenario calls it: its module's name, or ``package.module:Class`` elsewhere."""
        if cls.__module__.startswith(_HOME):
            return cls.__module__.rpartition(".")[2].replace("_", "-")
        return f"{cls.__module__}:{cls.__qualname__}"


K = TypeVar("K", bound=Kind)


class Registry(Generic[K]):
    """The kinds of one thing: the modules of a package, imported when a scenario names them.

    A module ``low_rank.py`` beside the base class is the kind "low-rank"; it defines one subclass.
    ``package.module:Class`` names a subclass of the user's own.

    Args:
        base: the base class, defined in the ``__init__.py`` of the package.
        default: kind of a table that names none.
        word: the key that names the kind.
    """

    def __init__(self, base: type[K], *, default: str, word: str = "kind") -> None:
        self._base, self._default, self.word = base, default, word
        base.registry = self

    def names(self) -> list[str]:
        """The kinds that the package holds, sorted."""
        modules = pkgutil.iter_modules(importlib.import_module(self._base.__module__).__path__)
        return sorted(module.name.replace("_", "-") for module in modules)

    def find(self, name: str, key: str = "") -> type[K]:
        """The class of a kind.

        Args:
            name: a module of the package, or ``package.module:Class``.
            key: of the scenario, for messages.

        Raises:
            ScenarioError: there is no such kind.
        """
        if isinstance(name, str) and ":" in name:
            try:
                found = load_callable(name)
            except ValueError as error:
                raise ScenarioError(key, str(error), "name a class that can be imported") from error
            if not (isinstance(found, type) and issubclass(found, self._base)):
                wanted = f"{self._base.__module__}.{self._base.__name__}"
                raise ScenarioError(key, f"{name} is no {self._base.__name__}", f"derive {wanted}")
            return found
        choice(key, name, self.names())
        module = importlib.import_module(f"{self._base.__module__}.{name.replace('-', '_')}")
        classes = [found for found in vars(module).values() if isinstance(found, type)]
        own = [c for c in classes if c.__module__ == module.__name__]
        [mine] = [c for c in own if issubclass(c, self._base)]
        return mine

    def make(self, name: str = "", /, **keys: Any) -> K:
        """A thing of a kind, the default one without a name; keys are not checked."""
        return self.find(name or self._default)(**keys)

    def read(self, value: object, path: str) -> K:
        """A thing from its table in a scenario.

        Raises:
            ScenarioError: the kind or a key is unknown, or a value is unusable.
        """
        table = _table(value, path)
        name = table.pop(self.word, self._default)
        cls = self.find(name, f"{path}.{self.word}")
        needed = {k: v for k, v in table.items() if v != "" or k not in cls.unused}
        return build(cls, needed, path, chosen_by=f"{self.word} = {name!r}")
