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
_UNMOVED = 1e-3  # part of the root mean square update that weights no client moved are given

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
    optimisers take it (Reddi et al. 2021). Weights that the update left alone are ranked among
    themselves by magnitude, and so are all before there is an update; a tensor that has none
    counts as moved as much as the others on average.
    """

    uses_update: ClassVar[bool] = True

    def scores(self, known: Knowledge) -> dict[str, NDArray[np.floating]]:
        """As `Criterion.scores`."""
        found = Magnitude().scores(known)
        typical = float(np.sqrt(_mean(known.update, np.square)))
        if typical:
            for name, magnitude in found.items():
                moved = np.abs(known.update.get(name, np.float64(typical)), dtype=np.float64)
                found[name] = magnitude * np.maximum(moved, _UNMOVED * typical)
        return found


class Fisher(Criterion):
    """Second-order estimate of that cost, curvature taken from the nodes' gradients.

    ``w**2 * mean(gradient**2) / 2`` (Theis et al. 2018, "Faster gaze prediction with dense networks
    and Fisher pruning", equation 9), as its square root, which ranks the same and does not
    underflow. Nodes send `SQUARED_GRADIENT`; a tensor of which none has is given the mean of the
    others, and before there is any, magnitude ranks.
    """

    statistics: ClassVar[tuple[str, ...]] = (SQUARED_GRADIENT,)

    def scores(self, known: Knowledge) -> dict[str, NDArray[np.floating]]:
        """As `Criterion.scores`."""
        found = Magnitude().scores(known)
        squares = known.statistics.get(SQUARED_GRADIENT, {})
        if typical := _mean(squares, np.abs):
            for name, magnitude in found.items():
                curvature = np.abs(squares.get(name, np.float64(typical)), dtype=np.float64)
                found[name] = magnitude * np.sqrt(curvature)
        return found


def _mean(arrays: Arrays, of: np.ufunc) -> float:
    """The mean of a function over all values of all arrays; 0.0 without any."""
    total = sum(float(of(array, dtype=np.float64).sum()) for array in arrays.values())
    return total / max(1, sum(array.size for array in arrays.values()))


CRITERIA: dict[str, Criterion] = {
    "magnitude": Magnitude(),
    "taylor": Taylor(),
    "fisher": Fisher(),
}
"""By the name that a policy's `pruning_criterion` has."""
