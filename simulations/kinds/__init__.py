"""Registries in which adding a kind of something is adding a file.

What an arm, a data source, a partition or a task is, is a class in a module of its own, in the
packages `arms`, `data`, `partitions` and `tasks`.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from prunecast.common.references import load_callable
from prunecast.simulations.kinds.tables import ScenarioError, as_table, build, choice

__all__ = ["DataError", "Kind", "Registry"]

_HOME = "prunecast.simulations."


class DataError(RuntimeError):
    """A data set cannot be loaded, split or partitioned, or does not suit the task."""


@dataclass(frozen=True)
class Kind:
    """A kind of something; the fields of a subclass are the keys of its table."""

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
        self._base, self._default, self._word = base, default, word

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
        classes = (value for value in vars(module).values() if isinstance(value, type))
        [mine] = [
            c for c in classes if c.__module__ == module.__name__ and issubclass(c, self._base)
        ]
        return mine

    def make(self, name: str = "", /, **keys: Any) -> K:
        """A thing of a kind, the default one without a name; keys are not checked."""
        return self.find(name or self._default)(**keys)

    def read(self, value: object, path: str) -> K:
        """A thing from its table in a scenario.

        Raises:
            ScenarioError: the kind or a key is unknown, or a value is unusable.
        """
        table = as_table(value, path)
        name = table.pop(self._word, self._default)
        cls = self.find(name, f"{path}.{self._word}")
        return build(cls, table, path, chosen_by=f"{self._word} = {name!r}")

    def write(self, thing: K) -> dict[str, Any]:
        """The table of a thing, every default filled in; `read` gives an equal one."""
        return {self._word: thing.kind(), **dataclasses.asdict(thing)}
