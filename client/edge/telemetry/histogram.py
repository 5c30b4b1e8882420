"""Latencies in a bounded space: counts in buckets whose bounds are fixed, so that they add up.

The bounds grow geometrically, as in DDSketch (Masson, Rim and Lee, VLDB 2019, section 2): bucket
``i`` holds what lies in ``(γ^(i-1), γ^i]`` microseconds with ``γ = (1 + a) / (1 - a)``, and a
quantile is told with a relative error of at most ``a = 0.05``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

__all__ = ["LAST_BUCKET", "LatencyHistogram", "bucket_of"]

_ACCURACY = 0.05
_GROWTH = (1 + _ACCURACY) / (1 - _ACCURACY)
_SCALE = 1 / math.log(_GROWTH)
_UNIT = 1e-6  # seconds; whatever is quicker counts as this
_MOST = 1000.0  # seconds; whatever is slower counts as this
LAST_BUCKET = math.ceil(math.log(_MOST / _UNIT) * _SCALE)


def bucket_of(seconds: float) -> int:
    """Index of the bucket of a latency, from 0 to `LAST_BUCKET`."""
    if seconds <= _UNIT:
        return 0
    return math.ceil(math.log(min(seconds, _MOST) / _UNIT) * _SCALE)


class LatencyHistogram:
    """Counts of latencies by bucket; at most `LAST_BUCKET` + 1 of them.

    Args:
        counts: by bucket, from `pairs`.

    Raises:
        ValueError: a bucket that does not exist, or a count that is not positive.

    >>> h = LatencyHistogram()
    >>> for milliseconds in range(1, 101):
    ...     h.add(milliseconds / 1000)
    >>> abs(h.quantile(0.5) - 0.050) < 0.05 * 0.050
    True
    """

    def __init__(self, counts: Iterable[tuple[int, int]] = ()) -> None:
        self._counts: dict[int, int] = {}
        for bucket, count in counts:
            if not 0 <= bucket <= LAST_BUCKET or count <= 0 or bucket in self._counts:
                raise ValueError(f"no histogram has {count} latencies in bucket {bucket}")
            self._counts[bucket] = count

    @property
    def count(self) -> int:
        """How many latencies were added."""
        return sum(self._counts.values())

    def add(self, seconds: float) -> None:
        """Count one latency."""
        bucket = bucket_of(seconds)
        self._counts[bucket] = self._counts.get(bucket, 0) + 1

    def merge(self, other: LatencyHistogram) -> None:
        """Count what another histogram counted, for instance another device's."""
        for bucket, count in other.counts().items():
            self._counts[bucket] = self._counts.get(bucket, 0) + count

    def counts(self) -> Mapping[int, int]:
        """Counts by bucket, without empty ones."""
        return dict(self._counts)

    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Bucket and count in ascending order: what JSON can carry."""
        return tuple(sorted(self._counts.items()))

    def quantile(self, share: float) -> float | None:
        """Seconds that `share` (0 to 1) of the latencies do not exceed; None without any."""
        rank, seen = share * (self.count - 1), 0
        for bucket, count in self.pairs():
            seen += count
            if seen > rank:
                return _UNIT * 2 * _GROWTH**bucket / (_GROWTH + 1) if bucket else _UNIT
        return None
