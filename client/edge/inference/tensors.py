"""Tensors of the Open Inference Protocol: datatypes, JSON values, binary values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.client.edge.inference.errors import RequestRefused

__all__ = ["checked_shape", "datatype_of", "dtype_of", "from_binary", "from_json", "to_binary"]

_MOST_DIMENSIONS = 16
_MOST_VALUES = 1 << 40
_DATATYPES = {
    "BOOL": "bool",
    **{f"{u}INT{bits}": f"{u.lower()}int{bits}" for u in ("", "U") for bits in (8, 16, 32, 64)},
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}
_NAMES = {dtype: name for name, dtype in _DATATYPES.items()}
_JSON_TYPES: dict[str, set[type]] = {"b": {bool}, "i": {int}, "u": {int}, "f": {int, float}}


def datatype_of(dtype: str) -> str:
    """Name in the protocol of a numpy dtype that a model may have.

    >>> datatype_of("float32")
    'FP32'
    """
    return _NAMES[dtype]


def dtype_of(tensor: str, datatype: object) -> np.dtype[Any]:
    """Little-endian numpy dtype of a datatype of the protocol.

    Raises:
        RequestRefused: 400, there is no such datatype, or none that models here have.
    """
    name = _DATATYPES.get(datatype) if isinstance(datatype, str) else None
    if name is None:
        raise RequestRefused(
            400,
            f"input {tensor!r} has the datatype {_short(datatype)}: use {', '.join(_DATATYPES)}",
        )
    return np.dtype(name).newbyteorder("<")


def checked_shape(tensor: str, shape: object) -> tuple[int, ...]:
    """A shape from JSON.

    Raises:
        RequestRefused: 400, not a list of at most 16 sizes, or more than 2⁴⁰ values.
    """
    if (
        not isinstance(shape, list)
        or len(shape) > _MOST_DIMENSIONS
        or not all(type(n) is int and 0 <= n <= _MOST_VALUES for n in shape)
        or math.prod(n or 1 for n in shape) > _MOST_VALUES  # numpy counts so, even around a zero
    ):
        raise RequestRefused(
            400,
            f"input {tensor!r} has the shape {_short(shape)}: give a list of at most "
            f"{_MOST_DIMENSIONS} sizes",
        )
    return tuple(shape)


def from_json(
    tensor: str, dtype: np.dtype[Any], shape: tuple[int, ...], data: object
) -> NDArray[np.generic]:
    """An array from JSON values, flat in row-major order or nested as `shape` says.

    Raises:
        RequestRefused: 400, the values do not fit shape or datatype.
    """
    if not isinstance(data, list):
        raise RequestRefused(400, f"input {tensor!r}: data must be a list, or binary data")
    values = _flat(tensor, shape, data)
    if len(values) != math.prod(shape):
        raise RequestRefused(
            400, f"input {tensor!r} has {len(values)} values; its shape needs {math.prod(shape)}"
        )
    wrong = set(map(type, values)) - _JSON_TYPES[dtype.kind]
    if wrong:
        kinds = ", ".join(sorted(kind.__name__ for kind in wrong))
        raise RequestRefused(400, f"input {tensor!r} of {dtype.name} holds values of type {kinds}")
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, dtype=dtype.newbyteorder("="))
    except (OverflowError, ValueError):
        raise RequestRefused(400, f"input {tensor!r}: a value does not fit {dtype.name}") from None
    infinite = int(np.isinf(array).sum()) if dtype.kind == "f" else 0
    if infinite and infinite != sum(map(math.isinf, values)):
        raise RequestRefused(400, f"input {tensor!r}: a value does not fit {dtype.name}")
    return array.reshape(shape)


def from_binary(
    tensor: str, dtype: np.dtype[Any], shape: tuple[int, ...], data: memoryview
) -> NDArray[np.generic]:
    """An array from bytes: little-endian, row-major, nothing between the elements.

    Raises:
        RequestRefused: 400, the bytes do not fit shape or datatype.
    """
    needed = math.prod(shape) * dtype.itemsize
    if len(data) != needed:
        raise RequestRefused(
            400, f"input {tensor!r} has {len(data)} bytes of data; its shape needs {needed}"
        )
    if dtype.kind == "b" and (np.frombuffer(data, np.uint8) > 1).any():
        raise RequestRefused(400, f"input {tensor!r}: a BOOL is a byte of 0 or 1")
    # a copy: inside the body the values lie where the JSON happens to end, which may be unaligned
    return np.frombuffer(data, dtype).astype(dtype.newbyteorder("=")).reshape(shape)


def to_binary(array: NDArray[np.generic]) -> bytes:
    """The bytes of an array as the protocol wants them."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _flat(tensor: str, shape: Sequence[int], data: list[Any]) -> list[Any]:
    """`data` without its nesting, which must be that of `shape` if there is any."""
    values = data
    if not any(type(item) is list for item in data):
        return values
    for axis, size in enumerate(shape[1:], start=1):
        if not all(type(item) is list and len(item) == size for item in values):
            break
        if axis == 1 and len(values) != shape[0]:
            break
        values = list(chain.from_iterable(values))
    else:
        return values
    raise RequestRefused(400, f"input {tensor!r}: the nesting of its data is not that of its shape")


def _short(value: object) -> str:
    return repr(value)[:60]
