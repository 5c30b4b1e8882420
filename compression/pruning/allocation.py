"""Allocations: how a sparsity is spread over tensors, given their scores.

Functions, with a registry by name (`ALLOCATIONS`); a new one is a function and an entry. The number
of weights that are removed is exact, ties go by position, and no tensor is emptied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.pruning.criteria import Scores

__all__ = ["ALLOCATIONS", "Allocation", "keep_highest", "kernel_numbers", "of_the_rest"]

Allocation = Callable[[Scores, float], dict[str, NDArray[np.bool_]]]
"""From scores of 0 or above and a sparsity, 0 <= sparsity < 1, to a mask per tensor.

Raises ValueError for another sparsity, or for one that leaves fewer weights than tensors.
"""


def keep_highest(scores: NDArray[np.floating], remove: int) -> NDArray[np.bool_]:
    """Where the scores are that stay when so many are removed.

    Ties go by position, earlier first: the number is exact, and every machine agrees.

    Args:
        scores: one axis, no NaN.
        remove: how many, 0 to all.
    """
    keep = np.ones(scores.size, dtype=np.bool_)
    if remove == 0:
        return keep
    threshold = np.partition(scores, remove - 1)[remove - 1]
    keep[scores < threshold] = False
    tied = np.flatnonzero(scores == threshold)
    surplus = remove - int(scores.size - np.count_nonzero(keep))
    keep[tied[tied.size - surplus :]] = False
    return keep


def _removed(size: int, sparsity: float, tensors: int) -> int:
    """How many of `size` weights are removed, so that each of some tensors can keep one."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), not {sparsity}")
    remove = int(sparsity * size)
    if size - remove < tensors:
        raise ValueError(
            f"sparsity {sparsity} leaves {size - remove} of {size} for {tensors} tensors, so a "
            "layer would vanish: lower it, or exclude tensors"
        )
    return remove


def of_the_rest(
    scores: Scores, kept: Mapping[str, NDArray[np.bool_]], sparsity: float, unit: int = 1
) -> tuple[Scores, float]:
    """Scores of tensors that have no mask yet, and their sparsity for that of all to be exact.

    Args:
        scores: of all tensors.
        kept: masks of some of them, which stay.
        sparsity: of all tensors.
        unit: how many weights stay or go as one.
    """
    rest = {name: score for name, score in scores.items() if name not in kept}
    size = sum(score.size for score in rest.values()) // unit
    gone = sum(np.count_nonzero(~kept[name]) for name in scores if name in kept) // unit
    remove = int(sparsity * (sum(score.size for score in scores.values()) // unit)) - gone
    return rest, (min(max(0, remove), size - len(rest)) + 0.5) / size if size else 0.0


# -- the same share ------------------------------------------------------------------------------


def _per_layer(scores: Scores, sparsity: float) -> dict[str, NDArray[np.bool_]]:
    """The same fraction of every tensor (Han et al. 2015, section 3)."""
    return {
        name: keep_highest(s.ravel(), _removed(s.size, sparsity, min(1, s.size))).reshape(s.shape)
        for name, s in scores.items()
    }


def _by_kernel(scores: Scores, sparsity: float) -> dict[str, NDArray[np.bool_]]:
    """Less of tensors that have few weights for their inputs and outputs, see `kernel_numbers`."""
    numbers = kernel_numbers({n: score.shape for n, score in scores.items()}, sparsity)
    return {
        name: keep_highest(score.ravel(), score.size - numbers.get(name, 0)).reshape(score.shape)
        for name, score in scores.items()
    }


def kernel_numbers(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, int]:
    """How many weights each tensor keeps under Erdős-Rényi-Kernel; empty tensors are left out.

    Evci et al. 2020, "Rigging the Lottery", section 3 and appendix: the density of a tensor is in
    proportion to the sum of its axes over their product. Tensors that would be denser than 1 stay
    dense, and the others are scaled anew, until none would.

    Raises:
        ValueError: another sparsity than 0 <= sparsity < 1, or fewer weights than tensors are left.
    """
    size = {name: math.prod(shape) for name, shape in shapes.items() if math.prod(shape)}
    shapes = {name: shapes[name] for name in size}
    kept = sum(size.values()) - _removed(sum(size.values()), sparsity, len(shapes))
    weight = {name: float(sum(shape)) for name, shape in shapes.items()}  # density * size
    dense: set[str] = set()
    while True:
        left = kept - sum(size[name] for name in dense)
        unit = left / (sum(weight[name] for name in shapes.keys() - dense) or 1.0)
        over = {name for name in shapes.keys() - dense if unit * weight[name] > size[name]}
        if not over:
            break
        dense |= over
    shares = {n: float(size[n]) if n in dense else unit * weight[n] for n in shapes}
    return _whole(shares, size, kept)


def _whole(shares: dict[str, float], size: dict[str, int], total: int) -> dict[str, int]:
    """Whole numbers near the shares, from 1 to a tensor's size, with the given sum."""
    found = {name: min(size[name], max(1, int(share))) for name, share in shares.items()}
    while (left := total - sum(found.values())) != 0:
        step = 1 if left > 0 else -1
        free = [n for n in found if (found[n] < size[n] if left > 0 else found[n] > 1)]
        furthest = max(free, key=lambda name: step * (shares[name] - found[name]))
        found[furthest] += step
    return found


# -- one ranking ----------------------------------------------------------------------------------


def _globally(scores: Scores, sparsity: float) -> dict[str, NDArray[np.bool_]]:
    """One ranking over all tensors: those that matter little give more, all but their highest."""
    # joining widens where dtypes differ, which ranks the same
    flat = np.concatenate([score.ravel() for score in scores.values()] or [np.zeros(0)])
    ends = np.cumsum([score.size for score in scores.values()], dtype=np.int64)
    parts = [part for part in np.split(flat, ends[:-1]) if part.size]
    remove = _removed(flat.size, sparsity, len(parts))
    for part in parts:  # views
        part[part.argmax()] = np.inf
    kept = np.split(keep_highest(flat, remove), ends[:-1])
    return {n: part.reshape(s.shape) for (n, s), part in zip(scores.items(), kept, strict=False)}


def _layer_adaptively(scores: Scores, sparsity: float) -> dict[str, NDArray[np.bool_]]:
    """One ranking over all tensors, of what removing a score takes of all that is left of its own.

    LAMP (Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning", equation 4): a
    squared score over the sum of those in its tensor that are not smaller. The largest of a tensor
    counts 1, so that none is emptied, whatever the scale of its scores.
    """
    return _globally({name: _share(score) for name, score in scores.items()}, sparsity)


def _by_sensitivity(scores: Scores, sparsity: float) -> dict[str, NDArray[np.bool_]]:
    """The same share of the sum of every tensor's squared scores.

    A tensor is sensitive where even the weights that it can spare most carry much of its score: few
    are removed where scores are alike, many where a few of them stand out. Han et al. 2015 (section
    5) gave more sensitive layers smaller thresholds, by the accuracy that each lost when it alone
    was pruned; here the criterion's own estimate, a layer's relative distortion, stands in for what
    they measured. So the idea is theirs, and the rule is this project's.
    """
    return _globally({name: _share(score, lost=True) for name, score in scores.items()}, sparsity)


def _share(score: NDArray[np.floating], *, lost: bool = False) -> NDArray[np.float64]:
    """A squared score over the sum of those in its tensor that are not smaller.

    With `lost`: the sum of those that are not larger, over that of all.
    """
    flat = score.ravel().astype(np.float64)
    largest = flat.max(initial=0.0)
    if largest:
        flat /= largest  # squares neither overflow nor vanish
    order = np.argsort(-flat, kind="stable")
    falling = np.square(flat[order])
    ranked = np.empty_like(flat)
    if lost:
        rising = np.cumsum(falling[::-1])[::-1]
        ranked[order] = rising / max(rising.max(initial=0.0), np.finfo(np.float64).tiny)
    else:
        ranked[order] = falling / np.maximum(np.cumsum(falling), np.finfo(np.float64).tiny)
    return ranked.reshape(score.shape)


ALLOCATIONS: dict[str, Allocation] = {
    "layer": _per_layer,
    "global": _globally,
    "lamp": _layer_adaptively,
    "erk": _by_kernel,
    "sensitivity": _by_sensitivity,
}
"""By the name that a policy's `pruning_scope` has."""
