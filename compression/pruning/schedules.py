"""When to prune: schedules, from the number of a version to the sparsity that it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["NEVER", "SCHEDULES", "CubicSchedule", "Schedule"]

Schedule = Callable[[float], float]
"""When to prune: sparsity, 0 <= sparsity < 1, of a version by its number, which counts from 1."""


@dataclass(frozen=True)
class CubicSchedule:
    """Gradual pruning: fast at first, slow near the target.

    ``s(t) = final * (1 - (1 - (t - begin) / (end - begin))**3)`` between `begin` and `end`,
    0 before, `final` after (Zhu & Gupta 2017, "To prune, or not to prune", section 3, with an
    initial sparsity of 0).

    Attributes:
        final: sparsity at the end, 0 <= final < 1.
        begin: last version that is dense.
        end: first version at the final sparsity, greater than `begin`.

    Examples:
        >>> schedule = CubicSchedule(final=0.9, begin=2, end=12)
        >>> [round(schedule(version), 3) for version in (1, 2, 3, 7, 12, 50)]
        [0.0, 0.0, 0.244, 0.787, 0.9, 0.9]
    """

    final: float
    begin: int = 2
    end: int = 25

    def __post_init__(self) -> None:
        if not 0 <= self.final < 1:
            raise ValueError(f"final sparsity must be in [0, 1), not {self.final}")
        if not 0 <= self.begin < self.end:
            raise ValueError(f"pruning must begin before it ends, not {self.begin}..{self.end}")

    def __call__(self, version: float) -> float:
        """Sparsity for a version, counted from 1."""
        progress = min(1.0, max(0.0, (version - self.begin) / (self.end - self.begin)))
        return float(self.final * (1 - (1 - progress) ** 3))


SCHEDULES: dict[str, Callable[[float, int, int], Schedule]] = {"cubic": CubicSchedule}
"""What makes a schedule of final sparsity, begin and end, by the name `pruning_schedule` has."""

NEVER: Schedule = CubicSchedule(0.0)
"""Nothing is pruned."""
