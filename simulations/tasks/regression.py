"""Numbers for each example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.kinds import DataError, Range
from prunecast.simulations.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Regression"]

_GROUPS = 10


@dataclass(frozen=True)
class Regression(Task):
    """Outputs and targets are numbers of one shape; measured by the mean absolute error.

    Attributes:
        loss: "mse" (squared error), "mae" (absolute error) or "huber".
        tolerance: how far a device may be off, relative to the largest output of the server.
    """

    loss: Literal["mse", "mae", "huber"] = "mse"
    tolerance: Annotated[float, Range(0, above=True)] = 1e-4

    metric = "mae"
    lower_is_better = True
    verb = "estimated"

    def targets(self, raw: NDArray[Any]) -> NDArray[np.float32]:
        """Numbers as float32, (examples, values): a single value is (examples, 1)."""
        if raw.dtype.kind not in "iuf" or not np.all(np.isfinite(raw)):
            raise DataError(f"targets must be finite numbers, these are {raw.dtype}: correct them")
        found = np.asarray(raw, dtype=np.float32)
        return found[:, None] if found.ndim == 1 else found

    def check(self, outputs: NDArray[Any], targets: NDArray[Any]) -> None:
        """Outputs and targets of an example have one shape; torch would stretch others."""
        if outputs.shape[1:] != targets.shape[1:]:
            raise DataError(
                f"the model returns {list(outputs.shape[1:])} numbers for an example, the targets "
                f"are {list(targets.shape[1:])}: return as many, a single one as (examples, 1)"
            )

    def groups(self, targets: NDArray[Any]) -> NDArray[np.int64]:
        """Which tenth of the examples the first value belongs to, 0 for the smallest ones."""
        first = targets.reshape(len(targets), -1)[:, 0]
        inner = np.quantile(first, np.linspace(0, 1, _GROUPS + 1)[1:-1])
        return np.searchsorted(inner, first, side="right").astype(np.int64)

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss that is named."""
        from torch.nn import functional

        names = {"mse": "mse_loss", "mae": "l1_loss", "huber": "huber_loss"}
        loss: Tensor = getattr(functional, names[self.loss])(outputs, targets)
        return loss

    def score(self, outputs: NDArray[Any], targets: NDArray[Any]) -> float:
        """Mean absolute error, in the unit of the targets."""
        return float(np.mean(np.abs(outputs.astype(np.float64) - targets)))

    def different(self, server: NDArray[Any], device: NDArray[Any]) -> NDArray[np.int64]:
        """Examples of which a value is further off than the tolerance, or not a number."""
        allowed = self.tolerance * float(np.max(np.abs(server)))
        off = np.abs(server.astype(np.float64) - device).reshape(len(server), -1)
        return np.flatnonzero(~np.all(off <= allowed, axis=1))
