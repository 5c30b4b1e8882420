"""What a pruner keeps from version to version: masks that are held, and what nodes contributed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from prunecast.compression.pruning.masks import Masks
from prunecast.compression.pruning.statistics import Statistics, statistic_shape
from prunecast.compression.pruning.structure.channels import ChannelPlan

__all__ = ["MaskState", "fitting", "narrowed_statistics"]


@dataclass(frozen=True, eq=False)
class MaskState:
    """Masks that are held, and what is kept for later events and versions.

    Attributes:
        stage: of the schedule that they were chosen in, see `PruningPlan.stage`.
        masks: by tensor; empty while nothing is pruned, or where masks are not held.
        moved: round in which weights were dropped and grown last, or could have been first.
        early: the master weights that events rewind to; empty for none.
        known: statistics that nodes contributed, those since the last version included.
        accumulated: what the criterion sums over versions, by tensor.
    """

    stage: float = 0.0
    masks: Masks = field(default_factory=dict)
    early: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    known: Statistics = field(default_factory=dict)
    accumulated: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    moved: int = 0


def fitting(known: Statistics, shapes: Mapping[str, tuple[int, ...]]) -> Statistics:
    """Of statistics those that tensors of these shapes have."""
    return {
        name: {
            tensor: array
            for tensor, array in arrays.items()
            if tensor in shapes and array.shape == statistic_shape(name, shapes[tensor])
        }
        for name, arrays in known.items()
    }


def narrowed_statistics(
    known: Statistics, plan: ChannelPlan, shapes: Mapping[str, tuple[int, ...]]
) -> Statistics:
    """Of statistics what remains without the channels that a plan removes.

    Args:
        known: by statistic and tensor; what does not fit the tensors is left out.
        plan: of the channels.
        shapes: of the tensors with all of them.
    """

    def part(tensor: str, array: NDArray[Any]) -> NDArray[Any]:
        axes = plan.kept.get(tensor)
        if axes is None or array.shape == shapes[tensor]:
            return plan.array(tensor, array)
        # a statistic of input channels alone, which only matrices and kernels have
        inputs = axes[1] if array.ndim > 1 else None
        return array if inputs is None else array[:, inputs]

    return {
        name: {t: part(t, array) for t, array in arrays.items() if not plan.loses(t)}
        for name, arrays in fitting(known, shapes).items()
    }
