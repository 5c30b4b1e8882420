"""What a plan asks of values on a device: see the codec's ``modelling.observed``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prunecast.compression.codec.modelling.classes import ACTIVITIES, FieldCode, phase_slice
from prunecast.compression.codec.modelling.fields import Field
from prunecast.compression.codec.modelling.observed import (
    COARSE,
    COARSE_TOKENS,
    LIMB,
    TRIAL_KEYS,
    limbs_of,
    sampled_field,
    sampled_rows,
    trial_classes,
)

from .arrays import download
from .classes import Classifier, flip_signs, neighbour_sums
from .integers import shifted_right, unsigned_max
from .known import Known
from .tokens import tokens_of

__all__ = ["ObservedTensor"]


class ObservedTensor:
    """The values of one field, as zigzag."""

    def __init__(self, f: Field, z: torch.Tensor, known: Known) -> None:
        self._field, self._known = f, known
        self._z = z.to(torch.int64)
        self.largest = unsigned_max(self._z)
        self._limbs = limbs_of(self.largest)
        self._sample: tuple[slice, Field, Known, torch.Tensor, torch.Tensor] | None = None

    def _magnitudes(self) -> list[torch.Tensor]:
        """|q| of every value, by limb."""
        m = shifted_right(self._z, 1) + (self._z & 1)
        if self._limbs == 1:
            return [m]
        return [shifted_right(m, LIMB * i) & ((1 << LIMB) - 1) for i in range(self._limbs)]

    def sums(self) -> list[int]:
        """Sum of the magnitudes, by limb."""
        return [int(m.sum()) for m in self._magnitudes()]

    def _axes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column of every coded position."""
        assert self._known.selected is not None
        columns = self._field.columns
        row = torch.div(self._known.selected, columns, rounding_mode="floor")
        return row, self._known.selected - row * columns

    def axis_sums(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sums of the magnitudes over each row and each column."""
        f, found = self._field, []
        if self._known.selected is None:
            grids = [m.reshape(f.rows, f.columns) for m in self._magnitudes()]
            found = [[grid.sum(1) for grid in grids], [grid.sum(0) for grid in grids]]
        else:
            for index, count in zip(self._axes(), (f.rows, f.columns), strict=True):
                zeros = torch.zeros(count, dtype=torch.int64, device=self._known.device)
                found.append([zeros.index_add(0, index, m) for m in self._magnitudes()])
        rows, columns = (download(torch.stack(sums)).astype(np.float64) for sums in found)
        return rows, columns

    def axis_sizes(self) -> tuple[Any, Any]:
        """Coded positions of each row and each column, or of all rows and all columns."""
        f = self._field
        if self._known.selected is None:
            return f.columns, f.rows
        row, column = self._axes()
        return (
            download(torch.bincount(row, minlength=f.rows)),
            download(torch.bincount(column, minlength=f.columns)),
        )

    def sampled(self) -> int:
        """Number of positions that :meth:`counts` counts."""
        return self._sampled()[1].size

    def counts(self, code: FieldCode) -> NDArray[np.int64]:
        """Coarse tokens of a sample, by context under a code."""
        rows, f, known, z, coarse = self._sampled()
        sampled = replace(code, rows=None if code.rows is None else code.rows[rows])
        look = Classifier(f, sampled, known)
        bins = trial_classes(f, code) * ACTIVITIES * COARSE_TOKENS
        counts = torch.zeros(bins, dtype=torch.int64, device=known.device)
        for phase in range(1 + code.depth):
            part = phase_slice(code.depth, phase)
            tokens, around = coarse[part], None
            if phase:
                around = neighbour_sums(z, code.depth, phase)
                tokens = _coarse(flip_signs(z[part], around, f.width))
            key = look.look_up(TRIAL_KEYS, phase, around)
            key |= tokens
            counts += torch.bincount(key, minlength=bins)
        return download(counts).reshape(-1, COARSE_TOKENS)

    def _sampled(self) -> tuple[slice, Field, Known, torch.Tensor, torch.Tensor]:
        """Which rows; their field, what is known of it, its values and their coarse tokens."""
        if self._sample is None:
            f, z, known = self._field, self._z, self._known
            rows = sampled_rows(f)
            if rows.step is not None:
                z = z.reshape(f.rows, f.columns)[rows].reshape(-1)
                previous = known.previous
                if previous is not None:
                    previous = previous.reshape(f.rows, f.columns)[rows].reshape(-1)
                known = Known(known.device, None, previous)
            self._sample = rows, sampled_field(f, rows), known, z, _coarse(z)
        return self._sample


def _coarse(z: torch.Tensor) -> torch.Tensor:
    return tokens_of(z, COARSE).clamp_(max=COARSE_TOKENS - 1)
