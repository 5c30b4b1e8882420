"""Coding of row and column levels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..entropy.adaptive import UINT_CONTEXTS, AdaptiveDecoder, AdaptiveEncoder
from ..entropy.static import LEVEL_CONTEXTS, level_contexts
from ..errors import MalformedPayload
from ..modelling.classes import MAX_LEVEL

__all__ = ["LevelModel", "LevelRun", "centred"]


@dataclass(frozen=True)
class LevelRun:
    """Levels of one axis before they are read: multiples of ``step``, up to ``step * top``."""

    count: int
    step: int
    middle: int
    top: int

    def scaled(self, levels: bytes) -> NDArray[np.uint8]:
        """Levels from what the coders return, in units of ``step``."""
        return np.frombuffer(levels, np.uint8) * np.uint8(self.step)


def centred(levels: NDArray[np.uint8]) -> tuple[NDArray[np.int64], int, int]:
    """Levels as steps from the middle one; their greatest common step; the middle one in steps."""
    step = max(1, int(np.gcd.reduce(levels.astype(np.int64))))
    small = levels.astype(np.int64) // step
    middle = int(np.median(small))
    return small - middle, step, middle


class LevelModel:
    """Adaptive contexts of levels, conditioned on the level before."""

    def __init__(self, coder: AdaptiveEncoder | AdaptiveDecoder) -> None:
        self._step = coder.contexts(UINT_CONTEXTS)
        self._first = coder.contexts(UINT_CONTEXTS)
        self._model = [coder.contexts(UINT_CONTEXTS) for _ in range(LEVEL_CONTEXTS)]

    def start(self, coder: AdaptiveEncoder, levels: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Write what goes before some levels; return them as steps from the middle one."""
        values, step, middle = centred(levels)
        coder.uint(self._step, step - 1)
        coder.uint(self._first, middle)
        return values

    def write(self, coder: AdaptiveEncoder, values: NDArray[np.int64]) -> None:
        """Write levels as :meth:`start` returned them, with the adaptive coder."""
        for context, v in zip(level_contexts(values).tolist(), values.tolist(), strict=True):
            coder.sint(self._model[context], v)

    def read_start(self, coder: AdaptiveDecoder, count: int) -> LevelRun:
        """Read what goes before ``count`` levels."""
        step = coder.uint(self._step) + 1
        if step > MAX_LEVEL + 1:
            raise MalformedPayload(f"levels are multiples of {step}, above {MAX_LEVEL + 1}")
        run = LevelRun(count, step, coder.uint(self._first), MAX_LEVEL // step)
        if run.middle > run.top:
            raise MalformedPayload("a level is out of range")
        return run

    def read(self, coder: AdaptiveDecoder, run: LevelRun) -> NDArray[np.uint8]:
        """Read levels that :meth:`write` wrote."""
        return run.scaled(coder.levels(self._model, run.middle, run.top, run.count))
