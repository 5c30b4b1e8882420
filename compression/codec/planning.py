"""The encoder's choices: modes, levels, clusters, tables. Decoders never run this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .classes import ACTIVITIES, CODED, CONSTANT, MAX_LEVEL, FieldCode, raw_contexts
from .fields import PREVIOUS_CLASSES, Field
from .tokens import TokenScheme

__all__ = ["build_maps", "choose_scheme", "plan_field"]

_OFFSET = 36
_RAW = PREVIOUS_CLASSES * ACTIVITIES


def _xlogx(h: NDArray[Any]) -> NDArray[np.float64]:
    h = h.astype(np.float64)
    return np.asarray(h * np.log2(np.maximum(h, 1)))


def entropy_bits(h: NDArray[Any]) -> NDArray[np.float64]:
    """Bits of the symbols counted in each row of ``h`` under the row's own distribution."""
    return np.asarray(_xlogx(h.sum(-1)) - _xlogx(h).sum(-1))


def choose_scheme(largest: int, total: int) -> TokenScheme:
    """Return the finest token scheme that is worth its tables and fits 256 tokens."""
    wanted = (7, 2) if total > 200_000 and largest > 40 else (5, 1)
    for direct, mantissa in (wanted, (6, 1), (5, 1)):
        scheme = TokenScheme(direct, mantissa)
        if scheme.alphabet(largest) <= 256:
            return scheme
    return TokenScheme(4, 1)


def _magnitudes(z: NDArray[Any]) -> NDArray[np.float32]:
    return ((z + z.dtype.type(1)) >> 1).astype(np.float32)


def _axis_means(f: Field, a: NDArray[np.float32]) -> tuple[Any, Any]:
    """Means of |q| over each row and each column (under the mask)."""
    if f.selected is None:
        grid = a.reshape(f.rows, f.columns)
        floor = np.float64(0.5)
        return (
            np.maximum(grid.sum(1, dtype=np.float64), floor) / f.columns,
            np.maximum(grid.sum(0, dtype=np.float64), floor) / f.rows,
        )
    row, column = np.divmod(f.selected, f.columns)
    out = []
    for index, n in ((row, f.rows), (column, f.columns)):
        total = np.bincount(index, a, minlength=n)
        count = np.bincount(index, minlength=n)
        out.append(np.where(count > 0, np.maximum(total, 0.5) / np.maximum(count, 1), np.nan))
    return out[0], out[1]


def _levels(means: Any, mean: float, step: int) -> tuple[NDArray[np.uint8], int]:
    """Levels from 0 on, multiples of ``step``, and the activity of level 0 against the mean."""
    raw = np.round(np.log2(np.where(np.isnan(means), mean, means) / mean) * 2 / step)
    raw = np.clip(raw, raw.max() - MAX_LEVEL // step, None).astype(np.int64)
    low = int(raw.min())
    return ((raw - low) * step).astype(np.uint8), low * step


def plan_field(f: Field, z: NDArray[Any], table_set: int) -> FieldCode:
    """Choose how a field is coded."""
    if not z.any():
        return FieldCode(CONSTANT, table_set=table_set)
    a = _magnitudes(z)
    mean = float(a.mean(dtype=np.float64))
    base = min(_OFFSET + round(2 * float(np.log2(mean))), ACTIVITIES - 1)
    flat = FieldCode(CODED, table_set=table_set, base=base)
    if f.rows < 2 or f.columns < 2 or f.size < 256 or f.plane is not None:
        return flat
    by_row, by_column = _axis_means(f, a)
    small = np.minimum(z, 15).astype(np.uint32)

    def bits(code: FieldCode) -> float:
        h = np.bincount((raw_contexts(f, code).astype(np.uint32) << 4) | small, minlength=16 * _RAW)
        h = h.reshape(_RAW, 16)
        return float(entropy_bits(h).sum()) + 12 * float((h.sum(1) > 0).sum())

    best, least = flat, bits(flat)
    step = 1 if f.size > 64 * (f.rows + f.columns) else 2
    rows, low_r = _levels(by_row, mean, step)
    columns, low_c = _levels(by_column, mean, step)
    for use_r, use_c in ((1, 0), (0, 1), (1, 1)):
        code = FieldCode(
            CODED,
            table_set=table_set,
            base=max(base + low_r * use_r + low_c * use_c, -2 * ACTIVITIES),
            rows=rows if use_r else None,
            columns=columns if use_c else None,
        )
        cost = bits(code)
        for used, levels in ((use_r, rows), (use_c, columns)):
            if used:
                cost += float(entropy_bits(np.bincount(levels))) + 32
        if cost < least:
            best, least = code, cost
    return best


def build_maps(
    histograms: Sequence[NDArray[np.int64]], table_cost: float
) -> tuple[list[NDArray[np.uint8]], NDArray[np.bool_]]:
    """Cluster raw contexts: per set the map (255: unused), and which clusters are sparse.

    ``histograms[set]`` is [16 * 64, tokens].
    """
    maps: list[NDArray[np.uint8]] = []
    sparse: list[bool] = []
    for h in histograms:
        table = np.full((PREVIOUS_CLASSES, ACTIVITIES), 255, np.uint8)
        for row in range(PREVIOUS_CLASSES):
            part = h[row * ACTIVITIES : (row + 1) * ACTIVITIES]
            used = np.flatnonzero(part.sum(1)).tolist()
            groups = [([a], part[a].astype(np.float64)) for a in used]
            groups = _merge(groups, table_cost)
            for members, counts in groups:
                cluster = min(len(sparse), 254)
                if len(sparse) < 254:
                    sparse.append(bool(counts[0] >= 0.75 * counts.sum()))
                for a in members:
                    table[row, a] = cluster
        maps.append(table)
    return maps, np.array(sparse, np.bool_)


def _merge(
    groups: list[tuple[list[int], NDArray[np.float64]]], table_cost: float
) -> list[tuple[list[int], NDArray[np.float64]]]:
    """Merge neighbours while a table costs more than it saves."""

    def cost(h: NDArray[np.float64]) -> float:
        return float(entropy_bits(h)) + table_cost * float((h > 0).sum()) + 8

    costs = [cost(h) for _, h in groups]
    while len(groups) > 1:
        joint = [cost(groups[i][1] + groups[i + 1][1]) for i in range(len(groups) - 1)]
        gains = [costs[i] + costs[i + 1] - j for i, j in enumerate(joint)]
        i = int(np.argmax(gains))
        if gains[i] <= 0:
            break
        groups[i : i + 2] = [(groups[i][0] + groups[i + 1][0], groups[i][1] + groups[i + 1][1])]
        costs[i : i + 2] = [joint[i]]
    return groups
