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

__all__ = ["IGNORED", "Classification", "as_labels", "check_classes"]

IGNORED = -100
"""A label that torch's cross-entropy skips."""


def as_labels(raw: NDArray[Any]) -> NDArray[np.int64]:
    """Integers of any width and shape as int64.

    Raises:
        DataError: one is below 0, and not `IGNORED`.
    """
    labels = np.asarray(raw, dtype=np.int64)
    if labels.size and (least := int(labels[labels != IGNORED].min(initial=0))) < 0:
        raise DataError(
            f"labels count from 0, these from {least}: add {-least}, or leave those out "
            f"({IGNORED} is ignored by the loss)"
        )
    return labels


def check_classes(classes: int, labels: NDArray[Any]) -> None:
    """Raise `DataError` unless each of the labels is below `classes`, the outputs of the model."""
    most = int(labels.max(initial=0))
    if most < classes:
        return
    least = int(labels[labels != IGNORED].min(initial=most))
    remedy = f"give it {most + 1}"
    if least == 1 and most == classes:
        remedy = "subtract 1 from labels that count from 1, or " + remedy
    raise DataError(
        f"labels reach from {least} to {most}, and the model has {classes} outputs, for 0 to "
        f"{classes - 1}: {remedy}"
    )


def _remedy(raw: NDArray[Any]) -> str:
    """What to do with targets that are no labels."""
    if raw.ndim == 2 and raw.shape[1] == 1:
        return "take the only column, y[:, 0]"
    if raw.ndim == 2 and raw.dtype.kind in "biuf" and np.all(raw.sum(axis=1) == 1):
        return "turn rows of zeros and a one into labels, y.argmax(axis=1)"
    if raw.ndim == 1 and raw.dtype.kind in "US":
        return "number the texts, numpy.unique(y, return_inverse=True)[1]"
    if raw.ndim == 1 and raw.dtype.kind in "bf" and np.all(raw == np.floor(raw)):
        return "convert them, y.astype('int64')"
    return "choose another task, or another array"


@dataclass(frozen=True)
class Classification(Task):
    """Outputs are logits (examples, classes), targets labels; a device must pick the same class."""

    metric = "accuracy"
    classes = True
    percent = True
    verb = "classified"

    def targets(self, raw: NDArray[Any]) -> NDArray[np.int64]:
        """Labels as int64, (examples,)."""
        if raw.ndim != 1 or raw.dtype.kind not in "iu":
            raise DataError(
                f"targets must hold one integer label for each example, not {raw.dtype} of shape "
                f"{list(raw.shape)}: {_remedy(raw)}"
            )
        return as_labels(raw)

    def check(self, outputs: NDArray[Any], targets: NDArray[Any]) -> None:
        """Outputs are one row of classes for each example, and every label is among them."""
        if outputs.ndim != 2:
            raise DataError(
                f"the model returns the shape {list(outputs.shape)}: return logits (examples, "
                "classes), one row for each example"
            )
        check_classes(outputs.shape[1], targets)

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
