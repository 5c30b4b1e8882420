"""How far learning has come, told from the master weights alone, and when pruning follows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Progress"]

_HALF, _LITTLE = 0.5, 0.15  # of the largest relative change: pruning begins, and is to be over
_SHORTEST = 6  # rounds from the first mask to the last, unless the run is too short for it


class Progress:
    """Warps the clock of a pruning schedule so that it follows learning.

    A model's relative change from round to round, ``|now - before| / |now|`` over its matrices,
    rises while it learns to tell anything at all and falls when what is left is detail. Masks that
    fall before are bad ones, and cost accuracy for good. So pruning begins once the change has
    fallen to half of its peak, and is over when it has fallen to 15 %; within bounds in rounds.

    Args:
        begin: last round that is dense in any case.
        end: first round by which pruning is over in any case.
    """

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self.peak = self.done = 0.0
        self._before: Mapping[str, NDArray[Any]] = {}

    def clock(self, number: int, master: Mapping[str, NDArray[Any]]) -> float:
        """The schedule's round, `begin` to `end`, at which a version is published.

        Args:
            number: its round.
            master: its matrices; one more copy of them is kept.
        """
        pace = self._pace(master)
        length = self.end - self.begin
        shortest = min(_SHORTEST, length)
        wanted = min(self.done + 1 / shortest, (_HALF - pace) / (_HALF - _LITTLE))
        due = (number - (self.end - shortest)) / shortest
        if number > self.begin:
            self.done = min(1.0, max(self.done, wanted, due))
        return self.begin + self.done * length

    def _pace(self, master: Mapping[str, NDArray[Any]]) -> float:
        """The relative change as a part of its peak; 1 until it is known."""
        change = size = 0.0
        for name, array in master.items():
            before = self._before.get(name)
            if before is not None and before.shape == array.shape:
                change += float(np.square(np.subtract(array, before, dtype=np.float64)).sum())
                size += float(np.square(array, dtype=np.float64).sum())
        self._before = dict(master)
        if not size:
            return 1.0
        relative = (change / size) ** 0.5
        self.peak = max(self.peak, relative)
        return relative / self.peak if self.peak else 1.0
