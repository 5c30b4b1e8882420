"""Table look-ups in chunks: small indices would otherwise be widened to 64 bits all at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CHUNK", "look_up"]

CHUNK = 1 << 16
"""Elements that a pass handles at a time."""


def look_up(table: NDArray[Any], index: NDArray[Any]) -> NDArray[Any]:
    """Return ``table[index]``; every index must be in range."""
    out = np.empty(len(index), table.dtype)
    for s in range(0, len(index), CHUNK):
        table.take(index[s : s + CHUNK], out=out[s : s + CHUNK], mode="clip")
    return out
