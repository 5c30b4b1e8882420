"""What a plan asks of a field's values. All answers are integers, so every machine plans alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..context import TensorSpec
from ..entropy.tokens import TokenScheme
from .classes import (
    ACTIVITIES,
    Classifier,
    FieldCode,
    flip_signs,
    neighbour_sums,
    phase_slice,
)
from .fields import PREVIOUS_CLASSES, Field

__all__ = ["LIMB", "Observed"]

_SAMPLE = 1 << 16
_LEAST_SAMPLE = 1 << 14
_BLOCK = 1 << 18
LIMB = 22
"""Bits of a magnitude that are summed at a time: float32 holds them, float64 2**31 of them."""
_COARSE = TokenScheme(4, 1)
"""Tokens of a trial; those from 63 on count as one."""
_COARSE_TOKENS = 64
_TRIAL_KEYS = _COARSE_TOKENS * np.arange(PREVIOUS_CLASSES * ACTIVITIES, dtype=np.int64).reshape(
    PREVIOUS_CLASSES, ACTIVITIES
)
"""Raw contexts with room for a coarse token below them."""


def _limbs_of(largest: int) -> int:
    """Return how many limbs the magnitude of a zigzag value takes."""
    return max(1, -(-(largest + 1 >> 1).bit_length() // LIMB))


def _sampled_rows(f: Field) -> slice:
    """Every k-th row of a large field without a mask; else all."""
    wanted = min(_SAMPLE, max(_LEAST_SAMPLE, f.size // 4))
    if f.mask is not None or f.size < 2 * wanted or f.rows < 32:
        return slice(None)
    return slice(0, None, min(f.size // wanted, f.rows // 16))


def _sampled_field(f: Field, rows: slice) -> Field:
    """Return a field that holds some rows of another one."""
    if rows.step is None:
        return f
    count = len(range(f.rows)[rows])
    previous = None
    if f.previous is not None:
        previous = f.previous.reshape(f.rows, f.columns)[rows]
    return Field(f.name, TensorSpec(f.spec.dtype, (count, f.columns)), f.plane, None, previous)


def _trial_classes(f: Field, code: FieldCode) -> int:
    """Class 0 alone, unless neighbours or previous values give others."""
    return PREVIOUS_CLASSES if code.depth or f.conditioned else 1


class Observed:
    """A field's values, as zigzag.

    Attributes:
        largest: the largest of them.
    """

    def __init__(self, f: Field, z: NDArray[Any]) -> None:
        self._field, self._z = f, z
        self.largest = int(z.max())
        self._limbs = _limbs_of(self.largest)
        self._sample: tuple[slice, Field, NDArray[Any], NDArray[np.uint8]] | None = None

    def sums(self) -> list[int]:
        """Sum of the magnitudes, by limb: bits ``LIMB * i`` and on of each."""
        z, out = self._z, [0] * self._limbs
        for s in range(0, len(z), _BLOCK):
            for i in range(self._limbs):
                out[i] += int(self._magnitudes(z[s : s + _BLOCK], i).sum(dtype=np.float64))
        return out

    def axis_sums(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sums of the magnitudes over each row, [limbs, rows], and column; exact."""
        f, z = self._field, self._z
        rows, columns = np.zeros((self._limbs, f.rows)), np.zeros((self._limbs, f.columns))
        if f.selected is not None:
            row, column = np.divmod(f.selected, f.columns)
            for i in range(self._limbs):
                a = self._magnitudes(z, i)
                rows[i] = np.bincount(row, a, minlength=f.rows)
                columns[i] = np.bincount(column, a, minlength=f.columns)
            return rows, columns
        block = max(1, _BLOCK // f.columns)
        grid = z.reshape(f.rows, f.columns)
        for s in range(0, f.rows, block):  # in blocks, to bound the temporary arrays
            for i in range(self._limbs):
                a = self._magnitudes(grid[s : s + block], i)
                rows[i, s : s + block] = a.sum(1, dtype=np.float64)
                columns[i] += a.sum(0, dtype=np.float64)
        return rows, columns

    def axis_sizes(self) -> tuple[Any, Any]:
        """Coded positions of each row and each column, or of all rows and all columns."""
        f = self._field
        if f.selected is None:
            return f.columns, f.rows
        row, column = np.divmod(f.selected, f.columns)
        return np.bincount(row, minlength=f.rows), np.bincount(column, minlength=f.columns)

    def sampled(self) -> int:
        """Number of positions that :meth:`counts` counts."""
        return self._sampled()[1].size

    def counts(self, code: FieldCode) -> NDArray[np.int64]:
        """Coarse tokens of a sample, by context under a code: [contexts, 64]."""
        rows, f, z, coarse = self._sampled()
        look = Classifier(f, replace(code, rows=None if code.rows is None else code.rows[rows]))
        counts = np.zeros(_trial_classes(f, code) * ACTIVITIES * _COARSE_TOKENS, np.int64)
        for phase in range(1 + code.depth):
            tokens, around = coarse[phase_slice(code.depth, phase)], None
            if phase:
                around = neighbour_sums(z, code.depth, phase)
                part = z[phase_slice(code.depth, phase)]
                tokens = _coarse(flip_signs(part, around, f.width))
            key = look.look_up(_TRIAL_KEYS, phase, around)
            key |= tokens
            counts += np.bincount(key, minlength=len(counts))
        return counts.reshape(-1, _COARSE_TOKENS)

    def _sampled(self) -> tuple[slice, Field, NDArray[Any], NDArray[np.uint8]]:
        """Which rows; the field of these, its values and their coarse tokens."""
        if self._sample is None:
            f, z = self._field, self._z
            rows = _sampled_rows(f)
            if rows.step is not None:
                z = np.ascontiguousarray(z.reshape(f.rows, f.columns)[rows]).reshape(-1)
            self._sample = rows, _sampled_field(f, rows), z, _coarse(z)
        return self._sample

    def _magnitudes(self, z: NDArray[Any], limb: int) -> NDArray[np.float32]:
        one = z.dtype.type(1)
        m = (z >> one) + (z & one)
        if self._limbs > 1:
            m = m >> m.dtype.type(LIMB * limb) & m.dtype.type((1 << LIMB) - 1)
        return np.asarray(m, np.float32)


def _coarse(z: NDArray[Any]) -> NDArray[np.uint8]:
    if len(z) and int(z.max()) < 1024:
        return _COARSE.tokens(np.arange(1024)).take(z)
    return np.minimum(_COARSE.tokens(z), _COARSE_TOKENS - 1)
