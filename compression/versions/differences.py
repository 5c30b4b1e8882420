"""What is coded when both sides hold an earlier tensor: wrapping differences, in integers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["cast", "difference", "restore"]


def cast(held: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A tensor in another dtype, the same on every machine; itself where it has that dtype.

    Floats become the nearest integer that the dtype has, and NaN becomes zero: an averaged counter
    says what comes next, and need not be exact.
    """
    if held.dtype == dtype:
        return held
    if dtype.kind not in "iu" or held.dtype.kind != "f":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return np.asarray(held.astype(dtype))
    info = np.iinfo(dtype)
    high = float(info.max)
    if int(high) > info.max:  # float64 does not have the end of 64 bits' range
        high = float(np.nextafter(high, 0.0))
    whole = np.rint(np.nan_to_num(held.astype(np.float64))).clip(float(info.min), high)
    return np.asarray(whole.astype(dtype))


def difference(
    values: NDArray[Any], held: NDArray[Any] | None, dtype: np.dtype[Any] | None = None
) -> NDArray[Any]:
    """Integers: ``values - held`` modulo their width. Floats: the values (the codec subtracts).

    Args:
        values: any shape.
        held: same shape, integers of any width for integers; None where nothing is known.
        dtype: of the result, for integers; by default that of `values`.
    """
    kind = np.dtype(dtype or values.dtype)
    if held is None or kind.kind not in "iu":
        return values.astype(kind, copy=False)
    # asarray: of scalars numpy makes scalars, and warns when these wrap
    return np.asarray(np.subtract(values, held, dtype=kind, casting="unsafe"))


def restore(coded: NDArray[Any], held: NDArray[Any] | None) -> NDArray[Any]:
    """Inverse of `difference`; writes into `coded` where that is possible."""
    if held is None or coded.dtype.kind not in "iu":
        return coded
    out = coded if coded.flags.writeable else np.empty_like(coded)
    return np.asarray(np.add(coded, held, out=out, casting="unsafe"))
