"""A loss and a measure of the user's own, named as ``package.module:function``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.kinds import DataError, Matches, Range, ScenarioError, function_named
from prunecast.simulations.tasks import Task
from prunecast.simulations.tasks.regression import Regression

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Function"]

# what the rounds of a result hold besides
_TAKEN = "loss|round|sparsity|seconds|bytes_up|bytes_down"


@dataclass(frozen=True)
class Function(Task):
    """What two functions say of outputs and targets; targets are free in shape.

    Whole numbers become int64, others float32. Partitions are skewed by targets that are one whole
    number for each example, or by tenths of the first number.

    Attributes:
        loss: ``package.module:function`` of outputs and targets as tensors; a scalar tensor, the
            mean over the batch.
        score_function: likewise, of them as arrays; a number.
        metric: name of what it measures.
        better: whether "higher" or "lower" is better.
        unit: "fraction" is read in percent, "number" as it is.
        tolerance: how far a device may be off, relative to the largest output of the server.
    """

    loss: str = ""
    score_function: str = ""
    metric: Annotated[  # type: ignore[misc]
        str, Matches(rf"(?!(?:{_TAKEN})$)[a-z][a-z0-9_]*", "use a-z 0-9 _, and no other key's name")
    ] = "score"
    better: Literal["higher", "lower"] = "higher"
    unit: Literal["fraction", "number"] = "number"
    tolerance: Annotated[float, Range(0, above=True)] = 1e-4

    @property
    def percent(self) -> bool:  # type: ignore[override]
        """Whether the score is a fraction."""
        return self.unit == "fraction"

    @property
    def lower_is_better(self) -> bool:  # type: ignore[override]
        """Whether a smaller score is a better one."""
        return self.better == "lower"

    def targets(self, raw: NDArray[Any]) -> NDArray[Any]:
        """Whole numbers as int64, others as float32; the functions can be imported."""
        for key in ("loss", "score_function"):
            self._function(key)
        if raw.dtype.kind not in "biuf" or not np.all(np.isfinite(raw)):
            raise DataError(f"targets must be finite numbers, these are {raw.dtype}: correct them")
        return raw.astype(np.float32 if raw.dtype.kind == "f" else np.int64)

    def groups(self, targets: NDArray[Any]) -> NDArray[np.int64]:
        """The targets, or tenths of the first number of each."""
        if targets.dtype.kind == "i" and targets.ndim == 1:
            return np.unique(targets, return_inverse=True)[1].astype(np.int64)
        return Regression().groups(targets)

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What the user's loss says."""
        loss: Tensor = self._function("loss")(outputs, targets)
        return loss

    def score(self, outputs: NDArray[Any], targets: NDArray[Any]) -> float:
        """What the user's measure says."""
        return float(self._function("score_function")(outputs, targets))

    def different(self, server: NDArray[Any], device: NDArray[Any]) -> NDArray[np.int64]:
        """Examples of which a value is further off than the tolerance, or not a number."""
        return Regression(tolerance=self.tolerance).different(server, device)

    def _function(self, key: str) -> Callable[..., Any]:
        name: str = getattr(self, key)
        if not name:
            remedy = 'kind = "function" calls it: name it as package.module:function'
            raise ScenarioError(f"task.{key}", "is missing", remedy)
        return function_named(name, f"task.{key}")
