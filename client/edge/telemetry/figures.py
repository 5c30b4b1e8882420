"""What a device tells about itself: immutable figures, and their JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from prunecast.client.edge.telemetry.histogram import LatencyHistogram

__all__ = ["SCHEMA", "ReleaseFigures", "TelemetrySnapshot"]

SCHEMA = 1
_COUNTS = ("answered", "refused", "failed")
_MOST_TEXT = 200


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
