"""A rating on a scale, such as one to five stars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.kinds import DataError
from prunecast.simulations.tasks.regression import Regression

__all__ = ["Rating"]


@dataclass(frozen=True)
class Rating(Regression):
    """A regression whose targets lie on a scale; measured by the root mean square error.

    Attributes:
        least: lowest rating.
        most: highest rating.
    """

    least: float = 1.0
    most: float = 5.0

    metric = "rmse"
    verb = "rated"

    def targets(self, raw: NDArray[Any]) -> NDArray[np.float32]:
        """Ratings as float32, (examples, 1)."""
        found = super().targets(raw)
        if found.shape[1:] != (1,):
            raise DataError(
                f"targets must hold one rating for each example, not {list(found.shape[1:])}: "
                "choose another array, or task.kind = 'regression'"
            )
        low, high = float(found.min(initial=self.most)), float(found.max(initial=self.least))
        if low < self.least or high > self.most:
            raise DataError(
                f"ratings reach from {low:g} to {high:g}, and the scale from {self.least:g} to "
                f"{self.most:g}: set task.least and task.most"
            )
        return found

    def score(self, outputs: NDArray[Any], targets: NDArray[Any]) -> float:
        """Root mean square error of the answers, brought onto the scale."""
        answers = np.clip(outputs.astype(np.float64), self.least, self.most)
        return float(np.sqrt(np.mean(np.square(answers - targets))))
