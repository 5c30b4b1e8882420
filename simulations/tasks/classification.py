"""One label of several for each example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.kinds import DataError
from prunecast.simulations.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Classification"]


@dataclass(frozen=True)
class Classification(Task):
    """Outputs are logits (examples, classes), targets labels; a device must pick the same class."""

    metric = "accuracy"
    percent = True
    verb = "classified"

    def targets(self, raw: NDArray[Any]) -> NDArray[np.int64]:
        """Labels as int64, (examples,)."""
        if raw.ndim != 1 or raw.dtype.kind not in "iu":
            raise DataError(
                f"targets must hold one integer label for each example, not {raw.dtype} of shape "
                f"{list(raw.shape)}: choose another task, or another array"
            )
        return np.asarray(raw, dtype=np.int64)

    def groups(self, targets: NDArray[Any]) -> NDArray[np.int64]:
        """The labels."""
        return targets

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs, targets)

    def score(self, outputs: NDArray[Any], targets: NDArray[Any]) -> float:
        """Fraction of examples whose largest output is the label."""
        return int(np.sum(outputs.argmax(1) == targets)) / len(targets)

    def different(self, server: NDArray[Any], device: NDArray[Any]) -> NDArray[np.int64]:
        """Examples whose largest output is another one."""
        return np.flatnonzero(server.argmax(1) != device.argmax(1))
