"""Allocations: how a sparsity is spread over tensors, given their scores.

Functions, with a registry by name (`ALLOCATIONS`); a new one is a function and an entry.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.pruning.criteria import Scores

__all__ = ["ALLOCATIONS", "Allocation"]

Allocation = Callable[[Scores, float], dict[str, NDArray[np.bool_]]]
"""From scores of 0 or above and a sparsity, 0 <= sparsity < 1, to a mask per tensor."""


def _per_layer(scores: Scores, sparsity: float) -> dict[str, NDArray[np.bool_]]:
    """The same fraction of every tensor (Han et al. 2015, section 3)."""
    return {n: _keep_highest(s.ravel(), sparsity).reshape(s.shape) for n, s in scores.items()}


def _globally(scores: Scores, sparsity: float) -> dict[str, NDArray[np.bool_]]:
    """One ranking over all tensors: those that matter little give more."""
    # joining widens where dtypes differ, which ranks the same
    flat = [score.ravel() for score in scores.values()]
    kept = _keep_highest(np.concatenate(flat or [np.zeros(0)]), sparsity)
    parts = np.split(kept, np.cumsum([score.size for score in flat])[:-1])
    return {n: part.reshape(s.shape) for (n, s), part in zip(scores.items(), parts, strict=False)}


def _layer_adaptively(scores: Scores, sparsity: float) -> dict[str, NDArray[np.bool_]]:
    """One ranking over all tensors, of what removing a score takes of all that is left of its own.

    LAMP (Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning", equation 4): a
    squared score over the sum of those in its tensor that are not smaller. The largest of a tensor
    counts 1, so that none is emptied, whatever the scale of its scores.
    """
    return _globally({name: _lamp(score) for name, score in scores.items()}, sparsity)


def _lamp(score: NDArray[np.floating]) -> NDArray[np.float64]:
    flat = score.ravel().astype(np.float64)
    largest = flat.max(initial=0.0)
    if largest:
        flat /= largest  # squares neither overflow nor vanish
    order = np.argsort(-flat, kind="stable")
    falling = np.square(flat[order])
    ranked = np.empty_like(flat)
    ranked[order] = falling / np.maximum(np.cumsum(falling), np.finfo(np.float64).tiny)
    return ranked.reshape(score.shape)


def _keep_highest(scores: NDArray[np.floating], sparsity: float) -> NDArray[np.bool_]:
    """Ties go by position, earlier first: the number is exact, and every machine agrees."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), not {sparsity}")
    remove = int(sparsity * scores.size)
    keep = np.ones(scores.size, dtype=np.bool_)
    if remove == 0:
        return keep
    threshold = np.partition(scores, remove - 1)[remove - 1]
    keep[scores < threshold] = False
    tied = np.flatnonzero(scores == threshold)
    surplus = remove - int(scores.size - np.count_nonzero(keep))
    keep[tied[tied.size - surplus :]] = False
    return keep


ALLOCATIONS: dict[str, Allocation] = {
    "layer": _per_layer,
    "global": _globally,
    "lamp": _layer_adaptively,
}
"""By the name that a policy's `pruning_scope` has."""
