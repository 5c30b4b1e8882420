"""One label of several at every position of an example: the next token, the class of a node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.kinds import DataError, Range
from prunecast.simulations.tasks import Task
from prunecast.simulations.tasks.classification import IGNORED, as_labels, check_classes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Positions"]


@dataclass(frozen=True)
class Positions(Task):
    """Outputs are logits (examples, positions, classes), targets labels (examples, positions).

    For a language model the targets are the tokens one place on; in a graph a position is a node.
    A label of -100 counts for nothing: padding, or a node whose class is not known.

    Attributes:
        tolerance: a device may choose a class whose output on the server is below the largest
            there by this at most, relative to the largest output of all.
    """

    tolerance: Annotated[float, Range(0, above=True)] = 1e-4

    metric = "accuracy"
    percent = True
    verb = "labelled"

    def targets(self, raw: NDArray[Any]) -> NDArray[np.int64]:
        """Labels as int64, (examples, positions)."""
        if raw.ndim != 2 or raw.dtype.kind not in "iu":
            remedy = "choose another array"
            if raw.ndim == 1:
                remedy = "choose task.kind = 'classification', or give a label at every position"
            raise DataError(
                "targets must hold an integer label at every position, (examples, positions), not "
                f"{raw.dtype} of shape {list(raw.shape)}: {remedy}"
            )
        labels = as_labels(raw)
        if (without := np.flatnonzero((labels == IGNORED).all(axis=1))).size:
            raise DataError(
                f"example {without[0]} has no label at any position ({without.size} of "
                f"{len(labels)} examples): leave those out"
            )
        return labels

    def check(self, outputs: NDArray[Any], targets: NDArray[Any]) -> None:
        """Outputs are a row of classes for each position, and every label is among them."""
        wanted = targets.shape[1]
        if outputs.ndim != 3 or outputs.shape[1] != wanted:
            raise DataError(
                f"the model returns the shape {list(outputs.shape)} for targets of {wanted} "
                "positions: return logits (examples, positions, classes)"
            )
        check_classes(outputs.shape[2], targets)

    def groups(self, targets: NDArray[Any]) -> NDArray[np.int64]:
        """The commonest label of each example, the smallest of several."""
        return np.array(
            [np.bincount(row[row != IGNORED]).argmax() for row in targets], dtype=np.int64
        )

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, the mean over all labelled positions of the batch."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def score(self, outputs: NDArray[Any], targets: NDArray[Any]) -> float:
        """Fraction of labelled positions whose largest output is the label."""
        counted = targets != IGNORED
        return float(np.mean((outputs.argmax(2) == targets)[counted]))

    def different(self, server: NDArray[Any], device: NDArray[Any]) -> NDArray[np.int64]:
        """Examples with a position whose class the server puts too far below its own, or NaN."""
        chosen = np.take_along_axis(server, device.argmax(2)[..., None], axis=2)[..., 0]
        allowed = self.tolerance * float(np.max(np.abs(server)))
        same = (server.max(2) - chosen <= allowed) & ~np.isnan(device).any(axis=2)
        return np.flatnonzero(~same.all(axis=1))
