"""Knobs of a policy as people set them: their names, types and units, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from prunecast.common.text import bytes_of
from prunecast.compression.pruning.statistics import GROWTH, VOTES
from prunecast.compression.schemes.interface import Option
from prunecast.server.federation.errors import PolicyError

__all__ = [
    "BUDGETS",
    "GROWN_BY",
    "OTHERS",
    "PREFIX",
    "SIZES",
    "WHOLE",
    "check_type",
    "coerced",
    "default_of",
    "in_bytes",
    "key_of",
    "refused",
]

PREFIX = "prunecast."
"""Of every knob in Flower's run config."""

BUDGETS = ("budget_round", "budget_node", "budget_run")
"""Knobs that bound the bytes of messages."""

SIZES = ("history_bytes", *BUDGETS)
"""Knobs in bytes, which may be stated as text: "2 MB"."""

WHOLE = "whole"
"""What nodes are called together that state no width class: they train all of the model."""

OTHERS = "others"
"""What nodes of no capability class are called together."""

GROWN_BY = {"rigl": GROWTH, "feddst": VOTES}
"""Ways in which masks move between pruning events, and the statistic that each asks nodes for."""

_ROUNDS = ("channels_at",)  # lists of numbers; all others are of name patterns


def key_of(name: str) -> str:
    """A field as the run config calls it; a scenario's policy table has the field's own name."""
    return PREFIX + name.replace("_", "-")


def refused(name: str, value: Any, remedy: str) -> PolicyError:
    """The error that names a knob, its value and the remedy."""
    return PolicyError(f"{key_of(name)} (policy {name}) = {value!r}: {remedy}")


def default_of(knob: dataclasses.Field[Any]) -> Any:
    """What a knob is where nobody sets it."""
    made = knob.default_factory
    return knob.default if made is dataclasses.MISSING else made()


def in_bytes(name: str, value: Any) -> Any:
    """A knob in bytes as a number, where it is a text; other types are left to the checks.

    Raises:
        PolicyError: the text states no bytes.
    """
    if not isinstance(value, str):
        return value
    try:
        return bytes_of(value) if value.strip() else 0
    except ValueError as error:
        raise refused(name, value, str(error)) from error


def check_type(name: str, value: Any, default: Any) -> None:
    """Refuse a value of another type than the knob's.

    Raises:
        PolicyError: it is.
    """
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    wanted = type(default)
    if name in _ROUNDS:
        if not isinstance(value, tuple) or not all(type(part) is int for part in value):
            raise refused(name, value, "give a list of rounds")
    elif wanted is tuple:
        if not isinstance(value, tuple) or not all(isinstance(part, str) for part in value):
            raise refused(name, value, "give a list of name patterns")
    elif wanted is dict:
        if not isinstance(value, Mapping):
            raise refused(name, value, "give options by name")
    elif wanted is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise refused(name, value, "give a number (a float)")
    elif not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise refused(name, value, f"give {kinds[wanted]} (of type {wanted.__name__})")


def coerced(key: str, value: Any, default: Any) -> Any:
    """A value of the run config as the field's type; other types are left to the checks."""
    if key.removeprefix(PREFIX).replace("-", "_") in _ROUNDS:
        parts = [value] if isinstance(value, int) else str(value).split(",")
        try:
            return tuple(int(part) for part in parts if str(part).strip())
        except ValueError:
            raise PolicyError(f"{key} = {value!r}: give rounds, such as '8' or '6, 12'") from None
    if isinstance(default, tuple | dict):
        what = "name patterns" if isinstance(default, tuple) else "options (name=value)"
        if not isinstance(value, str):
            raise PolicyError(f"{key} = {value!r}: give {what} as one comma-separated string")
        parts = [part.strip() for part in value.split(",") if part.strip()]
        return tuple(parts) if isinstance(default, tuple) else dict(_option(key, p) for p in parts)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _option(key: str, text: str) -> tuple[str, Option]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not (name and equals and value):
        raise PolicyError(f"{key}: {text!r} is not of the form name=value")
    if value in ("true", "false"):
        return name, value == "true"
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value
