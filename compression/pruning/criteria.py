"""Criteria: what is removed first.

A criterion scores weights by what the server knows. It is a function; the registry `CRITERIA` names
it, so that run configs and scenario files can; a new one is a function and an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.pruning.statistics import GRADIENT, Statistics

__all__ = ["CRITERIA", "Criterion", "Knowledge", "Scores"]

Scores = Mapping[str, NDArray[np.floating]]
"""Of weights, by tensor: 0 or above, in the tensor's shape; the lowest are removed first."""

_UNMOVED = 1e-3  # part of the root mean square update that weights no client moved are given


@dataclass(frozen=True)
class Knowledge:
    """What the server knows when a version is about to be published.

    Attributes:
        weights: the prunable tensors of the master, finite.
        update: the last aggregated update of them, *this master - the one published before*, for a
            criterion that uses it; lacks tensors that have no predecessor.
        statistics: the nodes' means of what the criterion asks for, where any node has sent it.
    """

    weights: Mapping[str, NDArray[np.floating]]
    update: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=dict)


@dataclass(frozen=True)
class Criterion:
    """Scores weights; those that score lowest are removed first.

    Attributes:
        scores: for every tensor of `Knowledge.weights` scores of 0 or above, same shape, no NaN. A
            function of what is known alone, which gives some ranking while that lacks the update
            or statistics, as at the first version.
        uses_update: whether it needs the update; the server then keeps one master more.
        statistics: what nodes are asked to contribute, by name.
    """

    scores: Callable[[Knowledge], Scores]
    uses_update: bool = False
    statistics: tuple[str, ...] = ()


def _magnitude(known: Knowledge) -> Scores:
    """The weight's absolute value (Han et al. 2015, section 3)."""
    return {name: np.abs(weight) for name, weight in known.weights.items()}


def _taylor(known: Knowledge) -> Scores:
    """First-order estimate of the loss that removing a weight costs: ``|w * gradient|``.

    Molchanov et al. 2019 ("Importance Estimation for Neural Network Pruning", equation 8, without
    the square, which ranks the same). The gradient is the last aggregated update, as server
    optimisers take it (Reddi et al. 2021). Weights it left alone rank among themselves by size.
    """
    return _weighted(known, known.update, least=_UNMOVED)


def _fisher(known: Knowledge) -> Scores:
    """Second-order estimate of that cost, curvature taken from the nodes' gradients.

    ``w**2 * mean(gradient**2) / 2`` (Theis et al. 2018, "Faster gaze prediction with dense networks
    and Fisher pruning", equation 9), as its square root, which ranks the same.
    """
    return _weighted(known, known.statistics.get(GRADIENT, {}))


def _weighted(
    known: Knowledge, factors: Mapping[str, NDArray[np.floating]], least: float = 0.0
) -> Scores:
    """Magnitudes times factors; a tensor without any gets the root mean square of the others'."""
    scores = _magnitude(known)
    squares = sum(float(np.square(f, dtype=np.float64).sum()) for f in factors.values())
    typical = np.float64((squares / max(1, sum(f.size for f in factors.values()))) ** 0.5)
    if not typical:
        return scores
    return {
        name: magnitude * np.maximum(np.abs(factors.get(name, typical)), least * typical)
        for name, magnitude in scores.items()
    }


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(_magnitude),
    "taylor": Criterion(_taylor, uses_update=True),
    "fisher": Criterion(_fisher, statistics=(GRADIENT,)),
}
"""By the name that a policy's `pruning_criterion` has."""
