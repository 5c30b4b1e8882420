"""What is coded when both sides hold an earlier tensor: wrapping differences, in integers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["difference", "restore"]


def difference(
    values: NDArray[np.generic], held: NDArray[np.generic] | None
) -> NDArray[np.generic]:
    """Integers: ``values - held`` modulo their width. Floats: the values (the codec subtracts).

    Args:
        values: any shape.
        held: same shape and dtype, or None where nothing is known.
    """
    if held is None or values.dtype.kind not in "iu":
        return values
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    return np.asarray(np.subtract(values.view(unsigned), held.view(unsigned))).view(values.dtype)


def restore(coded: NDArray[np.generic], held: NDArray[np.generic] | None) -> NDArray[np.generic]:
    """Inverse of `difference`."""
    if held is None or coded.dtype.kind not in "iu":
        return coded
    unsigned = np.dtype(f"u{coded.dtype.itemsize}")
    return np.asarray(np.add(coded.view(unsigned), held.view(unsigned))).view(coded.dtype)
