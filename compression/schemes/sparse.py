"""What the sparse schemes share: groups of tensors, and the largest entries of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import MalformedPayload

from .interface import Quantised
from .layout import Arrays, Layout, scaled

__all__ = ["SCOPES", "groups", "kept", "read_scope", "restored", "top_k"]

SCOPES = ("tensor", "payload")
"""What an entry competes with: its own tensor, or all of them. The index is on the wire."""


def groups(layout: Layout, scope: str) -> list[Sequence[str]]:
    """Names of the tensors that are selected from together."""
    return [[name] for name in layout] if scope == "tensor" else [list(layout)]


def read_scope(number: int) -> str:
    """The scope of this number; MalformedPayload when there is none."""
    if number >= len(SCOPES):
        raise MalformedPayload(f"unknown scope {number}")
    return SCOPES[number]


def restored(quantised: Quantised, layout: Layout) -> Arrays:
    """Integers times the scale of their group; the number of the scope is the first parameter."""
    grouped = groups(layout, SCOPES[quantised.parameters[0]])
    return {
        name: scaled(quantised.values[name], scale)
        for names, scale in zip(grouped, quantised.scales, strict=True)
        for name in names
    }


def kept(size: int, density: float) -> int:
    """``max(density * size, 1)`` entries, rounded to nearest; 0 of nothing."""
    return min(size, max(1, round(density * size)))


def top_k(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Positions of the `count` largest magnitudes of a vector, in order, without zeros.

    Of equal magnitudes the first are taken, so that the selection is one of a kind.

    >>> top_k(np.array([1, -3, 0, 3, 3], np.float32), 2).tolist()
    [1, 3]
    """
    if not count:
        return np.zeros(0, np.int64)
    size = np.abs(values)
    threshold = np.partition(size, len(size) - count)[len(size) - count]
    above = np.flatnonzero(size > threshold)
    if not threshold:
        return above
    level = np.flatnonzero(size == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, level]))
