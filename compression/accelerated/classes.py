"""Clusters of positions (:mod:`prunecast.compression.codec.modelling.classes`, in torch)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prunecast.compression.codec.modelling.classes import (
    MAX_LEVEL,
    FieldCode,
    activity,
    neighbour_classes,
    phase_size,
    phase_slice,
)
from prunecast.compression.codec.modelling.fields import (
    Field,
    class_of_magnitude,
    log_thresholds,
)

from .arrays import upload
from .integers import signed
from .known import Known

__all__ = ["Classifier", "flip_signs", "neighbour_sums"]

_SUMS = 128
"""Room for the sum of a row level and a column level."""


def _sums(f: Field, code: FieldCode, known: Known) -> torch.Tensor | None:
    """Row level + column level at every coded position, uint8; None when constant."""
    if code.rows is None and code.columns is None:
        return None
    zeros = np.zeros(1, np.uint8)
    rows = upload(zeros.repeat(f.rows) if code.rows is None else code.rows, known.device)
    columns = upload(
        zeros.repeat(f.columns) if code.columns is None else code.columns, known.device
    )
    if known.selected is None:
        return (rows[:, None] + columns[None, :]).reshape(-1)
    if not f.columns:
        return rows[:0]
    row = torch.div(known.selected, f.columns, rounding_mode="floor")
    column = known.selected - row * f.columns
    return rows.index_select(0, row) + columns.index_select(0, column)


def neighbour_sums(z: torch.Tensor, depth: int, phase: int) -> torch.Tensor:
    """Sum of the signed values before and after every position of a later phase."""
    known = signed(z[:: 2 << (depth - phase)])
    count = phase_size(len(z), depth, phase)
    total = known[:count].clone()
    after = known[1 : count + 1]
    total[: len(after)] += after
    return total


def flip_signs(z: torch.Tensor, sums: torch.Tensor, width: int) -> torch.Tensor:
    """Negate values (as zigzag) where the neighbours' sum is negative; its own inverse."""
    flip = (sums < 0) & (z != 0) & (z != (1 << width) - 1)
    return torch.where(flip, ((z - 1) ^ 1) + 1, z)


class Classifier:
    """Looks up ``table[class, activity]`` at the positions of one field, phase by phase."""

    def __init__(self, f: Field, code: FieldCode, known: Known) -> None:
        self._field, self._code, self._known = f, code, known
        self._sums = _sums(f, code, known)
        self._act = activity(code.base, np.arange(2 * MAX_LEVEL + 2))

    def look_up(
        self, table: NDArray[Any], phase: int = 0, around: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Table entries of a phase; ``around`` holds the neighbours' sums of later phases."""
        f, act = self._field, self._act
        part = phase_slice(self._code.depth, phase)
        sums = None if self._sums is None else self._sums[part]
        classes = None
        if around is not None:
            joint = table[neighbour_classes()[:, act], act]
            bounds = upload(log_thresholds(), self._known.device)
            classes = torch.searchsorted(bounds, around.abs(), right=True, out_int32=True)
        elif f.conditioned:
            joint = table[:, act]
            classes = self._previous_classes()
        else:
            joint = table[:1, act]
        entries = upload(joint.reshape(-1), self._known.device)
        if classes is None:
            if sums is None:
                size = phase_size(f.size, self._code.depth, phase)
                return entries[:1].repeat(size)
            return entries.index_select(0, sums.to(torch.int32))
        index = classes * _SUMS
        if sums is not None:
            index += sums
        return entries.index_select(0, index)

    def _previous_classes(self) -> torch.Tensor:
        """Class of |p| at every coded position, int32."""
        assert self._known.previous is not None
        classes = upload(class_of_magnitude().astype(np.int32), self._known.device)
        top = len(classes) - 1
        return classes.index_select(0, self._known.previous.clamp(-top, top).abs())
