"""What a strategy keeps from round to round, brought to the channels that are left."""

from __future__ import annotations

from collections.abc import Mapping
from logging import WARNING
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy

from prunecast.compression.flower.internals import log
from prunecast.compression.pruning.structure.channels import ChannelPlan

if TYPE_CHECKING:
    pass

__all__ = ["narrow_strategy", "say_what_is_not_reached"]


def narrow_strategy(
    strategy: object, plan: ChannelPlan, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Take the channels that a plan removes out of what a strategy keeps from round to round.

    Found are attributes that are arrays of the model by name (records or mappings, such as the
    moments of FedAdam) or in its order (lists, such as the momentum of FedAvgM), and those of a
    strategy that it wraps. What else a strategy of one's own keeps, it must bring to the new
    shapes itself.

    Args:
        strategy: changed in place.
        plan: of the channels.
        shapes: of the model's tensors before, in their order.
    """
    for name, value in list(vars(strategy).items()):
        if isinstance(value, Strategy):
            narrow_strategy(value, plan, shapes)
        elif (found := _narrowed(value, plan, shapes)) is not None:
            setattr(strategy, name, found)


def say_what_is_not_reached(strategy: object) -> None:
    """Warn of a strategy whose state may not be found by `narrow_strategy`."""
    if isinstance(strategy, Strategy) and type(strategy).__module__.startswith("flwr."):
        for value in vars(strategy).values():
            if isinstance(value, Strategy):
                say_what_is_not_reached(value)
        return
    log(
        WARNING,
        "Channels will be removed. Of what %s keeps from round to round, arrays of the model by "
        "name or in its order are narrowed; anything else it must bring to the new shapes itself.",
        type(strategy).__name__,
    )


def _narrowed(value: Any, plan: ChannelPlan, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """The part of something that remains, where it is arrays of the model; else None."""
    if isinstance(value, ArrayRecord):
        if any(tuple(a.shape) != shapes.get(n) for n, a in value.items() if n in plan.kept):
            return None
        return ArrayRecord({
            n: Array(plan.array(n, a.numpy())) if n in plan.kept else a
            for n, a in value.items()
            if not plan.loses(n)
        })  # fmt: skip
    numbers = np.ndarray, np.generic  # differences of single numbers are no arrays
    if isinstance(value, dict):
        arrays: dict[str, Any] = {n: a for n, a in value.items() if isinstance(a, numbers)}
        if not arrays or any(a.shape != shapes.get(n) for n, a in arrays.items()):
            return None
        left = plan.arrays(arrays)
        return {n: left.get(n, v) for n, v in value.items() if n in left or n not in arrays}
    if isinstance(value, list) and len(value) == len(shapes):
        pairs = list(zip(shapes, value, strict=True))
        if any(not isinstance(a, numbers) or a.shape != shapes[n] for n, a in pairs):
            return None
        return [plan.array(name, array) for name, array in pairs if not plan.loses(name)]
    return None
