"""Floating-point values to lattice integers and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .errors import NonFiniteError, QuantiseError

__all__ = ["dequantise", "quantise"]


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
    label = f"tensor {name!r}" if name else "the tensor"
    array = np.asarray(values)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise QuantiseError(
            f"{label} has dtype {array.dtype}; quantise takes float16, float32 or float64"
        )
    if not (math.isfinite(step) and step > 0):
        raise QuantiseError(f"the step for {label} is {step!r}; it must be finite and above zero")
    if not 0 < dead_zone <= 1:
        raise QuantiseError(f"the dead zone for {label} is {dead_zone!r}; it must lie in (0, 1]")
    if array.size == 0:
        return np.zeros(array.shape, np.int32)
    wide = np.asarray(np.abs(array, dtype=np.float64))
    top = float(wide.max())
    if not math.isfinite(top):
        raise NonFiniteError(
            f"{label} holds NaN or an infinity; check the training step that produced it "
            "(learning rate, loss scaling) before quantising"
        )
    if top / step + 1 - dead_zone >= 2.0**31:
        raise QuantiseError(
            f"{label} reaches {top:g}, beyond the int32 range at step {step:g}; use a larger step"
        )
    wide /= step
    wide += 1 - dead_zone
    result = np.floor(wide, out=wide).astype(np.int32)
    return np.asarray(np.where(array < 0, -result, result), np.int32)


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
