"""How far learning has come, told from the master weights alone, and when pruning follows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.pruning.structure.channels import ChannelPlan

__all__ = ["SUMS", "Measurements", "Progress", "measured_in"]

_HALF, _LITTLE = 0.5, 0.15  # of the largest relative change: pruning begins, and is to be over
_CHUNK = 1 << 16  # weights that are wide at a time
_SHORTEST = 6  # rounds from the first mask to the last, unless the run is too short for it
_SLOWLY = 0.4  # part of the rounds within the bounds that it takes at least
_FINENESS = (1.0, 0.5, 0.25, 0.125)
_FROM_SCRATCH, _TUNED = 0.25, 0.03  # largest relative change of what learns, of what is tuned


def measured_in(metrics: Mapping[str, Any], ending: str) -> list[float]:
    """The numbers of a record of metrics whose names end so, in any case."""
    return [
        float(value)
        for name, value in metrics.items()
        if name.lower().endswith(ending.lower()) and isinstance(value, int | float)
    ]


SUMS = 4
"""Numbers in a position of `Measurements`."""
_LOST = (1.0, 0.0)  # sum and weight where all that was measured is not finite


class Measurements:
    """A metric of one version: the mean of what nodes, or the server, measured of it.

    What was measured on examples that nobody trains on counts alone where there is any.
    """

    def __init__(self) -> None:
        self._sums: dict[bool, tuple[float, float]] = {}

    def add(self, value: float, weight: float = 1.0, *, held_out: bool) -> None:
        """Count what was measured.

        What is not finite counts only where nothing else was measured; what is of no weight, or
        would make the sum infinite, is passed over.

        Args:
            value: mean over some examples.
            weight: their number.
            held_out: whether nobody trains on them.
        """
        if not (math.isfinite(weight) and weight > 0):
            return
        if not math.isfinite(value):
            self._sums.setdefault(held_out, _LOST)
            return
        total, of = self._sums.get(held_out, _LOST)
        total, of = (total if of else 0.0) + value * weight, of + weight
        if math.isfinite(total) and math.isfinite(of):
            self._sums[held_out] = total, of

    @property
    def position(self) -> tuple[float, ...]:
        """Sum and weight of what was held out, and of the rest: `SUMS` numbers."""
        return *self._sums.get(True, (0.0, 0.0)), *self._sums.get(False, (0.0, 0.0))

    def resume(self, position: Sequence[float]) -> None:
        """Go on where another's `position` was.

        Raises:
            ValueError: it is no position.
        """
        if (
            len(position) != SUMS
            or not all(map(math.isfinite, position))
            or min(position[1::2]) < 0
        ):
            raise ValueError("what was measured is not what `Measurements.position` gives")
        self._sums = {
            is_held_out: (total, weight)
            for is_held_out, (total, weight) in ((True, position[:2]), (False, position[2:]))
            if weight > 0 or (total, weight) == _LOST
        }

    def take(self) -> float | None:
        """The mean so far, None for nothing, NaN where nothing was finite; begins anew."""
        found = self._sums.get(True) or self._sums.get(False)
        self._sums.clear()
        if found is None:
            return None
        total, of = found
        return total / of if of else math.nan


class Progress:
    """Warps the clock of a pruning schedule so that it follows learning.

    A model's relative change from round to round, ``|now - before| / |now|`` over its matrices,
    rises while it learns to tell anything at all and falls when what is left is detail. Masks that
    fall before are bad ones, and cost accuracy for good. So pruning begins once the change has
    fallen to half of its peak, and is over when it has fallen to 15 %; within bounds in rounds.

    Args:
        begin: last round that is dense in any case.
        end: first round by which pruning is over in any case; `begin` where nothing is pruned.

    Attributes:
        peak: the largest relative change so far; 0 while none is known.
        fineness: part of the usual step that the model's lattice is to have, 1 to 1/8. What learns
            from scratch changes by a quarter of itself in a round at its peak, and coarse lattices
            do it no harm; what changes less, as in fine-tuning, needs a finer one in proportion.
            Decided when the peak is over.
        early: whether the model, which learns from scratch, has not settled yet: pruning is not
            over, or, where nothing is pruned, it changes by more than the little of its end. Never
            of a model of which nobody knows what it has learned.
    """

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self.peak = self._done = 0.0
        self.fineness, self.early = 1.0, False
        self._pace = 1.0  # the last relative change as a part of the largest
        self._before: Mapping[str, NDArray[Any]] = {}

    @property
    def position(self) -> tuple[float, ...]:
        """What is done of pruning, peak, fineness, whether it is early."""
        return self._done, self.peak, self.fineness, float(self.early)

    def resume(self, position: Sequence[float]) -> None:
        """Go on where another's `position` was.

        Raises:
            ValueError: it is no position.
        """
        known = len(position) == 4 and all(map(math.isfinite, position))
        if not known or not (
            0 <= position[0] <= 1 and position[1] >= 0 and position[2] in _FINENESS
        ):
            raise ValueError("the progress of learning is not what `Progress.position` gives")
        self._done, self.peak, self.fineness, early = position
        self.early = bool(early)

    @property
    def has_begun(self) -> bool:
        """Whether learning has come as far as pruning is to begin at, or the bounds say so."""
        return self._done > 0

    def observe(self, master: Mapping[str, NDArray[Any]]) -> None:
        """Take in the weights of a round; they are kept until the next."""
        matrices = {name: array for name, array in master.items() if array.ndim > 1}
        change = size = 0.0
        for name, array in matrices.items():
            before = self._before.get(name)
            if before is not None and before.shape == array.shape:
                now, then = array.reshape(-1), before.reshape(-1)
                for at in range(0, array.size, _CHUNK):
                    part = now[at : at + _CHUNK].astype(np.float64)
                    size += float(np.square(part).sum())
                    part -= then[at : at + _CHUNK]
                    change += float(np.square(part).sum())
        self._before = matrices
        self._pace = 1.0
        if size:
            relative = (change / size) ** 0.5
            self.peak = max(self.peak, relative)
            self._pace = relative / self.peak if self.peak else 1.0
        if self.peak and (self._pace < 1 or self.peak < _TUNED):
            power = round(math.log2(self.peak / _FROM_SCRATCH))
            self.fineness = _FINENESS[min(len(_FINENESS) - 1, max(0, -power))]
            self.early = self.early and power >= 0

    def jump(self, master: Mapping[str, NDArray[Any]]) -> None:
        """Compare the weights of the next round with these, in place of those observed last."""
        self._before = {n: array for n, array in master.items() if n in self._before}

    def remove(self, plan: ChannelPlan) -> None:
        """Go on without the channels that a plan removes of the weights observed last.

        Raises:
            PlanError: the plan is of another model; nothing was changed.
        """
        self._before = plan.arrays(self._before)

    @property
    def _shortest(self) -> int:
        """Rounds that pruning takes at least."""
        length = self.end - self.begin
        return min(max(_SHORTEST, round(_SLOWLY * length)), length)

    @property
    def stride(self) -> float:
        """How far the schedule's round is at most from one version to the next."""
        return (self.end - self.begin) / max(1, self._shortest)

    def clock(self, number: int) -> float:
        """The schedule's round, `begin` to `end`, at which the weights observed are published.

        Args:
            number: their round.
        """
        length, shortest = self.end - self.begin, self._shortest
        if not length:
            self.early = self.early and self._pace > _LITTLE
            return self.begin
        wanted = min(self._done + 1 / shortest, (_HALF - self._pace) / (_HALF - _LITTLE))
        due = (number - (self.end - shortest)) / shortest
        if number > self.begin:
            self._done = min(1.0, max(self._done, wanted, due))
        self.early = self.early and self._done < 1 and number < self.end
        return self.begin + self._done * length
