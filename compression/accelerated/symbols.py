"""A segment's values as symbols (:mod:`prunecast.compression.codec.entropy.symbols`, in torch).

The positions of all fields of a segment follow each other here as one array, so that one stable
sort brings them into the order of the format: by cluster, then fields, then positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from prunecast.compression.codec.errors import MalformedPayload

from .arrays import download, upload

__all__ = ["Placement", "Symbols", "collect", "distribute", "repeated"]


@dataclass(frozen=True)
class Placement:
    """Where a segment's positions go."""

    size: int
    dense_at: torch.Tensor | None
    """Positions of dense clusters in order; None: all of them."""
    dense_cluster: torch.Tensor
    order: torch.Tensor
    """Positions of sparse clusters, by cluster, then in order."""
    counts: NDArray[np.int64]
    """Positions of each cluster, [clusters]; zero for dense ones."""

    @classmethod
    def of(cls, clusters: torch.Tensor, sparse: NDArray[np.bool_]) -> Placement:
        """Place positions by their clusters, uint8; ``sparse[cluster]`` says which are sparse."""
        counts = np.zeros(len(sparse), np.int64)
        none = torch.zeros(0, dtype=torch.int64, device=clusters.device)
        if not sparse.any():
            return cls(len(clusters), None, clusters, none, counts)
        # All dense positions go to one last bucket: they stay in order there.
        last = int(sparse.sum())
        bucket = np.full(len(sparse), last, np.uint8)
        bucket[sparse] = np.arange(last)
        buckets = upload(bucket, clusters.device).index_select(0, clusters.to(torch.int32))
        sizes = download(torch.bincount(buckets, minlength=last + 1))
        counts[sparse] = sizes[:last]
        total = len(clusters) - int(sizes[last])
        if not total:
            return cls(len(clusters), None, clusters, none, counts)
        order = torch.sort(buckets, stable=True).indices
        dense_at = order[total:]
        cluster = clusters.index_select(0, dense_at)
        return cls(len(clusters), dense_at, cluster, order[:total], counts)


@dataclass(frozen=True)
class Symbols:
    """What a segment codes; see the codec's class of that name."""

    dense: torch.Tensor
    counts: NDArray[np.int64]
    gaps: torch.Tensor
    values: torch.Tensor


def repeated(
    values: NDArray[np.int64], counts: NDArray[np.int64], like: torch.Tensor
) -> torch.Tensor:
    """Return each value so many times, on the device of ``like``."""
    total = int(counts.sum())
    return torch.repeat_interleave(
        upload(values, like.device), upload(counts, like.device), output_size=total
    )


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.cumsum(counts) - counts


def collect(placement: Placement, z: torch.Tensor) -> Symbols:
    """Symbols of a segment from its values."""
    dense = z if placement.dense_at is None else z.index_select(0, placement.dense_at)
    ordered = z.index_select(0, placement.order)
    at = ordered.nonzero().reshape(-1)
    ends = upload(np.cumsum(placement.counts), z.device)
    counts = np.diff(download(torch.searchsorted(at, ends)), prepend=0)
    # Less where its cluster starts, and less the non-zero before, if that is of the same cluster.
    gaps = at - repeated(_starts(placement.counts), counts, z)
    first = upload(_starts(counts)[counts > 0], z.device)
    begin = gaps.index_select(0, first)
    gaps = torch.diff(gaps, prepend=gaps[:1]) - 1
    gaps.index_copy_(0, first, begin)
    return Symbols(dense, counts, gaps, ordered.index_select(0, at) - 1)


def distribute(placement: Placement, symbols: Symbols, bits: int) -> torch.Tensor:
    """Inverse of :func:`collect`, for values of 32 or 64 bits.

    Raises:
        MalformedPayload: gaps leave their cluster, or a value wraps.
    """
    if placement.dense_at is None:
        out = symbols.dense
    else:
        out = torch.zeros(placement.size, dtype=torch.int64, device=symbols.dense.device)
        out.index_copy_(0, placement.dense_at, symbols.dense)
    used = np.flatnonzero(symbols.counts)
    if not len(used):
        return out
    counts = symbols.counts[used]
    first = _starts(counts)
    # Ranks within a cluster: running sum of gap + 1, restarted where a cluster starts.
    rank = torch.cumsum(symbols.gaps + 1, 0)
    at = upload(first, rank.device)
    offset = rank.index_select(0, at) - symbols.gaps.index_select(0, at)
    last = rank.index_select(0, upload(first + counts - 1, rank.device)) - offset
    over = last >= upload(placement.counts[used], rank.device)
    value = symbols.values + 1
    wrong = (value >> 32 if bits == 32 else value == 0).any()
    if bool(over.any() | wrong):
        raise MalformedPayload("a gap leads past the end of its cluster, or a value is too large")
    shift = upload(_starts(placement.counts)[used], rank.device) - offset
    total = int(counts.sum())
    rank += torch.repeat_interleave(shift, upload(counts, rank.device), output_size=total)
    return out.index_copy_(0, placement.order.index_select(0, rank), value)
