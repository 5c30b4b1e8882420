"""What a strategy keeps from round to round, brought to the channels that are left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from logging import WARNING
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy

from prunecast.compression.flower.internals import log
from prunecast.compression.pruning.structure.channels import ChannelPlan

__all__ = ["narrow_strategy", "say_what_is_not_reached"]

_DEEPEST = 3  # mappings and sequences inside one another


def narrow_strategy(
    strategy: object, plan: ChannelPlan, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Take the channels that a plan removes out of what a strategy keeps from round to round.

    Found are attributes that are arrays of the model by name (records or mappings, such as the
    moments of FedAdam) or in its order (sequences, such as the momentum of FedAvgM), mappings and
    sequences of such (as by node), and those of a strategy that it wraps. What else a strategy of
    one's own keeps, it must bring to the new shapes itself.

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


def _narrowed(
    value: Any, plan: ChannelPlan, shapes: Mapping[str, tuple[int, ...]], deep: int = _DEEPEST
) -> Any:
    """The part of something that remains, where it is arrays of the model; else None."""
    if isinstance(value, ArrayRecord):
        if any(tuple(a.shape) != shapes.get(n) for n, a in value.items() if n in plan.kept):
            return None
        return ArrayRecord({
            n: _part(n, a, plan) if n in plan.kept else a
            for n, a in value.items()
            if not plan.loses(n)
        })  # fmt: skip
    if isinstance(value, dict):
        arrays = {n: a for n, a in value.items() if _is_array(a)}
        if not arrays:
            return _inside(value, value.keys(), plan, shapes, deep)
        if any(tuple(a.shape) != shapes.get(n) for n, a in arrays.items()):
            return None
        return {
            n: _part(n, a, plan) if n in arrays else a
            for n, a in value.items()
            if n not in arrays or not plan.loses(n)
        }
    if type(value) in (list, tuple):
        pairs = list(zip(shapes, value, strict=False))
        if len(value) != len(shapes) or any(
            not _is_array(a) or tuple(a.shape) != shapes[n] for n, a in pairs
        ):
            return _inside(value, range(len(value)), plan, shapes, deep)
        return type(value)(_part(n, a, plan) for n, a in pairs if not plan.loses(n))
    return None


def _inside(
    value: Any,
    keys: Iterable[Any],
    plan: ChannelPlan,
    shapes: Mapping[str, tuple[int, ...]],
    deep: int,
) -> Any:
    """A mapping or sequence of arrays of the model, as of each node; None where there are none."""
    if not deep:
        return None
    found = {key: _narrowed(value[key], plan, shapes, deep - 1) for key in keys}
    if all(part is None for part in found.values()):
        return None
    left = {key: value[key] if part is None else part for key, part in found.items()}
    return left if isinstance(value, dict) else type(value)(left.values())


def _is_array(value: Any) -> bool:
    """Of NumPy (differences of single numbers are no arrays), Flower or torch."""
    return isinstance(value, np.ndarray | np.generic | Array) or hasattr(value, "new_tensor")


def _part(name: str, array: Any, plan: ChannelPlan) -> Any:
    if isinstance(array, Array):
        return Array(plan.array(name, array.numpy()))
    if hasattr(array, "new_tensor"):
        return array.new_tensor(plan.array(name, array.detach().cpu().numpy()))
    return plan.array(name, array)
