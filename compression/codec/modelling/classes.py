"""From row levels, column levels and previous values to the cluster of every position.

A position's *activity* is ``base + row level + column level``, in half-octaves of E|q|, clipped
to [0, 63]. Its *class* comes from the previous value, or, in the later phases of a field with
neighbour contexts, from the sum of the two values beside it, which earlier phases hold. Its raw
context is (table set, class, activity); a map in the payload sends raw contexts to clusters, and
all positions of a cluster share one model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..entropy.tokens import signed
from .fields import CHUNK, Field, half_octaves, look_up

__all__ = [
    "ACTIVITIES",
    "ALONE",
    "CODED",
    "CONSTANT",
    "MAX_DEPTH",
    "MAX_LEVEL",
    "NEW_SHARED",
    "SHARED",
    "STORED",
    "UNIT_ACTIVITY",
    "Classifier",
    "FieldCode",
    "activity",
    "flip_signs",
    "may_have_neighbours",
    "neighbour_sums",
    "phase_size",
    "phase_slice",
]

ACTIVITIES = 64
MAX_LEVEL = 63
MAX_DEPTH = 3
UNIT_ACTIVITY = 36
"""The activity that stands for E|q| = 1."""

# What a field's mode may be.
CONSTANT, CODED, STORED = 0, 1, 2
# Whom a field is decoded together with: the last shared group, nobody, a new shared group.
SHARED, ALONE, NEW_SHARED = 0, 1, 2


@dataclass
class FieldCode:
    """How one field is coded."""

    mode: int
    centre: int = 0
    table_set: int = 0
    base: int = 0
    rows: NDArray[np.uint8] | None = None
    columns: NDArray[np.uint8] | None = None
    depth: int = 0
    """Number of phases after the first (neighbour contexts)."""
    grouping: int = SHARED

    def set_levels(self, levels: NDArray[np.uint8], *, columns: bool) -> None:
        """Set the levels of one axis."""
        if columns:
            self.columns = levels
        else:
            self.rows = levels


def phase_slice(depth: int, phase: int) -> slice:
    """Positions of a phase: multiples of ``2**depth``, then odd multiples of halved strides."""
    if not phase:
        return slice(0, None, 1 << depth)
    step = 1 << (depth - phase)
    return slice(step, None, 2 * step)


def phase_size(size: int, depth: int, phase: int) -> int:
    """Number of positions of a phase."""
    return len(range(size)[phase_slice(depth, phase)])


def may_have_neighbours(f: Field) -> bool:
    """Whether neighbour contexts are allowed: neither mask nor previous integers, 32-bit."""
    return f.mask is None and not f.conditioned and f.bits == 32


def _sums(f: Field, code: FieldCode) -> NDArray[np.uint8] | None:
    """Row level + column level at every coded position (at most 126); None when constant."""
    if code.rows is None and code.columns is None:
        return None
    rows = code.rows if code.rows is not None else np.zeros(f.rows, np.uint8)
    columns = code.columns if code.columns is not None else np.zeros(f.columns, np.uint8)
    if f.selected is None:
        return np.asarray((rows[:, None] + columns[None, :]).reshape(-1), np.uint8)
    row, column = f.places()
    sums = look_up(rows, row)
    sums += look_up(columns, column)
    return sums


def neighbour_sums(z: NDArray[Any], depth: int, phase: int) -> NDArray[Any]:
    """Sum of the signed values before and after every position of a later phase."""
    step = 1 << (depth - phase)
    known = signed(z[:: 2 * step])
    if len(known) and int(z.max()) >= 1 << 30:  # else 32 bits hold the sums
        known = known.astype(np.int64)
    count = phase_size(len(z), depth, phase)
    total = known[:count].copy()
    after = known[1 : count + 1]
    total[: len(after)] += after
    return total


def _neighbour_classes() -> NDArray[np.int64]:
    """Class of [half-octaves of |sum|, activity]."""
    k = np.arange(128)[:, None]
    relative = k - 1 - (np.arange(ACTIVITIES)[None, :] - UNIT_ACTIVITY)
    return np.where(k == 0, 1, 2 + np.clip((relative + 4) >> 1, 0, 12))


def flip_signs(z: NDArray[Any], sums: NDArray[Any], width: int) -> NDArray[Any]:
    """Negate values (as zigzag) where the neighbours' sum is negative; its own inverse."""
    one = z.dtype.type(1)
    flip = (sums < 0) & (z != 0) & (z != (1 << width) - 1)
    return np.where(flip, ((z - one) ^ one) + one, z)


def activity(base: int, sums: NDArray[Any]) -> NDArray[np.int64]:
    """Clip ``base + sums`` to the activities."""
    return np.clip(sums.astype(np.int64) + base, 0, ACTIVITIES - 1)


class Classifier:
    """Looks up ``table[class, activity]`` at the positions of one field, phase by phase."""

    def __init__(self, f: Field, code: FieldCode) -> None:
        self._field, self._code = f, code
        self._sums = _sums(f, code)
        self._act = activity(code.base, np.arange(2 * MAX_LEVEL + 2))

    def look_up(
        self, table: NDArray[Any], phase: int = 0, around: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Table entries of a phase; ``around`` holds the neighbours' sums of later phases."""
        f, act = self._field, self._act
        part = phase_slice(self._code.depth, phase)
        sums = None if self._sums is None else self._sums[part]
        if around is not None:
            joint = table[_neighbour_classes()[:, act], act].reshape(-1)
            out = np.empty(len(around), table.dtype)
            for s in range(0, len(around), CHUNK):  # in chunks, to bound temporary arrays
                index = half_octaves(np.abs(around[s : s + CHUNK])).astype(np.uint16) << 7
                if sums is not None:
                    index |= sums[s : s + CHUNK]
                joint.take(index, out=out[s : s + CHUNK], mode="clip")
            return out
        if not f.conditioned:
            if sums is None:
                return np.full(phase_size(f.size, self._code.depth, phase), table[0, act[0]])
            return look_up(table[0, act], sums)
        classes = f.previous_classes()
        if sums is None:
            return look_up(table[:, act[0]], classes)
        index = classes.astype(np.uint16) << 7
        index |= sums
        return look_up(table[:, act].reshape(-1), index)
