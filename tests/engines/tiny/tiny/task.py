"""Targets and the local step; known in closed form, so the tests can compute the outcome."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NOISE = 0.1


def initial(rows: int) -> dict[str, NDArray[np.float32]]:
    """The arrays the server starts from."""
    rng = np.random.default_rng(99)
    return {
        "weight": rng.standard_normal((rows, 512), dtype=np.float32),
        "bias": np.zeros(rows, dtype=np.float32),
    }


def target(node: int, rows: int) -> dict[str, NDArray[np.float32]]:
    """What a node pulls towards: common to all nodes but for some noise of its own."""
    common, own = np.random.default_rng(0), np.random.default_rng(node + 1)
    return {
        name: common.standard_normal(array.shape, dtype=np.float32)
        + np.float32(NOISE) * own.standard_normal(array.shape, dtype=np.float32)
        for name, array in initial(rows).items()
    }


def step(array: NDArray[np.float32], goal: NDArray[np.float32]) -> NDArray[np.float32]:
    """Local training."""
    return array + np.float32(0.5) * (goal - array)
