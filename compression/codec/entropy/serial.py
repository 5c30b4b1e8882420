"""Symbols of small payloads, in the adaptive section: nothing to set up, learns as it goes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import LimitExceeded, MalformedPayload
from .adaptive import UINT_CONTEXTS, AdaptiveDecoder, AdaptiveEncoder
from .symbols import Symbols

__all__ = ["SerialModels", "read_serial", "write_serial"]


class SerialModels:
    """Contexts of every cluster, kept over the phases of a payload."""

    def __init__(self, coder: AdaptiveEncoder | AdaptiveDecoder, clusters: int) -> None:
        self.dense = [coder.contexts(UINT_CONTEXTS) for _ in range(clusters)]
        self.gap = [coder.contexts(UINT_CONTEXTS) for _ in range(clusters)]
        self.value = [coder.contexts(UINT_CONTEXTS) for _ in range(clusters)]
        self.count = coder.contexts(UINT_CONTEXTS)


def write_serial(
    coder: AdaptiveEncoder,
    m: SerialModels,
    symbols: Symbols,
    dense_cluster: NDArray[np.uint8],
    sparse: NDArray[np.bool_],
) -> None:
    """Write one segment's symbols."""
    for c, z in zip(dense_cluster.tolist(), symbols.dense.tolist(), strict=True):
        coder.uint(m.dense[c], z)
    gaps, values, at = symbols.gaps.tolist(), symbols.values.tolist(), 0
    for c in np.flatnonzero(sparse).tolist():
        k = int(symbols.counts[c])
        coder.uint(m.count, k)
        for gap, value in zip(gaps[at : at + k], values[at : at + k], strict=True):
            coder.uint(m.gap[c], gap)
            coder.uint(m.value[c], value)
        at += k


def read_serial(
    coder: AdaptiveDecoder,
    m: SerialModels,
    dense_cluster: NDArray[np.uint8],
    sparse: NDArray[np.bool_],
    sizes: NDArray[np.int64],
    bits: int,
    most: int,
) -> Symbols:
    """Read what :func:`write_serial` wrote; ``sizes`` holds each cluster's positions.

    LimitExceeded beyond ``most`` symbols (a sparse value counts as two).
    """
    left_over = most - len(dense_cluster)
    if left_over < 0:
        raise _too_many(most)
    dtype: Any = np.uint32 if bits == 32 else np.uint64
    uint = coder.uint
    dense = [uint(m.dense[c]) for c in dense_cluster.tolist()]
    counts = np.zeros(len(sparse), np.int64)
    gaps: list[int] = []
    values: list[int] = []
    for c in np.flatnonzero(sparse).tolist():
        k = uint(m.count)
        if k > int(sizes[c]):
            raise MalformedPayload("a cluster has more non-zeros than positions")
        left_over -= 2 * k
        if left_over < 0:
            raise _too_many(most)
        counts[c] = k
        gap, value = m.gap[c], m.value[c]
        left = int(sizes[c])
        for _ in range(k):
            g = uint(gap)
            left -= g + 1
            if left < 0:
                raise MalformedPayload("a gap leads past the end of its cluster")
            gaps.append(g)
            values.append(uint(value))
    if max(max(dense, default=0), max(values, default=0)) >> bits:
        raise MalformedPayload(f"a value exceeds {bits} bits")
    return Symbols(
        np.array(dense, dtype), counts, np.array(gaps, np.int64), np.array(values, dtype)
    )


def _too_many(most: int) -> LimitExceeded:
    return LimitExceeded(
        f"the payload codes more than {most} symbols one at a time, above Limits.serial_symbols; "
        "raise that limit if you trust the sender"
    )
