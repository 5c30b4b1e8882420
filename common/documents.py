"""JSON documents of our own files: read whole, and turned into dataclasses by their annotations."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import fields, is_dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["from_document", "read_document", "strict_json"]

T = TypeVar("T")


def read_document(path: Path, *, most_bytes: int = 2**24) -> Any:
    """The JSON value in a file.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: it is longer than `most_bytes`, nested too deeply, or no JSON.
    """
    if path.stat().st_size > most_bytes:
        raise ValueError(f"it is longer than {most_bytes} bytes")
    try:
        return strict_json(path.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def strict_json(data: bytes) -> Any:
    """The value of a JSON document in which no two readers can see different values.

    Raises:
        ValueError: no JSON, a key that is given twice, or NaN and infinities, which are none.
        RecursionError: it is nested too deeply.

    >>> strict_json(b'{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the key 'a' is given twice
    """
    return json.loads(data, object_pairs_hook=_once, parse_constant=_no_number)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {key[:80]!r} is given twice")
        made[key] = value
    return made


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def from_document(kind: type[T], value: object) -> T:
    """A value of `kind` out of what `json.loads` gave.

    `kind` is a dataclass whose every field stands in the document (others are ignored), or what
    such a field may be: ``str``, ``int``, ``float``, ``bool``, a Literal, ``X | None``,
    ``tuple[X, ...]``, ``tuple[X, Y]``, ``dict[X, Y]`` with keys made from strings.

    Raises:
        ValueError: it is another value, a field is missing, or the dataclass refuses it.

    >>> from_document(dict[int, tuple[float, ...]], {"3": [1, 2.5]})
    {3: (1.0, 2.5)}
    """
    return _made(kind, value)  # type: ignore[no-any-return]


def _made(kind: Any, value: Any) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        given = next(one for one in inner if one is not type(None))
        return None if value is None else _made(given, value)
    if origin is Literal and value in inner:
        return value
    if origin is tuple and isinstance(value, list):
        kinds = repeat(inner[0], len(value)) if inner[-1] is Ellipsis else inner
        return tuple(_made(one, item) for one, item in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {inner[0](key): _made(inner[1], item) for key, item in value.items()}
    if is_dataclass(kind) and isinstance(value, dict):
        hints, names = get_type_hints(kind), [field.name for field in fields(kind)]
        if missing := [name for name in names if name not in value]:
            raise ValueError(f"there is no {missing[0]}")
        return kind(**{name: _made(hints[name], value[name]) for name in names})  # type: ignore[operator]
    if type(value) is kind:
        return value
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    raise ValueError(f"{str(value)[:80]!r} stands in the place of {kind}")
