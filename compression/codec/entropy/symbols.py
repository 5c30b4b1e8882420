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

__all__ = ["FieldValues", "Placement", "Symbols", "collect", "distribute"]

_CHUNK = 1 << 16
_SORT_BITS = 18


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


@dataclass(frozen=True)
class FieldValues:
    """Values (z) of one field: of some positions every one, of the others those that are not zero.

    Attributes:
        size: number of positions.
        dense_at: positions of `dense`; None: all of them.
        dense: their values.
        at: other positions whose value is not zero, in no particular order.
        values: their values.
    """

    size: int
    dense_at: NDArray[Any] | None
    dense: NDArray[Any]
    at: NDArray[Any]
    values: NDArray[Any]

    @classmethod
    def all_of(cls, z: NDArray[Any]) -> FieldValues:
        """From the value of every position."""
        return cls(len(z), None, z, np.zeros(0, np.int64), z[:0])

    @classmethod
    def zeros(cls, size: int, bits: int) -> FieldValues:
        """Nothing but zeros, in integers of 32 or 64 bits."""
        nowhere, nothing = np.zeros(0, np.int64), np.zeros(0, f"u{bits // 8}")
        return cls(size, nowhere, nothing, nowhere, nothing)

    def whole(self) -> NDArray[Any]:
        """The value of every position."""
        if self.dense_at is None:
            return self.dense
        out = np.zeros(self.size, self.dense.dtype)
        out[self.dense_at] = self.dense
        out[self.at] = self.values
        return out

    def nonzeros(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Positions whose value is not zero, in no particular order, and their values."""
        found = np.flatnonzero(self.dense)
        at = found if self.dense_at is None else self.dense_at[found]
        return np.concatenate([at, self.at]), np.concatenate([self.dense[found], self.values])


def _sorted_positions(
    clusters: NDArray[np.uint8], bucket: NDArray[np.uint8], count: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Positions by the bucket of their cluster, in order within each; and the buckets' sizes."""
    n = len(clusters)
    if n <= 1 << _SORT_BITS:
        # bucket and position in one integer: sorting it takes half the time of a stable argsort
        keys = (bucket.astype(np.uint32) << _SORT_BITS).take(clusters)
        keys |= np.arange(n, dtype=np.uint32)
        keys.sort()
        fences = np.arange(count + 1, dtype=np.uint32) << _SORT_BITS
        sizes = np.diff(np.searchsorted(keys, fences))
        keys &= np.uint32((1 << _SORT_BITS) - 1)
        return keys.view(np.int32), sizes
    # In chunks, to bound temporary arrays.
    order: NDArray[Any] = np.empty(n, np.int32 if n < 1 << 31 else np.int64)
    chunks = [clusters[s : s + (1 << _SORT_BITS)] for s in range(0, n, 1 << _SORT_BITS)]
    each = [np.bincount(bucket.take(chunk), minlength=count) for chunk in chunks]
    total = np.sum(each, axis=0)
    at = (np.cumsum(total) - total).tolist()
    for i, (chunk, parts) in enumerate(zip(chunks, each, strict=True)):
        own = _sorted_positions(chunk, bucket, count)[0].astype(order.dtype, copy=False)
        own += i << _SORT_BITS
        done = 0
        for b in np.flatnonzero(parts).tolist():
            k = int(parts[b])
            order[at[b] : at[b] + k] = own[done : done + k]
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


def distribute(placements: Sequence[Placement], symbols: Symbols) -> list[FieldValues]:
    """Inverse of :func:`collect`; MalformedPayload where gaps leave their cluster."""
    # A cell is what one field has in one cluster. Its positions are a run of that field's order,
    # and `start` is where they begin when the fields' orders lie one after the other.
    field, cluster, count = _cells(placements)
    start = _starts(count)
    total = np.bincount(cluster, count, len(symbols.counts)).astype(np.int64)
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
    # Ranks among the positions of all clusters ascend: every cell holds a run of them.
    rank += np.repeat(_starts(total) - offset, symbols.counts)
    by = np.argsort(cluster, kind="stable")
    ends = np.cumsum(count[by])
    each = np.diff(np.searchsorted(rank, ends), prepend=0)
    rank += np.repeat(start[by] - (ends - count[by]), each)
    orders = [p.order for p in placements]
    at = (orders[0] if len(orders) == 1 else np.concatenate(orders)).take(rank)
    owner = np.repeat(field[by], each)
    if len(placements) > 1:
        by = np.argsort(owner, kind="stable")
        at, value = at[by], value[by]
    result, taken, begin = [], 0, 0
    for p, k in zip(placements, np.bincount(owner, minlength=len(placements)), strict=True):
        n, end = len(p.dense_cluster), begin + int(k)
        part = symbols.dense[taken : taken + n]
        result.append(FieldValues(p.size, p.dense_at, part, at[begin:end], value[begin:end]))
        taken, begin = taken + n, end
    return result


def _cells(
    placements: Sequence[Placement],
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """Field, cluster and number of positions of every cell that has any, field by field."""
    used = [np.flatnonzero(p.counts) for p in placements]
    number = np.arange(len(used), dtype=np.min_scalar_type(len(used)))
    counts = [p.counts[c] for p, c in zip(placements, used, strict=True)]
    return np.repeat(number, [len(c) for c in used]), np.concatenate(used), np.concatenate(counts)
