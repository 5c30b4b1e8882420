"""When to prune: schedules, from the number of a version to the sparsity that it has.

All are made of a final sparsity, the last dense version and the first one at the final sparsity.
Versions are numbers that may lie between two: where pruning follows learning, its clock stands
still, or runs slower than versions are published.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

__all__ = [
    "AT_LAST",
    "AUTOMATIC",
    "HELD",
    "NEVER",
    "SCHEDULES",
    "CosineSchedule",
    "CubicSchedule",
    "ExponentialSchedule",
    "GradualSchedule",
    "IterativeSchedule",
    "LayerSchedule",
    "LinearSchedule",
    "OneShotSchedule",
    "Schedule",
    "StaticSchedule",
]

Schedule = Callable[[float], float]
"""When to prune: sparsity, 0 <= sparsity < 1, of a version by its number, which counts from 1."""

AT_LAST = 1e9
"""A version after the end of every schedule."""

_ROUNDING = 1e-9  # of a share of the way, so that a step falls on the version it is meant for


@dataclass(frozen=True)
class GradualSchedule(ABC):
    """Rises from 0 at `begin` to `final` at `end`; what the curve between them is, a subclass says.

    Attributes:
        final: sparsity at the end, 0 <= final < 1.
        begin: last version that is dense.
        end: first version by which the final sparsity is reached, greater than `begin`.

    Raises:
        ValueError: one of them is outside its range.
    """

    final: float
    begin: int = 2
    end: int = 25

    def __post_init__(self) -> None:
        if not 0 <= self.final < 1:
            raise ValueError(f"final sparsity must be in [0, 1), not {self.final}")
        if not 0 <= self.begin < self.end:
            raise ValueError(f"pruning must begin before it ends, not {self.begin}..{self.end}")

    def progress(self, version: float) -> float:
        """Share of the way from `begin` to `end`, 0 to 1."""
        return min(1.0, max(0.0, (version - self.begin) / (self.end - self.begin)))

    def __call__(self, version: float) -> float:
        """Sparsity for a version, counted from 1."""
        return float(self.curve(self.progress(version)))

    @abstractmethod
    def curve(self, progress: float) -> float:
        """Sparsity at a share of the way: 0 at 0, `final` at 1, never falling."""


class CubicSchedule(GradualSchedule):
    """Fast at first, slow near the target: ``final * (1 - (1 - p)**3)``.

    Zhu & Gupta 2017, "To prune, or not to prune", section 3, with an initial sparsity of 0.

    Examples:
        >>> schedule = CubicSchedule(final=0.9, begin=2, end=12)
        >>> [round(schedule(version), 3) for version in (1, 2, 3, 7, 12, 50)]
        [0.0, 0.0, 0.244, 0.787, 0.9, 0.9]
    """

    def curve(self, progress: float) -> float:
        """As the class says."""
        return self.final * (1 - (1 - progress) ** 3)


class LinearSchedule(GradualSchedule):
    """As much in every round: ``final * p``."""

    def curve(self, progress: float) -> float:
        """As the class says."""
        return self.final * progress


class ExponentialSchedule(GradualSchedule):
    """The same share of what is left in every round: ``1 - (1 - final)**p``.

    What is kept decays exponentially, as in NNCF's scheduler of that name.
    """

    def curve(self, progress: float) -> float:
        """As the class says."""
        return 1 - (1 - self.final) ** progress if progress < 1 else self.final


class CosineSchedule(GradualSchedule):
    """Slow at both ends: ``final * (1 - cos(pi * p)) / 2``; after Loshchilov & Hutter 2017."""

    def curve(self, progress: float) -> float:
        """As the class says."""
        return self.final * (1 - math.cos(math.pi * progress)) / 2


class OneShotSchedule(GradualSchedule):
    """All at once, in the version after `begin` (Han et al. 2015, section 3, without iteration).

    The rounds up to `end` and after are there to recover.
    """

    def curve(self, progress: float) -> float:
        """As the class says."""
        return self.final if progress > 0 else 0.0


class StaticSchedule(GradualSchedule):
    """All of the sparsity from the first version on, whatever `begin` and `end` are.

    For masks that are chosen before training, as by SNIP (Lee et al. 2019), or at random.
    """

    def progress(self, version: float) -> float:
        """1: there is no way to go."""
        return 1.0

    def curve(self, progress: float) -> float:
        """As the class says."""
        return self.final


@dataclass(frozen=True)
class IterativeSchedule(GradualSchedule):
    """In steps that each remove the same share of what is left, with rounds to recover after each.

    ``1 - (1 - final)**(n / steps)`` after step n (Han et al. 2015, section 3.3; Frankle & Carbin
    2019, appendix B). The first step comes in the version after `begin`, and each has
    ``(end - begin) / steps`` rounds.

    Attributes:
        steps: how many, 1 or more.

    Examples:
        >>> schedule = IterativeSchedule(final=0.875, begin=2, end=11, steps=3)
        >>> [round(schedule(version), 3) for version in (2, 3, 5, 6, 8, 9, 11)]
        [0.0, 0.5, 0.5, 0.75, 0.75, 0.875, 0.875]
    """

    steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"pruning takes 1 step or more, not {self.steps}")

    def curve(self, progress: float) -> float:
        """As the class says."""
        done = math.ceil(progress * self.steps - _ROUNDING)
        return self.final if done >= self.steps else 1 - (1 - self.final) ** (done / self.steps)


class LayerSchedule(LinearSchedule):
    """One tensor after the other, from the input side: in the order that the model has them in.

    Each goes to its final mask at once and the rounds until the next one's turn are there to
    recover, so that a layer is chosen while those before it are pruned already (He et al. 2017 and
    Luo et al. 2017, for channels). Called, it gives the mean over tensors of one size.
    """

    def due(self, version: float, tensors: int) -> int:
        """How many of so many tensors have had their turn by a version."""
        return math.ceil(self.progress(version) * tensors - _ROUNDING)


SCHEDULES: dict[str, Callable[[float, int, int], Schedule]] = {
    "cubic": CubicSchedule,
    "linear": LinearSchedule,
    "exponential": ExponentialSchedule,
    "cosine": CosineSchedule,
    "one-shot": OneShotSchedule,
    "static": StaticSchedule,
    "iterative": IterativeSchedule,
    "layer-by-layer": LayerSchedule,
}
"""What makes a schedule of final sparsity, begin and end, by the name `pruning_schedule` has."""

AUTOMATIC = "automatic"
"""How a policy names no schedule, but the search of `prunecast.compression.pruning.automatic`."""

HELD = frozenset({"static", "iterative"})
"""Schedules whose masks are held between their steps, unless a policy says otherwise."""

NEVER: Schedule = CubicSchedule(0.0)
"""Nothing is pruned."""
