"""Masks: made from scores, and held for the trainer of a model that has them.

A mask is a boolean array of its tensor's shape, True where a weight is kept. The server makes masks
from a criterion's scores by an *allocation*. They never travel: in a published model the mask of a
pruned tensor is where its integers are not zero (`PublishedModel.masks`). A node holds them as
the current ones while its ClientApp handles a message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALLOCATIONS", "Allocation", "Masks", "Scores", "current_masks", "holding"]

Masks = Mapping[str, NDArray[np.bool_]]
Scores = Mapping[str, NDArray[np.floating]]


class Allocation(Protocol):
    """How a sparsity is spread over tensors: masks that keep what scores highest.

    Ties are broken by position, earlier first, so the number of removed weights is exact and two
    machines with the same scores make the same masks.
    """

    def __call__(self, scores: Scores, sparsity: float) -> dict[str, NDArray[np.bool_]]:
        """A mask per tensor, same shapes.

        Args:
            scores: of the prunable tensors, any shapes, no NaN.
            sparsity: fraction to remove, 0 <= sparsity < 1; rounded down to whole weights.

        Raises:
            ValueError: the sparsity is outside its range.
        """


def _per_layer(scores: Scores, sparsity: float) -> dict[str, NDArray[np.bool_]]:
    """The same fraction of every tensor (Han et al. 2015, section 3)."""
    return {n: _keep_highest(s.ravel(), sparsity).reshape(s.shape) for n, s in scores.items()}


def _globally(scores: Scores, sparsity: float) -> dict[str, NDArray[np.bool_]]:
    """One ranking over all tensors: those that matter little give more."""
    flat = [score.ravel().astype(np.float64) for score in scores.values()]
    kept = _keep_highest(np.concatenate(flat or [np.zeros(0)]), sparsity)
    parts = np.split(kept, np.cumsum([score.size for score in flat])[:-1])
    return {n: part.reshape(s.shape) for (n, s), part in zip(scores.items(), parts, strict=False)}


def _keep_highest(scores: NDArray[np.floating], sparsity: float) -> NDArray[np.bool_]:
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


ALLOCATIONS: dict[str, Allocation] = {"layer": _per_layer, "global": _globally}
"""By the name that a policy's `pruning_scope` has."""

_current: ContextVar[Masks | None] = ContextVar("prunecast_masks", default=None)


def current_masks() -> dict[str, NDArray[np.bool_]]:
    """Masks of the pruned tensors of the model in the message being handled.

    Returns:
        Tensor name to boolean array, True where a weight is kept; empty without the mod, or
        while nothing is pruned yet.
    """
    return dict(_current.get() or {})


@contextmanager
def holding(masks: Masks) -> Iterator[None]:
    """Make `masks` the current ones for the duration of a ClientApp's function."""
    token = _current.set(masks)
    try:
        yield
    finally:
        _current.reset(token)
