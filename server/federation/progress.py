"""How far learning has come, told from the master weights alone, and when pruning follows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Losses", "Progress", "losses_in"]

_HALF, _LITTLE = 0.5, 0.15  # of the largest relative change: pruning begins, and is to be over
_SHORTEST = 6  # rounds from the first mask to the last, unless the run is too short for it


def losses_in(metrics: Mapping[str, Any]) -> list[float]:
    """The numbers of a record of metrics whose names end in "loss", in any case."""
    return [
        float(value)
        for name, value in metrics.items()
        if name.lower().endswith("loss") and isinstance(value, int | float)
    ]


class Losses:
    """The loss of one version: the mean of what nodes, or the server, measured of it.

    What was measured on examples that nobody trains on counts alone where there is any.
    """

    def __init__(self) -> None:
        self._sums: dict[bool, tuple[float, float]] = {}

    def add(self, loss: float, weight: float = 1.0, *, held_out: bool) -> None:
        """Count what was measured; what is not finite, or of no weight, is passed over.

        Args:
            loss: mean over some examples.
            weight: their number.
            held_out: whether nobody trains on them.
        """
        if math.isfinite(loss) and math.isfinite(weight) and weight > 0:
            total, of = self._sums.get(held_out, (0.0, 0.0))
            self._sums[held_out] = total + loss * weight, of + weight

    def take(self) -> float | None:
        """The mean so far, None for nothing; begins anew."""
        total, of = self._sums.get(True) or self._sums.get(False) or (0.0, 0.0)
        self._sums.clear()
        return total / of if of else None


class Progress:
    """Warps the clock of a pruning schedule so that it follows learning.

    A model's relative change from round to round, ``|now - before| / |now|`` over its matrices,
    rises while it learns to tell anything at all and falls when what is left is detail. Masks that
    fall before are bad ones, and cost accuracy for good. So pruning begins once the change has
    fallen to half of its peak, and is over when it has fallen to 15 %; within bounds in rounds.

    With a budget, it stands still while the loss is further above its lowest than that, even
    beyond those bounds.

    Args:
        begin: last round that is dense in any case.
        end: first round by which pruning is over in any case.
        budget: units of the loss; 0 for none.
    """

    def __init__(self, begin: int, end: int, budget: float = 0.0) -> None:
        self.begin, self.end, self.budget = begin, end, budget
        self._peak = self._done = 0.0
        self._lowest = math.inf
        self._before: Mapping[str, NDArray[Any]] = {}

    @property
    def position(self) -> tuple[float, ...]:
        """How much of pruning is done, the largest change, the lowest loss if any is known."""
        known = () if math.isinf(self._lowest) else (self._lowest,)
        return (self._done, self._peak, *known)

    def resume(self, position: Sequence[float]) -> None:
        """Go on where another's `position` was."""
        self._done, self._peak, self._lowest = (*position, math.inf)[:3]

    def clock(
        self, number: int, master: Mapping[str, NDArray[Any]], loss: float | None = None
    ) -> float:
        """The schedule's round, `begin` to `end`, at which a version is published.

        Args:
            number: its round.
            master: its matrices; one more copy of them is kept.
            loss: of the version before; None where nobody measures it.
        """
        pace = self._pace(master)
        length = self.end - self.begin
        if not length:  # nothing is pruned
            return self.begin
        shortest = min(_SHORTEST, length)
        wanted = min(self._done + 1 / shortest, (_HALF - pace) / (_HALF - _LITTLE))
        due = (number - (self.end - shortest)) / shortest
        if number > self.begin and not self._is_spent(loss):
            self._done = min(1.0, max(self._done, wanted, due))
        return self.begin + self._done * length

    def _is_spent(self, loss: float | None) -> bool:
        if not self.budget or loss is None:
            return False
        self._lowest = min(self._lowest, loss)
        return loss > self._lowest + self.budget

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
        self._peak = max(self._peak, relative)
        return relative / self._peak if self._peak else 1.0
