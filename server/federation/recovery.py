"""How far a model recovered from each of its prunings, told from what was measured by round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prunecast.server.federation.publishing.masks.progress import measured_in

__all__ = ["Recoveries"]


class Recoveries:
    """What metrics were before each pruning, right after it, and when the next began or all ended.

    Prunings in rounds that follow each other are one, as a gradual schedule's.

    Args:
        metric: ending of the names that are told beside losses.

    Examples:
        >>> found = Recoveries("accuracy")
        >>> for number, loss in enumerate([0.50, 0.40, 0.80, 0.50]):
        ...     found.note(number, {"loss": loss}, pruned=number == 2)
        >>> found.all()[0]["recovery_ratio"]
        0.8
    """

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self._found: list[dict[str, Any]] = []
        self._last: dict[str, float] = {}
        self._goes_on = False

    def note(self, number: int, metrics: Mapping[str, Any], *, pruned: bool) -> None:
        """Take in a round.

        Args:
            number: of the round.
            metrics: of the model that it arrived at, held out.
            pruned: whether that was pruned further than the round before's.
        """
        known = {
            name: float(value)
            for name, value in metrics.items()
            if (measured_in({name: value}, "loss") or measured_in({name: value}, self._metric))
            and math.isfinite(value)
        }
        if pruned and not self._goes_on:
            self._found.append({"begun": number, "before": self._last})
        if self._found:
            latest = self._found[-1]
            if pruned:
                latest |= {"ended": number, "pruned": known}
            latest |= {"last": number, "after": known or latest.get("after", {})}
        self._goes_on = pruned
        self._last = known or self._last

    def all(self) -> list[dict[str, Any]]:
        """Every pruning so far.

        Returns:
            ``begun``, ``ended``: its first and last round; ``last``: of the rounds up to the next;
            ``before``, ``pruned`` and ``after``: metrics before it, right after it, and in `last`;
            ``recovery_ratio``: loss before ÷ after, of the only loss or else the one that is called
            just that: 1 and above means that nothing is left of what pruning cost.
        """
        return [{**one, **_ratio(one["before"], one["after"])} for one in self._found]


def _ratio(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    losses = {
        name.lower(): before[name] / after[name]
        for name in before
        if name in after and name.lower().endswith("loss") and after[name] > 0
    }
    name = next(iter(losses)) if len(losses) == 1 else "loss"
    return {"recovery_ratio": losses[name]} if name in losses else {}
