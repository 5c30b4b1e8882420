"""How much to prune, found while training: the most that a metric of the published model bears.

A search turns knobs, one after the other: how much of channels, heads, layers or weights goes, the
step of the lattice, or anything else that trades quality for bytes in levels. It goes up while the
metric stays within a tolerance of the best that was measured, goes back where it does not, tries
half the step, and ends at the highest level that holds. It knows neither models nor messages:
whoever publishes models gives it what was measured of the last one and asks it for the levels of
the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["KNOBS", "Knob", "Search"]

_WINDOW = 3  # values whose median counts as reached: one lucky round is no reference


@dataclass(frozen=True)
class Knob:
    """Something that can be turned up from level 0 in exchange for quality.

    Attributes:
        name: by which levels are asked for.
        most: the highest level, 0 or above.
        step: by which a search begins to turn it.
        least: the smallest step that it tries; above 0.
        final: whether its level is for good once its turn is over, as what is removed then cannot
            come back: it does not fall any more, and the next knob waits for one model.

    Raises:
        ValueError: one of them is outside its range.
    """

    name: str
    most: float
    step: float
    least: float
    final: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.most < math.inf and 0 < self.least <= self.step < math.inf):
            raise ValueError(f"the levels of knob {self.name!r} cannot be searched: {self}")


KNOBS: dict[str, Knob] = {
    # two levels are a halving of what is kept; each asks for a plan of its own
    "channels": Knob("channels", most=4.0, step=1.0, least=0.5, final=True),
    "heads": Knob("heads", most=4.0, step=1.0, least=0.5, final=True),
    "layers": Knob("layers", most=4.0, step=1.0, least=0.5, final=True),
    # levels are halvings of what is kept, so that a step asks for as much near the end as before
    "sparsity": Knob("sparsity", most=6.0, step=1.0, least=0.125),
    # doublings of the step, which keep lattices nested
    "lattice": Knob("lattice", most=3.0, step=1.0, least=1.0),
}
"""What a federation can turn, by the names that a policy's `pruning_knobs` has."""


class Search:
    """Turns knobs up as far as a metric bears it.

    A level is tried by publishing models with it. One is good whose metric is no further than the
    tolerance from the reference. The level holds as soon as half of `patience` models were good,
    rounded up: one that is lucky says little of a metric that is noisy. It has failed when
    `patience` were not, which were trained to recover. After a failure the knob goes back to the
    highest level that held, and once that holds again, half the step is tried; a level that does
    not hold any more when it is gone back to falls by a step itself. When the step becomes smaller
    than the knob's least, the next knob's turn comes. The last levels are watched on.

    The reference is the best median of three metrics in a row: of the dense model to begin with,
    and better ones later, so that what training still gains is not given away. While it becomes
    better by more than the tolerance in three models, nothing higher is tried: what a model still
    learns would hide what a level costs, and a level that slows it down would seem to hold.

    Args:
        knobs: in the order in which they are turned.
        tolerance: in units of the metric, 0 or above.
        patience: models that are not good, which a level gets; 1 or more.
        higher: whether more of the metric is better, as of an accuracy.

    Attributes:
        reference: what the metric is compared with; None before there is any.
        done: whether no knob is turned up any more.

    Examples:
        >>> search = Search([Knob("sparsity", most=4, step=1, least=0.5)], 0.01, patience=1)
        >>> found = []
        >>> for accuracy in (0.9, 0.9, 0.9, 0.8, 0.9, 0.9, 0.9):
        ...     search.observe(accuracy)
        ...     found.append(search.level("sparsity"))
        >>> found
        [1.0, 2.0, 3.0, 2.0, 2.5, 3.0, 3.5]
    """

    def __init__(
        self, knobs: Sequence[Knob], tolerance: float, patience: int, *, higher: bool = True
    ) -> None:
        if not (0 <= tolerance < math.inf and patience >= 1):
            raise ValueError(
                f"no search by a tolerance of {tolerance} and a patience of {patience}"
            )
        self._knobs, self._tolerance, self._patience = tuple(knobs), tolerance, patience
        self._sign = 1.0 if higher else -1.0
        self._held = [0.0] * len(self._knobs)
        self._turn = 0
        self._trial = 0.0  # level of the knob in turn; as held, while none is tried
        self._step = self._knobs[0].step if self._knobs else 0.0
        self._good = self._failed = 0  # models since a level was tried, held or failed
        self._best = -math.inf  # as `reference`, more being better
        self._recent: list[float] = []
        self._bests: list[float] = []  # `_best` after each of the last models

    @property
    def reference(self) -> float | None:
        """What the metric is compared with; None before there is any."""
        return None if math.isinf(self._best) else self._sign * self._best

    @property
    def done(self) -> bool:
        """Whether no knob is turned up any more."""
        return self._turn >= len(self._knobs)

    def level(self, name: str) -> float:
        """The level that the next model is to have; 0 for a knob that is not turned."""
        for at, knob in enumerate(self._knobs):
            if knob.name == name:
                return self._trial if at == self._turn else self._held[at]
        return 0.0

    def is_settled(self, name: str) -> bool:
        """Whether the turn of a knob is over."""
        return any(knob.name == name for knob in self._knobs[: self._turn])

    def stop(self) -> None:
        """Turn no knob up any more; the one in turn goes back to what held."""
        self._turn, self._good, self._failed = len(self._knobs), 0, 0

    def observe(self, value: float, *, may_rise: bool = True) -> None:
        """Take in what was measured of a model with the present levels, and choose the next.

        Args:
            value: of the metric; what is not finite has failed.
            may_rise: whether a higher level may be tried now. Levels fall in any case.
        """
        is_good = self._is_good(value)
        self._good, self._failed = self._good + is_good, self._failed + (not is_good)
        holds, failed = 2 * self._good >= self._patience, self._failed >= self._patience
        if holds or failed:
            self._good = self._failed = 0
        if self.done:
            if failed:
                self._give_way(len(self._knobs) - 1)
            return
        tried = self._trial > self._held[self._turn]
        if holds:
            self._held[self._turn] = self._trial
            waits = self._settle()
            if may_rise and not (self.done or waits or self._learns()):
                most = self._knobs[self._turn].most
                self._trial = min(self._held[self._turn] + self._step, most)
        elif failed:
            if tried:
                self._trial = self._held[self._turn]
                self._step /= 2
                self._settle()
            else:
                self._give_way(self._turn)

    def _is_good(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        self._recent = [*self._recent, self._sign * value][-_WINDOW:]
        if len(self._recent) == _WINDOW or math.isinf(self._best):
            self._best = max(self._best, median(self._recent))
        self._bests = [*self._bests, self._best][-_WINDOW - 1 :]
        return self._sign * value >= self._best - self._tolerance

    def _learns(self) -> bool:
        """Whether the reference has grown by more than the tolerance of late."""
        known = len(self._bests) > _WINDOW
        return known and self._best - self._bests[0] > self._tolerance

    def _settle(self) -> bool:
        """Go on to the next knob where this one cannot be turned up any more; whether it waits."""
        waits = False
        while not self.done:
            knob, held = self._knobs[self._turn], self._held[self._turn]
            if held < knob.most and self._step >= knob.least:
                break
            self._turn += 1
            waits = waits or knob.final
            if not self.done:
                self._step, self._trial = self._knobs[self._turn].step, self._held[self._turn]
        return waits

    def _give_way(self, last: int) -> None:
        """Lower what does not hold any more: the knob turned last that is not at 0."""
        for at in range(last, -1, -1):
            over = at < self._turn and self._knobs[at].final
            if self._held[at] > 0 and not over:
                by = self._step if at == self._turn else self._knobs[at].least
                self._held[at] = max(0.0, self._held[at] - max(by, self._knobs[at].least))
                break
        if not self.done:
            self._trial = self._held[self._turn]

    @property
    def position(self) -> tuple[float, ...]:
        """Turn, trial, step, good and failed models, numbers of recent values and bests, these,
        levels that held.

        A best is more for a better metric, also where less of that is better.
        """
        return (
            *(float(self._turn), self._trial, self._step, float(self._good), float(self._failed)),
            *(float(len(self._recent)), float(len(self._bests))),
            *self._recent,
            *self._bests,
            *self._held,
        )

    def resume(self, position: Sequence[float]) -> None:
        """Go on where another search's `position` was, over the same knobs.

        Raises:
            ValueError: it is no position of such a search.
        """
        count = len(self._knobs)
        if len(position) < 7 + count or not all(map(math.isfinite, position)):
            raise ValueError("the search for a sparsity is not what `Search.position` gives")
        turn, trial, step, good, failed, recent, known = position[:7]
        values, rest = list(position[7 : 7 + int(recent)]), list(position[7 + int(recent) :])
        bests, held = rest[: int(known)], rest[int(known) :]
        levels = [*held, trial] if turn < count else held
        if not (
            turn in range(count + 1)
            and good in range(self._patience)
            and 2 * good < self._patience
            and failed in range(self._patience)
            and recent in range(_WINDOW + 1)
            and known in range(_WINDOW + 2)
            and (known > 0) == (recent > 0)
            and step >= 0
            and len(held) == count
            and all(level >= 0 for level in levels)
            and all(level <= knob.most for level, knob in zip(held, self._knobs, strict=True))
        ):
            raise ValueError("the search for a sparsity is not what `Search.position` gives")
        self._turn, self._trial, self._step = int(turn), trial, step
        self._good, self._failed = int(good), int(failed)
        self._recent, self._bests, self._held = values, bests, held
        self._best = bests[-1] if bests else -math.inf
