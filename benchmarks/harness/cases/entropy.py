"""Zeroth-order entropy: what the best static code without contexts would need."""

from __future__ import annotations

import numpy as np

from .case import Array, Case
from .known import to_arrays

__all__ = ["case_entropy", "entropy"]


def entropy(values: Array) -> float:
    """Zeroth-order entropy of one array, in bits.

    >>> entropy(np.array([0, 1, 0, 1]))
    4.0
    """
    _, counts = np.unique(values, return_counts=True)
    return abs(float((counts * np.log2(counts / max(counts.sum(), 1))).sum()))


def case_entropy(case: Case) -> float:
    """Zeroth-order entropy of the arrays of :func:`to_arrays`, each by itself, in bits.

    Floats and their differences count as four arrays, one for each byte.
    """
    arrays = to_arrays(case)
    if case.kind.startswith("float"):
        arrays = [p for a in arrays for p in a.reshape(-1, 1).view(np.uint8).T]
    return sum(entropy(a) for a in arrays)
