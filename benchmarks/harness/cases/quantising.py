"""Integers from floats: one step to a relative error, and the largest magnitudes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["largest", "to_error"]

Integers = dict[str, NDArray[np.int32]]


def to_error(values: Mapping[str, NDArray[Any]], error: float) -> Integers:
    """Integers at the one step for all tensors that gives this relative L2 error."""
    wide = {k: v.astype(np.float64) for k, v in values.items()}
    norm = np.sqrt(sum(float((v**2).sum()) for v in wide.values()))
    low, high = 1e-12, 1e3
    for _ in range(40):
        step = float(np.sqrt(low * high))
        lost = sum(float(((np.rint(v / step) * step - v) ** 2).sum()) for v in wide.values())
        low, high = (low, step) if np.sqrt(lost) > error * norm else (step, high)
    return {k: np.rint(v / low).astype(np.int32) for k, v in wide.items()}


def largest(tensors: Integers, share: float) -> Integers:
    """Keep this share of every matrix, the largest magnitudes (more where they tie at zero)."""
    return {
        k: np.where(np.abs(q) > np.quantile(np.abs(q), 1 - share), q, 0).astype(np.int32)
        if q.ndim > 1
        else q
        for k, q in tensors.items()
    }
