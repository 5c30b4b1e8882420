"""A case as plain arrays, so that coders without contexts of their own profit from them too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .case import Array, Case

__all__ = ["from_arrays", "sizes", "to_arrays"]

_TOP = np.uint32(1 << 31)


def to_arrays(case: Case) -> list[Array]:
    """Flat arrays that hold what the receiver does not know.

    Entries off the mask are left out. Integers with a previous value come as two arrays a tensor,
    where it was zero and where it was not (first those of all tensors where it was, for whoever
    joins arrays). Floats with a previous value become the zigzag of the wrapped difference of
    their bits, read as integers that sort like floats.
    """
    grown: list[Array] = []
    out: list[Array] = []
    for name, values in case.tensors.items():
        mask, before = case.known(name)
        if before is not None and values.dtype.kind == "f":
            d = (_sortable(values) - _sortable(before)).view(np.int32)
            out.append((d << 1 ^ d >> 31).ravel())
            continue
        if mask is not None:
            values, before = values[mask], None if before is None else before[mask]
        if before is None:
            out.append(values.ravel())
        else:
            grown.append(values[before == 0])
            out.append(values[before != 0])
    return [a for a in grown + out if a.size]


def sizes(case: Case) -> list[int]:
    """Lengths of the arrays, which the receiver can tell."""
    return [n for n, _ in _places(case)]


def from_arrays(case: Case, arrays: Sequence[Array]) -> list[Array]:
    """Inverse of :func:`to_arrays`; of the case, only names, shapes and context are used."""
    out = {name: np.zeros(v.shape, v.dtype) for name, v in case.tensors.items()}
    for (_, place), values in zip(_places(case), arrays, strict=True):
        name, where = place
        _, before = case.known(name)
        target = out[name]
        if before is not None and target.dtype.kind == "f":
            d = (values >> 1 & 0x7FFFFFFF ^ -(values & 1)).view(np.uint32)
            sortable = d.reshape(target.shape) + _sortable(before)
            target[...] = np.where(sortable & _TOP, sortable ^ _TOP, ~sortable).view(np.float32)
        elif where is None:
            target[...] = values.reshape(target.shape)
        else:
            target[where] = values
    return list(out.values())


def _places(case: Case) -> list[tuple[int, tuple[str, NDArray[Any] | None]]]:
    """Length of each array, its tensor, and where in it (None: everywhere)."""
    grown: list[tuple[int, tuple[str, NDArray[Any] | None]]] = []
    out: list[tuple[int, tuple[str, NDArray[Any] | None]]] = []
    for name, values in case.tensors.items():
        mask, before = case.known(name)
        if before is not None and values.dtype.kind != "f":
            for group, where in ((grown, before == 0), (out, before != 0)):
                some = where if mask is None else where & mask
                group.append((int(np.count_nonzero(some)), (name, some)))
        elif mask is not None:
            out.append((int(np.count_nonzero(mask)), (name, mask)))
        else:
            out.append((values.size, (name, None)))
    return [place for place in grown + out if place[0]]


def _sortable(values: Array) -> NDArray[np.uint32]:
    bits = values.view(np.uint32)
    return np.asarray(np.where(bits & _TOP, ~bits, bits ^ _TOP), np.uint32)
