"""What to remove: criteria, which score weights by what the server knows.

A new criterion is a subclass of `Criterion` and an entry in `CRITERIA`; a policy names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CRITERIA",
    "SQUARED_GRADIENT",
    "Criterion",
    "Fisher",
    "Knowledge",
    "Magnitude",
    "Taylor",
]

SQUARED_GRADIENT = "squared-gradient"
"""The statistic *mean over steps of the squared gradient of the loss*, one value per weight."""
_UNMOVED = 1e-3  # part of a tensor's root mean square update that a weight no client moved is given

Arrays = Mapping[str, NDArray[np.floating]]


@dataclass(frozen=True)
class Knowledge:
    """What the server knows when a version is about to be published.

    Attributes:
        weights: the prunable tensors of the master, finite.
        update: the last aggregated update of them, *this master - the one published before*, for a
            criterion that `uses_update`; lacks tensors that have no predecessor.
        statistics: name of a statistic to tensor to the nodes' mean, for those that the criterion
            names; what no node has sent is missing.
    """

    weights: Arrays
    update: Arrays = field(default_factory=dict)
    statistics: Mapping[str, Arrays] = field(default_factory=dict)


class Criterion(Protocol):
    """Scores weights; those that score lowest are removed first.

    Attributes:
        uses_update: whether `Knowledge.update` is needed; the server then keeps one master more.
        statistics: what nodes are asked to contribute, by name.
    """

    uses_update: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ()

    def scores(self, known: Knowledge) -> dict[str, NDArray[np.floating]]:
        """A score of 0 or above for every weight of every tensor, same shapes, no NaN.

        It must be a function of `known` alone, and give some ranking while `known` lacks the update
        and statistics, as at the first version.
        """


class Magnitude(Criterion):
    """The weight's absolute value (Han et al. 2015, section 3).

    Examples:
        >>> Magnitude().scores(Knowledge({"w": np.array([3.0, -1.0])}))["w"].tolist()
        [3.0, 1.0]
    """

    def scores(self, known: Knowledge) -> dict[str, NDArray[np.floating]]:
        """As `Criterion.scores`."""
        return {name: np.abs(weight) for name, weight in known.weights.items()}


class Taylor(Criterion):
    """First-order estimate of the loss that removing a weight costs: ``|w * gradient|``.

    Molchanov et al. 2019 ("Importance Estimation for Neural Network Pruning", equation 8, without
    the square, which ranks the same). The gradient is the last aggregated update, as server
    optimisers take it (Reddi et al. 2021). A weight that the update left alone is ranked by its
    magnitude, below most of those that moved. Before there is an update: `Magnitude`.
    """

    uses_update: ClassVar[bool] = True

    def scores(self, known: Knowledge) -> dict[str, NDArray[np.floating]]:
        """As `Criterion.scores`."""
        found = Magnitude().scores(known)
        if not set(found) <= set(known.update):
            return found
        for name, magnitude in found.items():
            moved = np.abs(known.update[name], dtype=np.float64)
            least = _UNMOVED * float(np.sqrt(np.mean(np.square(moved)))) if moved.size else 0.0
            found[name] = magnitude * np.maximum(moved, least)
        return found


class Fisher(Criterion):
    """Second-order estimate of that cost, curvature taken from the nodes' gradients.

    ``w**2 * mean(gradient**2) / 2`` (Theis et al. 2018, "Faster gaze prediction with dense networks
    and Fisher pruning", equation 9), as its square root, which ranks the same and does not
    underflow. Nodes send `SQUARED_GRADIENT`; before any has: `Magnitude`.
    """

    statistics: ClassVar[tuple[str, ...]] = (SQUARED_GRADIENT,)

    def scores(self, known: Knowledge) -> dict[str, NDArray[np.floating]]:
        """As `Criterion.scores`."""
        found = Magnitude().scores(known)
        squares = known.statistics.get(SQUARED_GRADIENT, {})
        if not set(found) <= set(squares):
            return found
        return {
            n: m * np.sqrt(np.maximum(squares[n], 0), dtype=np.float64) for n, m in found.items()
        }


CRITERIA: dict[str, Criterion] = {
    "magnitude": Magnitude(),
    "taylor": Taylor(),
    "fisher": Fisher(),
}
"""By the name that a policy's `pruning_criterion` has."""
