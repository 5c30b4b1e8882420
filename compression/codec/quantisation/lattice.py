"""Floating-point values to lattice integers and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..errors import NonFiniteError, QuantiseError

__all__ = ["dequantise", "largest_magnitude", "quantise", "steps_of"]


def quantise(
    values: NDArray[Any], step: float, *, dead_zone: float = 0.5, name: str = ""
) -> NDArray[np.int32]:
    """Return ``sign(x) * floor(|x| / step + 1 - dead_zone)``, a uniform scalar quantiser.

    Args:
        values: floating-point array of any shape (float16, float32 or float64).
        step: lattice step, in the unit of ``values``; finite and above zero.
        dead_zone: fraction of a step, in (0, 1], below which a magnitude is rounded down.
            0.5 rounds to nearest (halves away from zero); larger values drop more.
        name: what the array is called in an error message.

    Returns:
        int32 array of the same shape.

    Raises:
        NonFiniteError: ``values`` holds NaN or an infinity.
        QuantiseError: ``step`` or ``dead_zone`` is out of range, ``values`` is not
            floating-point, or a result does not fit in int32.

    >>> quantise(np.array([-0.26, 0.24, 0.9], np.float32), 0.5).tolist()
    [-1, 0, 2]
    """
    if not 0 < dead_zone <= 1:
        raise QuantiseError(f"the dead zone for {label(name)} is {dead_zone!r}, outside (0, 1]")
    array = np.asarray(values)
    wide = steps_of(array, step, margin=1 - dead_zone, name=name)
    wide += 1 - dead_zone
    result = np.floor(wide, out=wide).astype(np.int32)
    return np.asarray(np.where(array < 0, -result, result), np.int32)


def label(name: str) -> str:
    """What an error message calls a tensor."""
    return f"tensor {name!r}" if name else "the tensor"


def largest_magnitude(array: NDArray[Any], name: str = "") -> float:
    """Largest absolute value of a floating-point array, 0.0 where it is empty.

    Raises:
        NonFiniteError: it holds NaN or an infinity.
        QuantiseError: it is not float16, float32 or float64.
    """
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise QuantiseError(
            f"{label(name)} has dtype {array.dtype}; quantise takes float16, float32 or float64"
        )
    if not array.size:
        return 0.0
    top = max(float(array.max()), -float(array.min()))
    if not math.isfinite(top):
        raise NonFiniteError(
            f"{label(name)} holds NaN or an infinity; check the training step that produced it "
            "(learning rate, loss scaling) before quantising"
        )
    return top


def steps_of(
    array: NDArray[Any], step: float, *, margin: float, name: str = ""
) -> NDArray[np.float64]:
    """Return ``|x| / step`` of every element, checked: with ``margin`` added it fits int32.

    Raises:
        NonFiniteError, QuantiseError: as :func:`quantise`.
    """
    top = largest_magnitude(array, name)
    if not (math.isfinite(step) and step > 0):
        raise QuantiseError(
            f"the step for {label(name)} is {step!r}; it must be finite and above zero"
        )
    if top / step + margin >= 2.0**31:
        raise QuantiseError(
            f"{label(name)} reaches {top:g}, beyond the int32 range at step {step:g}; "
            "use a larger step"
        )
    wide = np.asarray(np.abs(array, dtype=np.float64))
    wide /= step
    return wide


def dequantise(q: NDArray[Any], step: float, dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Return ``float32(q) * float32(step)``, one IEEE multiplication, cast to ``dtype``.

    A negative zero never appears in the result. ``q`` beyond 2**24 in magnitude is rounded to
    the nearest float32 first, on every platform alike.

    Args:
        q: integer array of any shape.
        step: lattice step; finite and above zero.
        dtype: floating-point dtype of the result.

    Raises:
        QuantiseError: ``q`` is not integer, or ``step`` is out of range.

    >>> dequantise(np.array([-2, 0, 3]), 0.5).tolist()
    [-1.0, 0.0, 1.5]
    """
    array = np.asarray(q)
    if array.dtype.kind not in "iu":
        raise QuantiseError(f"dequantise takes integers, not {array.dtype}")
    if not (math.isfinite(step) and step > 0):
        raise QuantiseError(f"the step is {step!r}; it must be finite and above zero")
    with np.errstate(over="ignore", under="ignore"):
        dense = np.asarray(array.astype(np.float32) * np.float32(step), np.float32)
        dense = dense.astype(dtype, copy=False)
    # Adding zero turns -0.0 (a negative product that underflowed) into +0.0.
    return np.asarray(dense + dense.dtype.type(0))
