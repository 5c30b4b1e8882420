"""Criteria: what is removed first.

A criterion scores weights by what is known of them. It is a function; the registry `CRITERIA` names
it, so that run configs and scenario files can; a new one is a function and an entry.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.pruning.statistics import (
    ACTIVATION,
    GRADIENT,
    SENSITIVITY,
    Statistics,
)

__all__ = ["CRITERIA", "Criterion", "Knowledge", "Scores"]

Scores = Mapping[str, NDArray[np.floating]]
"""Of weights, by tensor: 0 or above, in the tensor's shape; the lowest are removed first."""

_UNMOVED = 1e-3  # part of the root mean square update that weights no client moved are given
_VARIANCE = "running_var"


@dataclass(frozen=True)
class Knowledge:
    """What the server knows when a version is about to be published.

    Attributes:
        weights: the prunable tensors of the master, finite.
        update: the last aggregated update of them, *this master - the one published before*, for a
            criterion that uses it; lacks tensors that have no predecessor.
        statistics: the nodes' means of what the criterion asks for, where any node has sent it.
        accumulated: sums over all versions so far of what the criterion accumulates.
        model: all arrays of the model in their order, for a criterion that looks beside the
            weights; may be empty.
        seed: of whatever is drawn.
        ties: name of a tensor to that of the one before it that it is, where that is known; None
            where equal weights tell.
    """

    weights: Mapping[str, NDArray[np.floating]]
    update: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=dict)
    accumulated: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    model: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    seed: int = 0
    ties: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Criterion:
    """Scores weights; those that score lowest are removed first.

    Attributes:
        scores: for every tensor of `Knowledge.weights` scores of 0 or above, same shape, no NaN. A
            function of what is known alone, which gives some ranking while that lacks the update
            or statistics, as at the first version.
        uses_update: whether it needs the update; the server then keeps one master more.
        statistics: what nodes are asked to contribute, by name.
        once: whether they are asked before anything is pruned and never again, so that the ranking
            stays. The first version is dense then, whatever the schedule says.
        accumulates: made of what is known at a version, and summed over versions by tensor; needs
            `uses_update` if it is made of the update.
        uses_model: whether its scores look at `Knowledge.model`, which may be empty otherwise.
    """

    scores: Callable[[Knowledge], Scores]
    uses_update: bool = False
    statistics: tuple[str, ...] = ()
    once: bool = False
    accumulates: Callable[[Knowledge], Mapping[str, NDArray[np.floating]]] | None = None
    uses_model: bool = False


# -- by size --------------------------------------------------------------------------------------


def _magnitude(known: Knowledge) -> Scores:
    """The weight's absolute value (Han et al. 2015, section 3)."""
    return {name: np.abs(weight) for name, weight in known.weights.items()}


def _group_l2(known: Knowledge) -> Scores:
    """The L2 norm of a weight's output channel, the same for every weight of it.

    He et al. 2018 ("Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks",
    section 3), over the root of the channel's size, so that tensors of many inputs do not outrank
    others. A channel is a row of axis 0: of a convolution or linear layer an output, of an
    embedding a token, of a recurrent layer one gate of a unit. Ties go by position, so all but one
    channel of a tensor are removed whole or not at all.
    """
    return {name: _of_group(_group_sizes(w), w) for name, w in known.weights.items()}


def _batch_norm(known: Knowledge) -> Scores:
    """The absolute scale by which BatchNorm multiplies a weight's output channel.

    Liu et al. 2017 ("Learning Efficient Convolutional Networks through Network Slimming", section
    3). Which BatchNorm follows a tensor is told by order and names, see `_scales`. A tensor that
    none follows is ranked by `l2`, brought to where its root mean square is that of all scales.
    """
    scales = _scales(known)
    typical = _root_mean_square(scales)
    scores = {}
    for name, weight in known.weights.items():
        groups = scales.get(name)
        if groups is None:
            groups = _group_sizes(weight)
            size = _root_mean_square({name: groups})
            groups = groups * (typical / size) if typical and size else groups
        scores[name] = _of_group(groups, weight)
    return scores


def _group_sizes(weight: NDArray[np.floating]) -> NDArray[np.float64]:
    """Root mean square of every row of axis 0."""
    rows = weight.reshape(len(weight), -1)
    squares = np.square(rows, dtype=np.float64).sum(1)
    return np.asarray(np.sqrt(squares / max(1, rows.shape[1])))


def _of_group(groups: NDArray[np.floating], weight: NDArray[Any]) -> NDArray[np.floating]:
    return np.broadcast_to(groups.reshape(-1, *[1] * (weight.ndim - 1)), weight.shape)


def _scales(known: Knowledge) -> dict[str, NDArray[np.floating]]:
    """Absolute scales of the BatchNorm that follows a tensor, one value per output channel.

    A BatchNorm is what has a running variance beside its scale. It follows one of the tensors
    before it in the model that have as many output channels and no BatchNorm yet: the one of its
    own module whose name ends in the same number (``conv1``, ``bn1``), else the last.
    """
    found: dict[str, NDArray[np.floating]] = {}
    before: list[str] = []
    for name, array in known.model.items():
        if array.ndim >= 2:
            before.append(name)
        if not name.endswith(_VARIANCE):
            continue
        scale = known.model.get(name.removesuffix(_VARIANCE) + "weight")
        if scale is None or scale.shape != array.shape:
            continue
        fitting = [n for n in before if len(known.model[n]) == scale.size and n not in found]
        alike = [n for n in fitting if _place(n) == _place(name)]
        if fitting:
            found[(alike or fitting)[-1]] = np.abs(scale)
    return found


def _place(name: str) -> tuple[str, str]:
    """The module that a tensor's layer is in, and the number at the end of the layer's name."""
    parent, _, layer = name.rpartition(".")[0].rpartition(".")
    number = re.search(r"\d*$", layer)
    return parent, number[0] if number else ""


# -- by what removing costs -----------------------------------------------------------------------


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


def _activation(known: Knowledge) -> Scores:
    """Magnitude times the size of the input that the weight multiplies.

    Sun et al. 2024 ("A Simple and Effective Pruning Approach for Large Language Models", Wanda,
    equation 1), with the mean absolute value of an input channel for its L2 norm. They compare
    weights within an output; here the allocation says within what.
    """
    return _weighted(known, known.statistics.get(ACTIVATION, {}))


def _snip(known: Knowledge) -> Scores:
    """Connection sensitivity ``|w * gradient|`` at the start, before anything is pruned.

    Lee et al. 2019 ("SNIP: Single-shot Network Pruning Based on Connection Sensitivity", section
    4), the gradient taken over a mini-batch of every node. The weights in it are those of that
    time, so the ranking stays, and masks only ever lose weights. A tensor whose sensitivities no
    node sent ranks by magnitude, on the scale of the others.
    """
    found = {n: np.abs(s) for n, s in known.statistics.get(SENSITIVITY, {}).items()}
    scores = _magnitude(known)
    size = _root_mean_square({name: scores[name] for name in scores if name in found})
    typical = _root_mean_square(found)
    if not typical or not size:
        return scores
    factor = np.float64(typical / size)  # float16 times it may be all zeros
    return {name: found.get(name, score * factor) for name, score in scores.items()}


def _weighted(
    known: Knowledge, factors: Mapping[str, NDArray[np.floating]], least: float = 0.0
) -> Scores:
    """Magnitudes times factors; a tensor without any gets the root mean square of the others'."""
    scores = _magnitude(known)
    typical = np.float64(_root_mean_square(factors))
    if not typical:
        return scores
    return {
        name: magnitude * np.maximum(np.abs(factors.get(name, typical)), least * typical)
        for name, magnitude in scores.items()
    }


def _root_mean_square(arrays: Mapping[str, NDArray[np.floating]]) -> float:
    """Over all of them; 0 for none."""
    squares = sum(float(np.square(a, dtype=np.float64).sum()) for a in arrays.values())
    return float((squares / max(1, sum(a.size for a in arrays.values()))) ** 0.5)


# -- by where weights move ------------------------------------------------------------------------


def _movement(known: Knowledge) -> Scores:
    """How far a weight has moved away from zero, by the accumulated updates.

    Sanh et al. 2020 ("Movement Pruning: Adaptive Sparsity by Fine-Tuning", section 4): the sum over
    steps of ``-w * gradient``. A server sees no step's gradient: it sums over versions *the weight
    before, times the aggregated update*, which is that to first order in the learning rate, with
    all local steps of a round taken for one. Weights that moved towards zero are below 0, so
    everything is shifted by the lowest sum. Weights that nodes hold at zero do not move, and keep
    what they had.
    """
    if not any(moved.any() for moved in known.accumulated.values()):
        return _magnitude(known)
    sums = {n: known.accumulated.get(n, np.zeros(w.shape)) for n, w in known.weights.items()}
    lowest = min(moved.min(initial=0.0) for moved in sums.values())
    return {name: moved - lowest for name, moved in sums.items()}


def _moved(known: Knowledge) -> dict[str, NDArray[np.floating]]:
    """In float32, since the server keeps the sums."""
    before = {name: known.weights[name] - update for name, update in known.update.items()}
    return {n: np.asarray(before[n] * update, np.float32) for n, update in known.update.items()}


# -- by chance ------------------------------------------------------------------------------------


def _random(known: Knowledge) -> Scores:
    """Drawn from the seed and the tensor's name alone, so the ranking is that of every version.

    The control that a criterion has to beat (Gale et al. 2019, "The State of Sparsity in Deep
    Neural Networks").
    """
    return {
        name: np.random.default_rng([known.seed, zlib.crc32(name.encode())]).random(weight.shape)
        for name, weight in known.weights.items()
    }


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(_magnitude),
    "l2": Criterion(_group_l2),
    "batch-norm": Criterion(_batch_norm, uses_model=True),
    "taylor": Criterion(_taylor, uses_update=True),
    "fisher": Criterion(_fisher, statistics=(GRADIENT,)),
    "movement": Criterion(_movement, uses_update=True, accumulates=_moved),
    "snip": Criterion(_snip, statistics=(SENSITIVITY,), once=True),
    "activation": Criterion(_activation, statistics=(ACTIVATION,)),
    "random": Criterion(_random),
}
"""By the name that a policy's `pruning_criterion` has."""
