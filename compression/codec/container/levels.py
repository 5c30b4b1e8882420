"""Coding of row and column levels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..entropy.adaptive import UINT_CONTEXTS, AdaptiveDecoder, AdaptiveEncoder
from ..errors import MalformedPayload

__all__ = ["LevelModel"]


class LevelModel:
    """Adaptive contexts of levels, conditioned on the level before."""

    def __init__(self, coder: AdaptiveEncoder | AdaptiveDecoder) -> None:
        self._step = coder.contexts(UINT_CONTEXTS)
        self._first = coder.contexts(UINT_CONTEXTS)
        self._model = [coder.contexts(UINT_CONTEXTS) for _ in range(8)]

    def write(self, coder: AdaptiveEncoder, levels: NDArray[np.uint8]) -> None:
        """Write levels, which are multiples of their greatest common step."""
        step = max(1, int(np.gcd.reduce(levels.astype(np.int64))))
        coder.uint(self._step, step - 1)
        small = (levels // step).tolist()
        middle = int(np.median(small))
        coder.uint(self._first, middle)
        previous = middle
        for v in small:
            coder.sint(self._model[min(max(previous - middle, -3), 4) + 3], v - middle)
            previous = v

    def read(self, coder: AdaptiveDecoder, count: int, most: int) -> NDArray[np.uint8]:
        """Read ``count`` levels in [0, most]."""
        step = coder.uint(self._step) + 1
        middle = coder.uint(self._first)
        top = most // step
        if middle > top:
            raise MalformedPayload("a level is out of range")
        out = coder.levels(self._model, middle, top, count)
        return np.frombuffer(out, np.uint8) * np.uint8(step)
