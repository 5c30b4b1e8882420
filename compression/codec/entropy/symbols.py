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

_CHUNK = 1 << 16


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
        none = np.zeros(0, np.int64)
        if not sparse.any():
            return cls(len(clusters), None, clusters, none, np.zeros(len(sparse), np.int64))
        # All dense positions go to one last bucket: they stay in order there.
        last = int(sparse.sum())
        bucket = np.full(len(sparse), last, np.uint8)
        bucket[sparse] = np.arange(last)
        order, sizes = _sorted_positions(clusters, bucket, last + 1)
        counts = np.zeros(len(sparse), np.int64)
        counts[sparse] = sizes[:last]
        total = len(clusters) - int(sizes[last])
        if not total:
            return cls(len(clusters), None, clusters, none, counts)
        dense_at = order[total:]
        return cls(len(clusters), dense_at, clusters.take(dense_at), order[:total], counts)


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


def _sorted_positions(
    clusters: NDArray[np.uint8], bucket: NDArray[np.uint8], count: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Positions by the bucket of their cluster, in order within each; and the buckets' sizes.

    A stable sort, in chunks to bound the temporary arrays.
    """
    n = len(clusters)
    order: NDArray[Any] = np.empty(n, np.int32 if n < 1 << 31 else np.int64)
    starts = range(0, n, _CHUNK)
    sizes = []
    total = np.zeros(count, np.int64)
    for s in starts:
        by_cluster = np.bincount(clusters[s : s + _CHUNK], minlength=len(bucket))
        sizes.append(np.bincount(bucket, by_cluster, count).astype(np.int64))
        total += sizes[-1]
    at = (np.cumsum(total) - total).tolist()
    for s, parts in zip(starts, sizes, strict=True):
        chunk = np.argsort(bucket.take(clusters[s : s + _CHUNK]), kind="stable")
        chunk += s
        done = 0
        for b in np.flatnonzero(parts).tolist():
            k = int(parts[b])
            order[at[b] : at[b] + k] = chunk[done : done + k]
            at[b] += k
            done += k
    return order, total


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.cumsum(counts) - counts


def _non_zeros(
    v: NDArray[Any], order: NDArray[Any], counts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[np.int64]]:
    """Where in ``order`` the non-zeros are, their values, and their number in each cluster."""
    at, values = [], []
    for s in range(0, len(order), _CHUNK):  # in chunks, to bound temporary arrays
        part = v.take(order[s : s + _CHUNK])
        index = np.flatnonzero(part)
        values.append(part[index])
        at.append(index + s)
    where = np.concatenate(at) if at else np.zeros(0, np.int64)
    ends = np.searchsorted(where, np.cumsum(counts))
    return where, np.concatenate(values) if values else v[:0], np.diff(ends, prepend=0)


def collect(placements: Sequence[Placement], z: Sequence[NDArray[Any]]) -> Symbols:
    """Symbols of a segment from its fields' values."""
    dense = [v if p.dense_at is None else v[p.dense_at] for p, v in zip(placements, z, strict=True)]
    clusters = np.arange(len(placements[0].counts))
    before = np.zeros(len(clusters), np.int64)
    ranks, owners, values = [], [], []
    for p, v in zip(placements, z, strict=True):
        rank, value, used = _non_zeros(v, p.order, p.counts)
        rank += np.repeat(before - _starts(p.counts), used)
        ranks.append(rank)
        owners.append(used)
        values.append(value)
        before = before + p.counts
    counts = np.sum(owners, axis=0)
    if len(placements) == 1:
        gaps, value = ranks[0], values[0]
    else:
        by = np.argsort(np.concatenate([np.repeat(clusters, k) for k in owners]), kind="stable")
        gaps, value = np.concatenate(ranks)[by], np.concatenate(values)[by]
    first = _starts(counts)[counts > 0]
    begin = gaps[first]
    gaps[1:] -= gaps[:-1].copy() + 1
    gaps[first] = begin
    value -= value.dtype.type(1)
    return Symbols(dense[0] if len(dense) == 1 else np.concatenate(dense), counts, gaps, value)


def distribute(placements: Sequence[Placement], symbols: Symbols) -> list[NDArray[Any]]:
    """Inverse of :func:`collect`; MalformedPayload where gaps leave their cluster."""
    total = np.sum([p.counts for p in placements], axis=0)
    used = np.flatnonzero(symbols.counts)
    # Ranks within a cluster: running sum of gap + 1, restarted where a cluster starts.
    rank = symbols.gaps + 1
    np.cumsum(rank, out=rank)
    first = _starts(symbols.counts)
    offset = np.zeros(len(total), np.int64)
    offset[used] = rank[first[used]] - symbols.gaps[first[used]]
    last = rank[(first + symbols.counts - 1)[used]] - offset[used]
    if (last >= total[used]).any():
        raise MalformedPayload("a gap leads past the end of its cluster")
    value = symbols.values
    value += value.dtype.type(1)
    if not value.all():  # one that wrapped
        raise MalformedPayload(f"a value exceeds {8 * value.itemsize} bits")
    result, taken = [], 0
    before = np.zeros(len(total), np.int64)
    owner = np.repeat(np.arange(len(total)), symbols.counts) if len(placements) > 1 else None
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
            if owner is None:
                rank += np.repeat(_starts(p.counts) - offset, symbols.counts)
                out[p.order.take(rank)] = value
            else:
                local = rank - (offset + before)[owner]
                mine = (local >= 0) & (local < p.counts[owner])
                out[p.order[local[mine] + _starts(p.counts)[owner[mine]]]] = value[mine]
        before = before + p.counts
        result.append(out)
    return result
