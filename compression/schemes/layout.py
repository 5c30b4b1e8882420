"""Names and shapes of tensors: what a state is made for and what a payload describes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import LayoutMismatch, NonFiniteError, UnsupportedTensor

__all__ = ["Arrays", "Layout", "checked", "concatenated", "layout_of", "split", "total_size"]

Layout = Mapping[str, tuple[int, ...]]
"""Name to shape, in order; every tensor is float32."""
Arrays = dict[str, NDArray[np.float32]]


def layout_of(tensors: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of these tensors.

    >>> layout_of({"w": np.zeros((2, 3)), "b": np.float32(0)})
    {'w': (2, 3), 'b': ()}
    """
    return {name: np.shape(tensor) for name, tensor in tensors.items()}


def total_size(layout: Layout) -> int:
    """Number of elements of all tensors together (exact)."""
    return sum(math.prod(shape) for shape in layout.values())


def checked(tensors: Mapping[str, NDArray[Any]], layout: Layout) -> Arrays:
    """The tensors as float32, in C order.

    Raises:
        LayoutMismatch: a name, the order or a shape is not the layout's.
        UnsupportedTensor: a tensor is not of floating point.
        NonFiniteError: a tensor holds NaN or an infinity, or leaves float32's range.
    """
    if list(tensors) != list(layout):
        differing = sorted(set(tensors) ^ set(layout)) or "their order"
        raise LayoutMismatch(
            f"the tensors are not those that the state was made for: {differing}; "
            "make a state with init() for this layout"
        )
    arrays: Arrays = {}
    for name, shape in layout.items():
        array = np.asarray(tensors[name])
        if array.shape != shape:
            raise LayoutMismatch(
                f"tensor {name!r} has shape {array.shape}, the state was made for {shape}"
            )
        if array.dtype.kind != "f":
            raise UnsupportedTensor(
                f"tensor {name!r} has dtype {array.dtype}; schemes take floating point: "
                "send counters and indices exactly, another way"
            )
        with np.errstate(over="ignore", under="ignore"):
            arrays[name] = np.ascontiguousarray(array, np.float32).reshape(shape)
        if not np.isfinite(arrays[name]).all():
            raise NonFiniteError(
                f"tensor {name!r} holds NaN, an infinity or a value beyond float32; check the "
                "training step that produced it (learning rate, loss scaling)"
            )
    return arrays


def concatenated(
    arrays: Mapping[str, NDArray[Any]], names: Sequence[str], dtype: Any
) -> NDArray[Any]:
    """The tensors of these names, flattened, one after the other."""
    if len(names) == 1:
        return np.asarray(arrays[names[0]], dtype).ravel()
    parts = [np.asarray(arrays[name], dtype).ravel() for name in names]
    return np.concatenate([np.zeros(0, dtype), *parts])


def split(flat: NDArray[Any], names: Sequence[str], layout: Layout) -> dict[str, NDArray[Any]]:
    """Inverse of `concatenated`; views."""
    arrays, at = {}, 0
    for name in names:
        size = math.prod(layout[name])
        arrays[name] = flat[at : at + size].reshape(layout[name])
        at += size
    return arrays
