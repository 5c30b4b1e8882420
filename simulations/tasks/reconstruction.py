"""What went in, given back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.kinds import DataError
from prunecast.simulations.tasks.regression import Regression

__all__ = ["Reconstruction"]


@dataclass(frozen=True)
class Reconstruction(Regression):
    """Outputs are of the shape of the first input, which is the target; the data's are not used.

    Measured by the mean squared error; loss and tolerance are those of a regression.
    """

    metric = "mse"
    verb = "reconstructed"

    def targets_of(self, inputs: Mapping[str, NDArray[Any]], stored: NDArray[Any]) -> NDArray[Any]:
        """The first input."""
        return next(iter(inputs.values()))

    def targets(self, raw: NDArray[Any]) -> NDArray[np.float32]:
        """Numbers as float32, of the shape of the input."""
        if raw.dtype.kind != "f":
            raise DataError(
                f"the first input, which is to be reconstructed, is {raw.dtype}: convert it to "
                "float32, with data.dtype = 'float32' where the data are a file"
            )
        if raw.ndim == 1:
            raise DataError("the first input is one number for each example: choose another task")
        return super().targets(raw)

    def check(self, outputs: NDArray[Any], targets: NDArray[Any]) -> None:
        """Outputs have the shape of the input."""
        if outputs.shape[1:] != targets.shape[1:]:
            raise DataError(
                f"the model returns {list(outputs.shape[1:])} for an input of "
                f"{list(targets.shape[1:])}: return the shape that went in"
            )

    def groups(self, targets: NDArray[Any]) -> NDArray[np.int64]:
        """Which tenth of the examples the mean of the input belongs to, 0 for the smallest ones."""
        return super().groups(targets.reshape(len(targets), -1).mean(axis=1))

    def score(self, outputs: NDArray[Any], targets: NDArray[Any]) -> float:
        """Mean squared error, in the square of the input's unit."""
        return float(np.mean(np.square(outputs.astype(np.float64) - targets)))
