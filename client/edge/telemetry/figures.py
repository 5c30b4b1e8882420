"""What a device tells about itself: immutable figures with their JSON form, and latencies.

Latencies are counts in buckets whose bounds are fixed, so that they add up. The bounds grow
geometrically, as in DDSketch (Masson, Rim and Lee, VLDB 2019, section 2): bucket ``i`` holds what
lies in ``(γ^(i-1), γ^i]`` microseconds with ``γ = (1 + a) / (1 - a)``, and a quantile is told with
a relative error of at most ``a = 0.05``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = [
    "LAST_BUCKET",
    "SCHEMA",
    "LatencyHistogram",
    "ReleaseFigures",
    "TelemetrySnapshot",
    "bucket_of",
]

SCHEMA = 1
_COUNTS = ("answered", "refused", "failed")
_MOST_TEXT = 200
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


@dataclass(frozen=True)
class ReleaseFigures:
    """Everything counted for one release on one device, since it was first seen there.

    Counts only grow, across restarts too: a later report replaces an earlier one, and reports of
    several devices add up.

    Attributes:
        version: of the release.
        answered: inferences that gave outputs.
        refused: inferences whose inputs did not fit; the caller's mistake.
        failed: inferences that onnxruntime broke off.
        served_seconds: how long it was the active one, while an agent ran.
        self_test: ``passed``, ``failed``, or None when not yet run.
        difference: largest difference in the self-test, in units of the output.
        problem: why the self-test failed.
        buckets: latencies of answered inferences, see `LatencyHistogram`.
    """

    version: int
    answered: int = 0
    refused: int = 0
    failed: int = 0
    served_seconds: float = 0.0
    self_test: str | None = None
    difference: float | None = None
    problem: str | None = None
    buckets: tuple[tuple[int, int], ...] = ()

    def latency(self, share: float) -> float | None:
        """Seconds that `share` of the answered inferences did not exceed; None without any."""
        return LatencyHistogram(self.buckets).quantile(share)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; percentiles stand beside the buckets for who only looks."""
        shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
        found = {f"latency_{name}_seconds": self.latency(q) for name, q in shares.items()}
        return {**asdict(self), "buckets": [list(pair) for pair in self.buckets], **found}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ReleaseFigures:
        """Read what `to_json` made.

        Raises:
            KeyError, TypeError, ValueError: not such a document.
        """
        counts = {name: int(document[name]) for name in ("version", *_COUNTS)}
        served = float(document["served_seconds"])
        buckets = LatencyHistogram((int(b), int(n)) for b, n in document["buckets"]).pairs()
        test, difference, problem = (document[k] for k in ("self_test", "difference", "problem"))
        if min(counts.values()) < 0 or not 0 <= served < float("inf"):
            raise ValueError("a count is negative")
        if test not in (None, "passed", "failed"):
            raise ValueError(f"a self-test cannot be {test!r}")
        return cls(
            **counts,
            served_seconds=served,
            self_test=test,
            difference=None if difference is None else float(difference),
            problem=None if problem is None else str(problem)[:_MOST_TEXT],
            buckets=buckets,
        )


@dataclass(frozen=True)
class TelemetrySnapshot:
    """A device's figures at one moment.

    Attributes:
        at: UTC time, ISO 8601.
        agent: version of the agent.
        active: version of the active release; None when there is none.
        starts: how often an agent has started on this state folder.
        uptime_seconds: since this agent started.
        resident_bytes: resident set of the agent's process; None where it cannot be told.
        releases: the latest releases, ascending.
    """

    at: str
    agent: str
    active: int | None = None
    starts: int = 1
    uptime_seconds: float = 0.0
    resident_bytes: int | None = None
    releases: tuple[ReleaseFigures, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        releases = [release.to_json() for release in self.releases]
        return {"schema": SCHEMA, **asdict(self), "releases": releases}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> TelemetrySnapshot:
        """Read what `to_json` made.

        Raises:
            KeyError, TypeError, ValueError: not such a document.
        """
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']} is not known")
        active, resident = document["active"], document["resident_bytes"]
        return cls(
            str(document["at"])[:_MOST_TEXT],
            str(document["agent"])[:_MOST_TEXT],
            None if active is None else int(active),
            int(document["starts"]),
            float(document["uptime_seconds"]),
            None if resident is None else int(resident),
            tuple(ReleaseFigures.from_json(release) for release in document["releases"]),
        )
