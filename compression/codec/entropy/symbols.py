"""A segment's values as symbols: tokens of dense clusters, gaps and values of sparse ones.

A *dense* cluster codes every position. A *sparse* cluster codes, in the order of its positions,
the gap of zeros before each non-zero and the non-zero itself: the work follows the non-zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MalformedPayload

__all__ = ["Placement", "Symbols", "collect", "distribute"]


@dataclass(frozen=True)
class Placement:
    """Where one field's positions go."""

    size: int
    dense_at: NDArray[Any] | None
    """Positions of dense clusters in order; None: all of them."""
    dense_cluster: NDArray[np.uint8]
    order: NDArray[Any]
    """Positions of sparse clusters, by cluster, then in order."""
    counts: NDArray[np.int64]
    """Positions of each cluster, [clusters]; zero for dense ones."""

    @classmethod
    def of(cls, clusters: NDArray[np.uint8], sparse: NDArray[np.bool_]) -> Placement:
        """Place positions by their clusters; ``sparse[cluster]`` says which are sparse."""
        if not sparse.any():
            none = np.zeros(0, np.int64)
            return cls(len(clusters), None, clusters, none, np.zeros(len(sparse), np.int64))
        counts = np.bincount(clusters, minlength=len(sparse))
        counts[~sparse] = 0
        total = int(counts.sum())
        if total == len(clusters):
            empty = np.zeros(0, np.int64)
            order = (
                np.arange(total)
                if np.count_nonzero(counts) <= 1
                else _compact(np.argsort(clusters, kind="stable"))
            )
            return cls(total, empty, np.zeros(0, np.uint8), order, counts)
        if not total:
            return cls(len(clusters), None, clusters, np.zeros(0, np.int64), counts)
        # All dense positions in one last bucket of a stable sort: they stay in order there.
        bucket = np.where(sparse, np.arange(len(sparse)), 255).astype(np.uint8)
        order = _compact(np.argsort(bucket.take(clusters), kind="stable"))
        dense_at = order[total:].copy()
        return cls(len(clusters), dense_at, clusters[dense_at], order[:total].copy(), counts)


@dataclass(frozen=True)
class Symbols:
    """What a segment codes. ``runs`` and ``values`` are ordered by cluster."""

    dense: NDArray[Any]
    """z of the dense positions, fields one after the other."""
    counts: NDArray[np.int64]
    """Non-zeros of every cluster, [clusters]."""
    gaps: NDArray[np.int64]
    values: NDArray[Any]
    """z - 1 of the non-zeros."""


def _compact(indices: NDArray[np.int64]) -> NDArray[Any]:
    """The same indices in half the memory, where they fit."""
    small = not len(indices) or int(indices.max()) < 1 << 31
    return indices.astype(np.int32) if small else indices


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.cumsum(counts) - counts


def collect(placements: Sequence[Placement], z: Sequence[NDArray[Any]]) -> Symbols:
    """Symbols of a segment from its fields' values."""
    dense = [v if p.dense_at is None else v[p.dense_at] for p, v in zip(placements, z, strict=True)]
    before = np.zeros(len(placements[0].counts), np.int64)
    ranks, owners, values = [], [], []
    for p, v in zip(placements, z, strict=True):
        ordered = v[p.order]
        at = np.flatnonzero(ordered)
        owner = np.searchsorted(np.cumsum(p.counts), at, side="right")
        ranks.append(at + (before - _starts(p.counts))[owner])
        owners.append(owner)
        values.append(ordered[at])
        before = before + p.counts
    rank, owner, value = (np.concatenate(x) for x in (ranks, owners, values))
    if len(placements) > 1:
        by = np.argsort(owner, kind="stable")
        rank, owner, value = rank[by], owner[by], value[by]
    counts = np.bincount(owner, minlength=len(before))
    gaps = np.diff(rank, prepend=-1) - 1
    first = _starts(counts)[counts > 0]
    gaps[first] = rank[first]
    value -= value.dtype.type(1)
    return Symbols(np.concatenate(dense), counts, gaps, value)


def distribute(placements: Sequence[Placement], symbols: Symbols) -> list[NDArray[Any]]:
    """Inverse of :func:`collect`; MalformedPayload where gaps leave their cluster."""
    total = np.sum([p.counts for p in placements], axis=0)
    owner = np.repeat(np.arange(len(total)), symbols.counts)
    # Ranks within a cluster: running sum of gap + 1, restarted where a cluster starts.
    steps = np.cumsum(symbols.gaps + 1)
    first = _starts(symbols.counts)
    offset = np.concatenate([[0], steps])[first]
    rank = steps - offset[owner] - 1
    if len(rank) and (
        (rank >= total[owner]).any() or (rank < 0).any() or (np.diff(steps) <= 0).any()
    ):
        raise MalformedPayload("a gap leads past the end of its cluster")
    value = symbols.values + symbols.values.dtype.type(1)
    result, taken = [], 0
    before = np.zeros(len(total), np.int64)
    for p in placements:
        n = len(p.dense_cluster)
        part = symbols.dense[taken : taken + n]
        taken += n
        if p.dense_at is None:
            out = part
        else:
            out = np.zeros(p.size, symbols.dense.dtype)
            out[p.dense_at] = part
        if len(p.order) and len(rank):
            local = rank - before[owner]
            mine = (local >= 0) & (local < p.counts[owner])
            out[p.order[local[mine] + _starts(p.counts)[owner[mine]]]] = value[mine]
        before = before + p.counts
        result.append(out)
    return result
