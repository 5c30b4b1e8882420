"""Public faces: packages that name what a user imports, and import it when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["face"]


def face(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package that imports its names lazily (PEP 562).

    So that type checkers see the names too, the package imports them under ``TYPE_CHECKING`` and
    lists them in ``__all__``::

        __getattr__, __dir__ = face(__name__, {"Policy": "prunecast.server.federation.policy"})

    Args:
        package: its ``__name__``.
        homes: public name to the module that defines it.
    """

    def getattribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(import_module(homes[name]), name)
        setattr(sys.modules[package], name, found)  # asked for once
        return found

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return getattribute, names
