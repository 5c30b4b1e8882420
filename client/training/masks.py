"""The masks of the model a ClientApp is training, for trainers that hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["current_masks", "holding"]

Masks = Mapping[str, NDArray[np.bool_]]

_current: ContextVar[Masks | None] = ContextVar("prunecast_masks", default=None)


def current_masks() -> dict[str, NDArray[np.bool_]]:
    """Masks of the pruned tensors of the model in the message being handled.

    Returns:
        Tensor name to boolean array, True where a weight is kept; empty without the mod, or
        while nothing is pruned yet.
    """
    return dict(_current.get() or {})


@contextmanager
def holding(masks: Masks) -> Iterator[None]:
    """Make `masks` the current ones for the duration of a ClientApp's function."""
    token = _current.set(masks)
    try:
        yield
    finally:
        _current.reset(token)
