"""From row levels, column levels and previous values to the cluster of every position.

A position's *activity* is ``base + row level + column level``, in half-octaves of E|q|, clipped
to [0, 63]. Its raw context is (table set, class of the previous value, activity); a map in the
payload sends raw contexts to clusters, and all positions of a cluster share one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .fields import PREVIOUS_CLASSES, Field

__all__ = ["ACTIVITIES", "MAX_LEVEL", "FieldCode", "activity", "clusters_of", "raw_contexts"]

ACTIVITIES = 64
MAX_LEVEL = 63

# What a field's mode may be.
CONSTANT, CODED, STORED = 0, 1, 2


@dataclass
class FieldCode:
    """How one field is coded."""

    mode: int
    centre: int = 0
    table_set: int = 0
    base: int = 0
    rows: NDArray[np.uint8] | None = None
    columns: NDArray[np.uint8] | None = None
    starts_segment: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


def _sums(f: Field, code: FieldCode) -> NDArray[np.uint8] | None:
    """Row level + column level at every coded position (at most 126); None when constant."""
    if code.rows is None and code.columns is None:
        return None
    rows = code.rows if code.rows is not None else np.zeros(f.rows, np.uint8)
    columns = code.columns if code.columns is not None else np.zeros(f.columns, np.uint8)
    if f.selected is None:
        return np.asarray((rows[:, None] + columns[None, :]).reshape(-1), np.uint8)
    if not f.columns:
        return np.zeros(0, np.uint8)
    row, column = np.divmod(f.selected, f.columns)
    return np.asarray(rows[row] + columns[column], np.uint8)


def activity(base: int, sums: NDArray[Any]) -> NDArray[np.int64]:
    """Clip ``base + sums`` to the activities."""
    return np.clip(sums.astype(np.int64) + base, 0, ACTIVITIES - 1)


def _lookup(f: Field, code: FieldCode, table: NDArray[Any]) -> NDArray[Any]:
    """``table[previous class, activity]`` at every coded position."""
    sums = _sums(f, code)
    act = activity(code.base, np.arange(2 * MAX_LEVEL + 2))
    if not f.conditioned:
        if sums is None:
            return np.full(f.size, table[0, act[0]])
        return np.asarray(table[0, act].take(sums))
    classes = f.previous_classes()
    if sums is None:
        return np.asarray(table[:, act[0]].take(classes))
    index = classes.astype(np.uint16) << 7
    index |= sums
    return np.asarray(table[:, act].reshape(-1).take(index))


def clusters_of(f: Field, code: FieldCode, maps: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Cluster of every coded position; ``maps[set]`` is [16, 64]."""
    return _lookup(f, code, maps[code.table_set])


def raw_contexts(f: Field, code: FieldCode) -> NDArray[np.uint16]:
    """``class * 64 + activity`` at every coded position."""
    table = np.arange(PREVIOUS_CLASSES * ACTIVITIES, dtype=np.uint16)
    return _lookup(f, code, table.reshape(PREVIOUS_CLASSES, ACTIVITIES))
