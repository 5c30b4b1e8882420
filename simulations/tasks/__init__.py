"""Tasks: what a network is trained for, how that is measured, and what a device must answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prunecast.simulations.kinds import Kind, Registry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["TASKS", "Task"]


@dataclass(frozen=True)
class Task(Kind):
    """``[task]``: what the network is trained for.

    A network takes the inputs of the data set, in their order and of any dtype, and returns one
    tensor, the example first.

    Attributes:
        metric: name of the measure on held-out examples, as results call it.
        percent: whether the measure is a fraction that people read in percent.
        lower_is_better: whether a smaller measure is a better one.
        verb: what a device does with an example, for people.
        classes: whether outputs are (examples, classes), as distillation compares them.
    """

    metric: ClassVar[str]
    percent: ClassVar[bool] = False
    lower_is_better: ClassVar[bool] = False
    verb: ClassVar[str] = "answered"
    classes: ClassVar[bool] = False

    def targets_of(self, inputs: Mapping[str, NDArray[Any]], stored: NDArray[Any]) -> NDArray[Any]:
        """What `targets` gets: what the data store as targets, unless the task says otherwise."""
        return stored

    def targets(self, raw: NDArray[Any]) -> NDArray[Any]:
        """Targets in the dtype and shape that the loss takes, one for each example.

        Raises:
            DataError: they do not suit the task.
        """
        raise NotImplementedError

    def check(self, outputs: NDArray[Any], targets: NDArray[Any]) -> None:
        """See whether targets suit what the network returns, before anything is trained.

        Args:
            outputs: of the network for a batch, the example first.
            targets: as `targets` returned them; not those of this batch alone.

        Raises:
            DataError: they do not.
        """

    def groups(self, targets: NDArray[Any]) -> NDArray[np.int64]:
        """A small integer for each example, by which partitions are skewed."""
        raise NotImplementedError

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What training makes small: the mean over a batch."""
        raise NotImplementedError

    def score(self, outputs: NDArray[Any], targets: NDArray[Any]) -> float:
        """The metric, of outputs from torch or from a device."""
        raise NotImplementedError

    def different(self, server: NDArray[Any], device: NDArray[Any]) -> NDArray[np.int64]:
        """Numbers of the examples that a device answers otherwise than the server did.

        Args:
            server: outputs of the network, (examples, ...).
            device: those of the same examples, from a device; of the same shape.
        """
        raise NotImplementedError

    def text(self, value: float) -> str:
        """The metric for people."""
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"


TASKS: Registry[Task] = Registry(Task, default="classification")
"""The kinds of task: the modules beside this one."""
