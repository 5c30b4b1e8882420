"""Masks: held for the trainer of a model that has them.

A mask is a boolean array of its tensor's shape, True where a weight is kept. The server makes masks
from a criterion's scores (`prunecast.compression.pruning.allocation`). They never travel: in a
published model the mask of a pruned tensor is where its integers are not zero
(`PublishedModel.masks`). A node holds them while its ClientApp handles a message, and takes the
statistics that the ClientApp contributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Masks",
    "Teacher",
    "contribute_statistics",
    "current_masks",
    "current_teacher",
    "holding",
    "wanted_statistics",
]

Masks = Mapping[str, NDArray[np.bool_]]
Teacher = Callable[[], Mapping[str, NDArray[Any]] | None]
"""What reads the arrays of a dense version from where they are kept; None for none."""


@dataclass(frozen=True)
class _Handled:
    """What belongs to the message being handled."""

    masks: Masks = field(default_factory=dict)
    wanted: tuple[str, ...] = ()
    contributed: dict[str, Mapping[str, NDArray[Any]]] = field(default_factory=dict)
    teacher: Teacher = lambda: None


_current: ContextVar[_Handled] = ContextVar("prunecast_pruning", default=_Handled())  # noqa: B039


def current_masks() -> dict[str, NDArray[np.bool_]]:
    """Masks of the pruned tensors of the model in the message being handled.

    Returns:
        Tensor name to boolean array, True where a weight is kept; empty without the mod, or
        while nothing is pruned yet.
    """
    return dict(_current.get().masks)


def current_teacher() -> dict[str, NDArray[Any]] | None:
    """The last dense version that this node held before the model of the message was pruned.

    Returns:
        Arrays by name, to distil from; None while nothing is pruned, where the node never held a
        dense version, or unless the mod was asked to keep it (`compression_mod(teacher=True)`).
    """
    found = _current.get().teacher()
    return None if found is None else dict(found)


def wanted_statistics() -> tuple[str, ...]:
    """Names of the statistics that the server asks for with the message being handled."""
    return _current.get().wanted


def contribute_statistics(name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Send a statistic with the reply to the message being handled; ignored unless it is wanted.

    Args:
        name: of the statistic, see `wanted_statistics`.
        arrays: tensor name to one finite value per weight, in the tensor's shape; the server
            refuses the reply otherwise. Tensors may be left out; torch's count as arrays.
    """
    if name in wanted_statistics():
        _current.get().contributed[name] = {n: _array(values) for n, values in arrays.items()}


def _array(values: Any) -> NDArray[Any]:
    """Of what torch has on any device, with or without a gradient, in any of its dtypes, too."""
    return np.asarray(values.detach().cpu().float() if hasattr(values, "detach") else values)


@contextmanager
def holding(
    masks: Masks, wanted: tuple[str, ...] = (), teacher: Teacher = lambda: None
) -> Iterator[dict[str, Mapping[str, NDArray[Any]]]]:
    """Make `masks` the current ones for the duration of a ClientApp's function.

    Args:
        masks: of the model that it is given.
        wanted: names of the statistics that the server asked for.
        teacher: reads the last dense version.

    Yields:
        What has been contributed, by statistic and tensor.
    """
    token = _current.set(handled := _Handled(masks, wanted, teacher=teacher))
    try:
        yield handled.contributed
    finally:
        _current.reset(token)
