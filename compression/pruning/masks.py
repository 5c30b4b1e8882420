"""Masks: made from scores, and held for the trainer of a model that has them.

A mask is a boolean array of its tensor's shape, True where a weight is kept. The server makes masks
from a criterion's scores by an *allocation*. They never travel: in a published model the mask of a
pruned tensor is where its integers are not zero (`PublishedModel.masks`). A node holds them while
its ClientApp handles a message, and takes the statistics that the ClientApp contributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "Masks",
    "Scores",
    "contribute_statistics",
    "current_masks",
    "holding",
    "wanted_statistics",
]

Masks = Mapping[str, NDArray[np.bool_]]
Scores = Mapping[str, NDArray[np.floating]]
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


@dataclass(frozen=True)
class _Handled:
    """What belongs to the message being handled."""

    masks: Masks = field(default_factory=dict)
    wanted: tuple[str, ...] = ()
    contributed: dict[str, Mapping[str, NDArray[Any]]] = field(default_factory=dict)


_current: ContextVar[_Handled] = ContextVar("prunecast_pruning", default=_Handled())  # noqa: B039


def current_masks() -> dict[str, NDArray[np.bool_]]:
    """Masks of the pruned tensors of the model in the message being handled.

    Returns:
        Tensor name to boolean array, True where a weight is kept; empty without the mod, or
        while nothing is pruned yet.
    """
    return dict(_current.get().masks)


def wanted_statistics() -> tuple[str, ...]:
    """Names of the statistics that the server asks for with the message being handled."""
    return _current.get().wanted


def contribute_statistics(name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Send a statistic with the reply to the message being handled; ignored unless it is wanted.

    Args:
        name: of the statistic, see `wanted_statistics`.
        arrays: tensor name to one finite value per weight, in the tensor's shape; the server
            refuses the reply otherwise. Tensors may be left out.
    """
    if name in wanted_statistics():
        _current.get().contributed[name] = dict(arrays)


@contextmanager
def holding(
    masks: Masks, wanted: tuple[str, ...] = ()
) -> Iterator[dict[str, Mapping[str, NDArray[Any]]]]:
    """Make `masks` the current ones for the duration of a ClientApp's function.

    Args:
        masks: of the model that it is given.
        wanted: names of the statistics that the server asked for.

    Yields:
        What has been contributed, by statistic and tensor.
    """
    token = _current.set(handled := _Handled(masks, wanted))
    try:
        yield handled.contributed
    finally:
        _current.reset(token)
