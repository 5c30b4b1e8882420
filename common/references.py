"""Values of run configs, and objects named there and in scenario files as ``module:attribute``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

__all__ = ["configured_callable", "load_callable", "typed"]

T = TypeVar("T")


def typed(key: str, value: object, kind: type[T], error: type[Exception]) -> T:
    """A value of Flower's run config, which must be of a type; a whole number serves as a float.

    Raises:
        error: it is of another type; names the key.
    """
    if kind is float and type(value) is int:
        return float(value)  # type: ignore[return-value]
    if type(value) is not kind:
        raise error(f"{key} = {value!r} in the run config is no {kind.__name__}: correct it")
    return value


def configured_callable(
    config: Mapping[str, Any], key: str, error: type[Exception]
) -> Callable[..., Any]:
    """What a key of Flower's run config names, see `load_callable`.

    Raises:
        error: the key is missing, or names nothing callable.
    """
    reference = config.get(key)
    if not isinstance(reference, str) or not reference:
        raise error(f'the run config lacks {key!r}: set {key} = "package.module:function"')
    try:
        return load_callable(reference)
    except ValueError as reason:
        raise error(f"{key} in the run config: {reason}") from reason


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
