"""Which weights to remove: the smallest in magnitude, per layer or over the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Scope", "magnitude_masks"]

Scope = Literal["layer", "global"]


def magnitude_masks(
    weights: Mapping[str, NDArray[np.floating]], sparsity: float, *, scope: Scope = "layer"
) -> dict[str, NDArray[np.bool_]]:
    """Keep the largest weights by magnitude (Han et al. 2015, section 3).

    Ties are broken by position, earlier first, so the number of removed weights is exact and two
    machines with the same weights get the same masks.

    Args:
        weights: the prunable tensors, any shapes, finite.
        sparsity: fraction to remove, 0 <= sparsity < 1; rounded down to whole weights.
        scope: "layer" removes that fraction of every tensor, "global" of all of them together.

    Returns:
        A mask per tensor, same shapes; True is kept.

    Examples:
        >>> magnitude_masks({"w": np.array([3.0, -1.0, 0.5, -4.0])}, 0.5)["w"].tolist()
        [True, False, False, True]
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), not {sparsity}")
    magnitudes = {name: np.abs(weight).ravel() for name, weight in weights.items()}
    if scope == "layer":
        kept = {name: _keep_largest(m, sparsity) for name, m in magnitudes.items()}
    else:
        joined = _keep_largest(
            np.concatenate([m.astype(np.float64) for m in magnitudes.values()] or [np.zeros(0)]),
            sparsity,
        )
        splits = np.cumsum([m.size for m in magnitudes.values()])[:-1]
        kept = dict(zip(magnitudes, np.split(joined, splits), strict=True)) if magnitudes else {}
    return {name: kept[name].reshape(weight.shape) for name, weight in weights.items()}


def _keep_largest(magnitude: NDArray[np.floating], sparsity: float) -> NDArray[np.bool_]:
    remove = int(sparsity * magnitude.size)
    keep = np.ones(magnitude.size, dtype=np.bool_)
    if remove == 0:
        return keep
    threshold = np.partition(magnitude, remove - 1)[remove - 1]
    keep[magnitude < threshold] = False
    tied = np.flatnonzero(magnitude == threshold)
    surplus = remove - int(magnitude.size - np.count_nonzero(keep))
    keep[tied[tied.size - surplus :]] = False
    return keep
