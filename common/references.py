"""Objects named in run configs and scenario files: ``package.module:attribute``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

__all__ = ["load_callable"]


def load_callable(reference: str) -> Callable[..., Any]:
    """Import what ``package.module:attribute`` names; dots in the attribute are followed.

    Raises:
        ValueError: the reference has another form, or names nothing callable.
    """
    module_name, colon, attribute = reference.partition(":")
    if not (colon and module_name and attribute):
        raise ValueError(f"{reference!r} is not of the form package.module:function")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # something that the module itself needs
        raise ValueError(f"there is no module {module_name!r} (of {reference!r})") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"module {module_name!r} has no {attribute!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{reference!r} is no function or class")
    return found  # type: ignore[no-any-return]
