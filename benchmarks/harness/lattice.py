"""Weights on a lattice, pruning and quantised updates, as the default policy does them.

Written out here and not taken from the library, so that the measured integers stay the same
when the library's policies change, and two releases can be compared on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Integers", "Lattice", "cubic", "is_prunable", "masked_update", "steps_of"]

Floats = dict[str, NDArray[np.float32]]
Integers = dict[str, NDArray[np.int32]]

DOWN_STEP = 0.1  # of a tensor's standard deviation
VECTOR_STEP = 0.25  # of that again, for biases and norms
UP_STEP = 3.0  # of the root mean square of a tensor's change
DEAD_ZONE = 0.6  # of a step
PRUNABLE = 1024  # elements


def cubic(final: float, at: int, end: int) -> float:
    """Sparsity in round `at` of `end` (Zhu & Gupta 2017, section 3)."""
    return final * (1 - (1 - min(1.0, at / end)) ** 3)


def steps_of(weights: Mapping[str, NDArray[np.float32]]) -> dict[str, float]:
    """A lattice step per tensor."""
    return {
        k: float(np.float32(DOWN_STEP * max(float(v.std()), 1e-3)))
        * (1.0 if v.ndim > 1 else VECTOR_STEP)
        for k, v in weights.items()
    }


def is_prunable(values: NDArray[Any]) -> bool:
    """Whether a tensor is pruned: a matrix or kernel of some size."""
    return values.ndim > 1 and values.size >= PRUNABLE


class Lattice:
    """Publishes integers from master weights, pruned by magnitude over the whole model."""

    def __init__(self, weights: Floats) -> None:
        self.steps = steps_of(weights)

    def publish(self, master: Floats, sparsity: float) -> Integers:
        """Integers of every tensor; a pruned weight is zero."""
        prunable = [k for k, v in master.items() if is_prunable(v)]
        threshold = -1.0
        if sparsity > 0:
            sizes = np.concatenate([np.abs(master[k]).ravel() for k in prunable])
            threshold = float(np.quantile(sizes, sparsity))
        out = {}
        for k, v in master.items():
            q = np.rint(v / self.steps[k]).astype(np.int32)
            out[k] = q * (np.abs(v) > threshold) if k in prunable else q
        return out

    def values(self, q: Integers) -> Floats:
        """The published weights."""
        return {k: v.astype(np.float32) * np.float32(self.steps[k]) for k, v in q.items()}


def masked_update(change: Floats, mask: Mapping[str, NDArray[np.bool_]]) -> tuple[Integers, Floats]:
    """Quantised change under the mask, and what quantisation dropped there."""
    sent, dropped = {}, {}
    for k, v in change.items():
        kept = v * mask[k] if k in mask else v
        count = int(mask[k].sum()) if k in mask else v.size
        rms = float(np.sqrt(np.square(kept, dtype=np.float64).sum() / max(count, 1)))
        step = max(UP_STEP * rms, 1e-30)
        z = np.sign(kept) * np.floor(np.abs(kept) / step + 1 - DEAD_ZONE)
        sent[k] = z.astype(np.int32)
        dropped[k] = (kept - z * step).astype(np.float32)
    return sent, dropped
