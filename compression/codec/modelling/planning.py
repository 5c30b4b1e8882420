"""The encoder's choices: modes, levels, clusters, tables. Decoders never run this."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..entropy.tokens import TokenScheme
from .classes import (
    ACTIVITIES,
    CODED,
    CONSTANT,
    MAX_LEVEL,
    UNIT_ACTIVITY,
    FieldCode,
    may_have_neighbours,
)
from .fields import PREVIOUS_CLASSES, Field
from .observed import LIMB, Observed

__all__ = ["build_maps", "choose_scheme", "entropy_bits", "plan_field"]

_RAW = PREVIOUS_CLASSES * ACTIVITIES
_BINS = 48
_TABLE_BITS = 4e6
_GROUPS = 256
_REFINEMENTS = 2
_DOUBT = 1.3
_MINOR = 400
"""Fields below this fraction of a payload are not worth the time of a trial."""


def _xlogx(h: NDArray[Any]) -> NDArray[np.float64]:
    h = h.astype(np.float64)
    return np.asarray(h * np.log2(np.maximum(h, 1)))


def entropy_bits(h: NDArray[Any]) -> NDArray[np.float64]:
    """Bits of the symbols counted in each row of ``h`` under the row's own distribution."""
    return np.asarray(_xlogx(h.sum(-1)) - _xlogx(h).sum(-1))


def choose_scheme(largest: int, total: int, zs: Sequence[NDArray[Any]]) -> TokenScheme:
    """Return the token scheme that is cheapest for the fields' values, as zigzag.

    ``largest`` is the largest of the ``total`` values.
    """
    schemes = [TokenScheme(d, m) for d, m in ((5, 1), (5, 2), (6, 2), (6, 3), (7, 2), (7, 3))]
    fitting = [s for s in schemes if s.alphabet(largest) <= 256]
    if not fitting:
        return TokenScheme(4, 1)
    if largest < 32:
        return fitting[0]
    step = max(1, total // (1 << 18))
    sampled = [z[::step] for z in zs]
    values = sampled[0] if len(sampled) == 1 else np.concatenate(sampled)
    values = values[values > 0]

    def bits(scheme: TokenScheme) -> float:
        counts = np.bincount(scheme.tokens(values), minlength=256)
        widths = np.where(counts > 0, scheme.widths(), 0)
        data = float(entropy_bits(counts)) + float((counts * widths).sum())
        return data * step + 24 * float((counts > 0).sum())

    return min(fitting, key=bits)


def _axis_means(seen: Observed) -> list[NDArray[np.float64]]:
    """Means of |q| over each row and each column (under the mask), never zero; NaN of none."""
    out = []
    for limbs, size in zip(seen.axis_sums(), seen.axis_sizes(), strict=True):
        total = limbs[0]
        for i in range(1, len(limbs)):
            total = total + limbs[i] * float(1 << LIMB * i)
        out.append(np.where(size > 0, np.maximum(total, 0.5) / np.maximum(size, 1), np.nan))
    return out


def _levels(
    means: NDArray[np.float64], mean: float, step: int, entries: int
) -> tuple[NDArray[np.uint8], int]:
    """Levels from 0 on, multiples of ``step``, and the activity of level 0 against the mean.

    Each is the cheapest of what its entries cost under it, as geometric with that mean, and what
    it costs itself, given how frequent it is: noisy means do not pay for being followed.
    """
    means = np.where(np.isnan(means), mean, means)
    exact = np.log2(means / mean) * 2 / step
    high = math.ceil(float(exact.max()))
    low = max(math.floor(float(exact.min())), high - MAX_LEVEL // step)
    assumed = mean * np.exp2(np.arange(low, high + 1) * step / 2)
    cost = np.log2(1 + assumed) + means[:, None] * np.log2(1 + 1 / assumed)
    cost *= entries
    chosen = cost.argmin(1)
    for _ in range(_REFINEMENTS):
        counts = np.bincount(chosen, minlength=len(assumed)) + 0.25
        chosen = (cost - np.log2(counts / counts.sum())).argmin(1)
    least = int(chosen.min())
    return ((chosen - least) * step).astype(np.uint8), (low + least) * step


def _trial_bits(f: Field, seen: Observed, code: FieldCode) -> float:
    """Estimated bits of the whole field under a code, without its levels, from a sample."""
    scale = f.size / max(seen.sampled(), 1)
    h = seen.counts(code)
    h = h[h.any(1)]
    # Half a nat for each fitted probability is what a sample's own entropy leaves out.
    fitted = (h > 0).sum(1)
    learning = 0.3 * float((fitted * np.log2(1 + h.sum(1) * scale)).sum())
    learning += 0.72 * (scale - 1) * float(fitted.sum())
    return float(entropy_bits(h).sum()) * scale + learning


def plan_field(f: Field, seen: Observed, total: int, *, levels: bool = True) -> FieldCode:
    """Choose how a field is coded, with levels or without; ``total``: elements of the payload."""
    if not seen.largest:
        return FieldCode(CONSTANT)
    mean = sum(limb << LIMB * i for i, limb in enumerate(seen.sums())) / f.size
    base = min(UNIT_ACTIVITY + round(2 * float(np.log2(mean))), ACTIVITIES - 1)
    best = FieldCode(CODED, base=base)
    if f.size < max(64, total // _MINOR) or f.plane is not None:
        return best
    least = _trial_bits(f, seen, best)
    side = 0.0
    if levels and f.rows > 1 and f.columns > 1:
        flat = best
        by_row, by_column = _axis_means(seen)
        for step in _steps(least, f.rows + f.columns):
            rows, low_r = _levels(by_row, mean, step, f.size // f.rows)
            columns, low_c = _levels(by_column, mean, step, f.size // f.columns)
            cost_r, cost_c = _level_bits(rows), _level_bits(columns)
            for r, c in ((1, 1), (1, 0), (0, 1)):
                extra = r * cost_r + c * cost_c
                if extra > 0.5 * least + side:
                    continue
                code = replace(
                    flat,
                    base=max(base + low_r * r + low_c * c, -2 * ACTIVITIES),
                    rows=rows if r else None,
                    columns=columns if c else None,
                )
                cost = _trial_bits(f, seen, code)
                # On a sample levels promise somewhat more than they keep.
                if cost + _DOUBT * extra < least + _DOUBT * side:
                    best, least, side = code, cost, extra
    if may_have_neighbours(f):
        code = replace(best, depth=1)
        if _trial_bits(f, seen, code) + 64 < least:
            best = code
    return best


def _steps(bits: float, levels: int) -> tuple[int, ...]:
    """Resolutions of the levels worth trying, in half-octaves."""
    return (1,) if bits > 300 * levels else (1, 2) if bits > 150 * levels else (2, 4)


def _level_bits(levels: NDArray[np.uint8]) -> float:
    counts = np.bincount(levels)
    return float(entropy_bits(counts)) + 4 * float((counts > 0).sum()) + 16


def build_maps(
    histograms: Sequence[NDArray[np.int64]],
) -> tuple[list[NDArray[np.uint8]], NDArray[np.bool_]]:
    """Cluster raw contexts: per set the map (255: unused), and which clusters are sparse.

    ``histograms[set]`` is [16 * 64, tokens].
    """
    # Bits that one token of one table is worth. More than it takes in large payloads, where a
    # table's time counts rather than its bytes.
    total = sum(float(entropy_bits(h.sum(0))) for h in histograms)
    table_cost = 3 * (1 + total / _TABLE_BITS)
    maps: list[NDArray[np.uint8]] = []
    sparse: list[bool] = []
    sizes: dict[int, float] = {}
    for h in histograms:
        table = np.full(_RAW, 255, np.uint8)
        used = np.flatnonzero(h.any(1))
        groups = _gathered(h, used.tolist())
        groups = _merge(groups, table_cost, neighbours_only=True)
        groups = _merge(groups, table_cost, neighbours_only=False)
        for members, counts in sorted(groups, key=lambda g: min(g[0])):
            cluster = min(len(sparse), 253)
            if cluster == len(sparse):
                sparse.append(bool(counts[0] >= 0.85 * counts.sum()))
            table[members] = cluster
            sizes[cluster] = sizes.get(cluster, 0.0) + float(counts.sum())
        maps.append(table.reshape(PREVIOUS_CLASSES, ACTIVITIES))
    # Sorting positions pays only where many are skipped.
    skipped = sum(n for c, n in sizes.items() if sparse[c])
    if skipped < 0.25 * sum(sizes.values()):
        sparse = [False] * len(sparse)
    return maps, np.array(sparse, np.bool_)


def _gathered(h: NDArray[np.int64], used: list[int]) -> list[tuple[list[int], NDArray[np.float64]]]:
    """Start groups from raw contexts; rare ones join the one before in their class at once."""
    folded = h[used, :_BINS].astype(np.float64)
    folded[:, -1] += h[used, _BINS:].sum(1)
    share = 2e-4
    while len(groups := _fold(folded, used, share)) > _GROUPS and share < 1:
        share *= 1.5
    return groups


def _fold(
    folded: NDArray[np.float64], used: list[int], share: float
) -> list[tuple[list[int], NDArray[np.float64]]]:
    # What counts is information: non-zeros, or everything where zeros are not the rule.
    weight = folded.sum(1) - np.maximum(folded[:, 0] - folded[:, 1:].sum(1), 0)
    total = float(weight.sum())
    weights: list[float] = []
    groups: list[tuple[list[int], NDArray[np.float64]]] = []
    for a, counts, w in zip(used, folded, weight.tolist(), strict=True):
        beside = groups and groups[-1][0][-1] // ACTIVITIES == a // ACTIVITIES
        if beside and min(w, weights[-1]) < max(8.0, share * total):
            groups[-1] = ([*groups[-1][0], a], groups[-1][1] + counts)
            weights[-1] += w
            continue
        groups.append(([a], counts))
        weights.append(w)
    return groups


def _table_bits(h: NDArray[np.float64], table_cost: float) -> NDArray[np.float64]:
    """Bits of the symbols of each row of counts, with its table."""
    # A token's share of a table costs about half the logarithm of its count.
    per = table_cost * np.log2(1 + np.minimum(h, 4096)) / 6
    return np.asarray(entropy_bits(h) + per.sum(-1) + 10)


def _merge(
    groups: list[tuple[list[int], NDArray[np.float64]]], table_cost: float, *, neighbours_only: bool
) -> list[tuple[list[int], NDArray[np.float64]]]:
    """Merge pairs of groups while a table of its own costs more than it saves."""
    if len(groups) < 2:
        return groups
    members = [g[0] for g in groups]
    h = np.stack([g[1] for g in groups])
    own = _table_bits(h, table_cost)
    n = len(groups)
    gain = np.full((n, n), -np.inf)

    def refresh(i: int, others: NDArray[np.int64]) -> None:
        js = others[(others >= 0) & (others < n) & (others != i)]
        value = own[i] + own[js] - _table_bits(h[js] + h[i], table_cost)
        gain[i, js] = value
        gain[js, i] = value

    if neighbours_only:
        value = own[:-1] + own[1:] - _table_bits(h[:-1] + h[1:], table_cost)
        gain[np.arange(n - 1), np.arange(1, n)] = value
        gain[np.arange(1, n), np.arange(n - 1)] = value
    else:
        for i in range(n - 1):
            refresh(i, np.arange(i + 1, n))
    while n > 1:
        i, j = sorted(int(v) for v in np.unravel_index(int(np.argmax(gain)), gain.shape))
        if gain[i, j] <= 0:
            break
        members[i] = members[i] + members.pop(j)
        h[i] += h[j]
        h = np.delete(h, j, 0)
        own = np.delete(own, j)
        own[i] = float(_table_bits(h[i], table_cost))
        gain = np.delete(np.delete(gain, j, 0), j, 1)
        n -= 1
        if neighbours_only:
            gain[i, :] = gain[:, i] = -np.inf
        refresh(i, np.array([i - 1, i + 1]) if neighbours_only else np.arange(n))
    return list(zip(members, h, strict=True))
