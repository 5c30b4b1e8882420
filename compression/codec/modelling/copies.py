"""Rows that repeat an earlier row: coded once, then referred to.

An embedding table's update often has them: all items that one user met share a gradient, and one
step of an optimiser that looks at signs makes their rows equal.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..context import Context, TensorSpec
from ..errors import MalformedPayload
from .fields import CHUNK, Field

__all__ = [
    "copied_fields",
    "expand_copies",
    "find_copies",
    "may_have_copies",
]

_LEAST_ROWS = 64
_LEAST_COLUMNS = 8
_PROBES = 8
_BITS_A_VALUE = 3
_REFERENCES = np.dtype(np.int32)


def may_have_copies(name: str, spec: TensorSpec, context: Context) -> bool:
    """Whether a tensor may be coded with copied rows: integers that nothing conditions."""
    return (
        spec.dtype.kind in "iub"
        and len(spec.shape) > 1
        and _LEAST_ROWS <= spec.shape[0] < 1 << 31
        and math.prod(spec.shape[1:]) >= _LEAST_COLUMNS
        and name not in (context.mask or {})
        and name not in (context.previous or {})
    )


def copied_fields(name: str, spec: TensorSpec, kept: int) -> list[Field]:
    """Fields of a tensor with copied rows: a reference for each row, then the rows kept."""
    references = TensorSpec(_REFERENCES, (spec.shape[0],))
    rows = TensorSpec(spec.dtype, (kept, *spec.shape[1:]))
    return [Field(name, references, None, None, None), Field(name, rows, None, None, None)]


def find_copies(array: NDArray[Any]) -> tuple[NDArray[np.int32], NDArray[Any]] | None:
    """References (0: the next row kept, k: a copy of the k-th non-zero one) and the rows kept.

    None where copies do not pay.
    """
    rows = array.reshape(len(array), -1)
    step = max(1, rows.shape[1] // _PROBES)  # the columns that are looked at first
    probe = _hashes(rows[:, ::step])
    copied = _copied(probe, np.asarray(rows[:, ::step].any(1)))
    if int(copied.sum()) < 0.01 * len(rows):  # not worth a closer look
        return None
    used = np.zeros(len(rows), np.bool_)
    for s in range(0, len(rows), _rows_of(rows)):
        used[s : s + _rows_of(rows)] = rows[s : s + _rows_of(rows)].any(1)
    hashes = _hashes(rows)
    copied = _copied(hashes, used)
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    source = first[group]
    # Hashes only propose.
    at = np.flatnonzero(copied)
    copied[at] = (rows[at] == rows[source[at]]).all(1)
    if not _copies_pay(int(copied.sum()), len(rows), int(np.count_nonzero(rows[copied]))):
        return None
    number = np.cumsum(used & ~copied)
    references = np.where(copied, number[source], 0).astype(_REFERENCES)
    return references, np.ascontiguousarray(array[~copied])


def _copies_pay(count: int, rows: int, values: int) -> bool:
    """Whether references to so many copies cost less than their non-zero values."""
    flags = -math.log2(max(count / rows, 1e-9)) + 1.5
    return count > 0 and values * _BITS_A_VALUE >= 1.3 * count * (flags + math.log2(rows))


def expand_copies(references: NDArray[Any], kept: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
    """Inverse of :func:`find_copies`; MalformedPayload where a reference leads nowhere."""
    own = references == 0
    if int(own.sum()) != len(kept):
        raise MalformedPayload(f"{int(own.sum())} rows are no copies, but {len(kept)} were kept")
    used = np.flatnonzero(kept.reshape(len(kept), -1).any(1)) if len(kept) else np.zeros(0, int)
    least, most = int(references.min()), int(references.max())
    if least < 0 or most > len(used):
        raise MalformedPayload("a row is a copy of one that does not exist")
    index = np.cumsum(own) - 1
    index[~own] = used[references[~own] - 1]
    return np.asarray(kept[index]).reshape(spec.shape)


def _rows_of(rows: NDArray[Any]) -> int:
    """Rows handled at a time."""
    return max(1, CHUNK // int(rows.shape[1]))


def _hashes(rows: NDArray[Any]) -> NDArray[np.uint64]:
    """A 64-bit hash of every row: equal rows have equal hashes."""
    factors = np.arange(1, rows.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    factors ^= factors >> np.uint64(29)
    factors = factors * np.uint64(0xBF58476D1CE4E5B9) | np.uint64(1)
    out = np.empty(len(rows), np.uint64)
    for s in range(0, len(rows), _rows_of(rows)):  # in chunks, to bound temporary arrays
        part = rows[s : s + _rows_of(rows)].astype(np.int64).view(np.uint64)
        out[s : s + _rows_of(rows)] = (part * factors).sum(1, dtype=np.uint64)
    return out


def _copied(hashes: NDArray[np.uint64], used: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Rows that are not zero and whose hash an earlier row has."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    again = np.zeros(len(hashes), np.bool_)
    again[order[1:]] = ordered[1:] == ordered[:-1]
    return again & used
