"""The arithmetic that sender and receiver must do alike, in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import NonFiniteError
from .layout import Arrays

__all__ = ["added", "scaled", "step_of"]

_TOP = np.float32(np.finfo(np.float32).max)


def added(tensors: Arrays, buffer: Mapping[str, NDArray[np.float32]], factor: float = 1) -> Arrays:
    """``tensors + factor * buffer``.

    Raises:
        NonFiniteError: a sum leaves float32.
    """
    sums: Arrays = {}
    for name, tensor in tensors.items():
        with np.errstate(over="ignore", under="ignore"):
            held = buffer[name] if factor == 1 else np.float32(factor) * buffer[name]
            sums[name] = np.asarray(tensor + held, np.float32)
        if not np.isfinite(sums[name]).all():
            raise NonFiniteError(
                f"tensor {name!r} and what was kept of it add up beyond float32; start with init()"
            )
    return sums


def scaled(integers: NDArray[Any], scales: NDArray[np.float32] | np.float32) -> NDArray[np.float32]:
    """``float32(integers) * scales``, one IEEE multiplication, clamped to finite numbers."""
    product = np.array(integers, np.float32)
    with np.errstate(over="ignore", under="ignore"):
        product *= scales
    np.clip(product, -_TOP, _TOP, out=product)
    product += np.float32(0)  # -0.0 becomes +0.0
    return product


def step_of(most: NDArray[Any], top: int) -> NDArray[np.float32]:
    """``most / top`` as float32, rounded up, so that no ``|x| / step`` passes `top`.

    >>> float(step_of(np.float64(254), 127))
    2.0
    """
    most = np.asarray(most, np.float64)
    step = (most / top).astype(np.float32)
    low = step.astype(np.float64) * top < most
    return np.asarray(np.where(low, np.nextafter(step, _TOP), step), np.float32)
