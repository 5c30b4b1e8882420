"""Masks of tensors' axes: where what remains lies, and one after another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.pruning.plan import PlanError

__all__ = ["Axes", "beyond", "composed", "is_of", "of_another_shape", "places_of"]

Axes = tuple[NDArray[np.bool_] | None, ...]
"""For each axis of a tensor a mask, True where it remains; None where all of it does."""


def places_of(name: str, shape: tuple[int, ...], axes: Axes) -> tuple[NDArray[np.intp], ...]:
    """Where what remains of a tensor lies."""
    if not is_of(axes, shape):
        raise of_another_shape(name, shape)
    return np.ix_(*(
        np.arange(n) if mask is None else np.flatnonzero(mask)
        for n, mask in zip(shape, axes, strict=True)
    ))  # fmt: skip


def is_of(axes: Axes, shape: tuple[int, ...]) -> bool:
    """Whether masks are of a tensor of this shape."""
    sizes = tuple(n if mask is None else mask.size for n, mask in zip(shape, axes, strict=False))
    return len(axes) == len(shape) and sizes == shape


def of_another_shape(name: str, shape: tuple[int, ...]) -> PlanError:
    """The error that says so of a tensor."""
    return PlanError(f"tensor {name!r} is {list(shape)}, the plan was made for another shape")


def composed(
    name: str, before: NDArray[np.bool_] | None, after: NDArray[np.bool_] | None
) -> NDArray[np.bool_] | None:
    """One mask for what a second one leaves of what the first left.

    Raises:
        PlanError: the second is of another number of places than the first left.
    """
    if before is None or after is None:
        return after if before is None else before
    if after.size != np.count_nonzero(before):
        raise PlanError(f"tensor {name!r}: the later plan is of another number of channels")
    both = np.zeros(before.size, np.bool_)
    both[before] = after
    return both


def beyond(
    name: str, before: NDArray[np.bool_] | None, now: NDArray[np.bool_] | None
) -> NDArray[np.bool_] | None:
    """What a mask removes beyond an earlier one, as a mask of what that left; None for nothing.

    Raises:
        PlanError: it keeps what the earlier one removed.
    """
    if before is None:
        return now
    if now is None or now.size != before.size or (now & ~before).any():
        raise PlanError(f"the plan keeps channels of tensor {name!r} that are gone")
    left = now[before]
    return None if left.all() else left
