"""What a device tells about itself: inferences, latencies, self-tests, memory; by release.

Latencies are counts in buckets whose bounds are fixed, so that they add up. The bounds grow
geometrically, as in DDSketch (Masson, Rim and Lee, VLDB 2019, section 2): bucket ``i`` holds what
lies in ``(γ^(i-1), γ^i]`` microseconds with ``γ = (1 + a) / (1 - a)``, and a quantile is told with
a relative error of at most ``a = 0.05``.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from prunecast.client.edge.config import AGENT_VERSION
from prunecast.client.edge.errors import StateError, disk
from prunecast.common.documents import from_document, read_document
from prunecast.common.files import write_atomically

__all__ = [
    "LAST_BUCKET",
    "InferenceOutcome",
    "LatencyHistogram",
    "ReleaseFigures",
    "Telemetry",
    "TelemetrySnapshot",
    "read_telemetry",
]

InferenceOutcome = Literal["answered", "refused", "failed"]
_FILE = "telemetry.json"
_REMEMBERED = 8  # releases
_MOST_BYTES = 1 << 20
_ACCURACY = 0.05
_GROWTH = (1 + _ACCURACY) / (1 - _ACCURACY)
_SCALE = 1 / math.log(_GROWTH)
_UNIT = 1e-6  # seconds; whatever is quicker counts as this
_MOST = 1000.0  # seconds; whatever is slower counts as this
LAST_BUCKET = math.ceil(math.log(_MOST / _UNIT) * _SCALE)


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
        inside = min(max(seconds, _UNIT), _MOST)
        bucket = math.ceil(math.log(inside / _UNIT) * _SCALE)
        self._counts[bucket] = self._counts.get(bucket, 0) + 1

    def merge(self, other: LatencyHistogram) -> None:
        """Count what another histogram counted, for instance another device's."""
        for bucket, count in other.pairs():
            self._counts[bucket] = self._counts.get(bucket, 0) + count

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
        settings: of onnxruntime's session, see `InferenceSession.settings`.
        buckets: latencies of answered inferences, see `LatencyHistogram`.

    Raises:
        ValueError: a count is negative, or no histogram has such buckets.
    """

    version: int
    answered: int = 0
    refused: int = 0
    failed: int = 0
    served_seconds: float = 0.0
    self_test: Literal["passed", "failed"] | None = None
    difference: float | None = None
    problem: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    buckets: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        counts = (self.version, self.answered, self.refused, self.failed)
        if min(counts) < 0 or not 0 <= self.served_seconds < math.inf:
            raise ValueError("a count is negative")
        LatencyHistogram(self.buckets)

    def latency(self, share: float) -> float | None:
        """Seconds that `share` of the answered inferences did not exceed; None without any."""
        return LatencyHistogram(self.buckets).quantile(share)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; percentiles stand beside the buckets for who only looks."""
        shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
        found = {f"latency_{name}_seconds": self.latency(q) for name, q in shares.items()}
        return {**asdict(self), "buckets": [list(pair) for pair in self.buckets], **found}


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
        schema: of the JSON form.
    """

    at: str
    agent: str
    active: int | None = None
    starts: int = 1
    uptime_seconds: float = 0.0
    resident_bytes: int | None = None
    releases: tuple[ReleaseFigures, ...] = ()
    schema: Literal[1] = 1

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        releases = [release.to_json() for release in self.releases]
        return {**asdict(self), "releases": releases}


class Telemetry:
    """Counts inferences, latencies and self-tests by release; safe from several threads.

    Nothing is written while counting: `save` and `saving` decide when, so that a busy device does
    not wear out its flash. What was counted since the last save is lost with the power.

    Args:
        state: the agent's state folder; earlier counts in it are continued.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        state: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._clock = Path(state) / _FILE, clock
        self._lock, self._saving = threading.Lock(), threading.Lock()
        earlier = read_telemetry(state)
        self._starts = earlier.starts + 1 if earlier else 1
        known = earlier.releases if earlier else ()
        self._releases = {one.version: replace(one, buckets=()) for one in known}
        self._latencies = {one.version: LatencyHistogram(one.buckets) for one in known}
        self._active: int | None = None
        self._started = self._since = clock()
        self._saved: tuple[ReleaseFigures, ...] | None = None

    def observe(self, version: int, outcome: InferenceOutcome, seconds: float) -> None:
        """Count an inference, see `Observer`."""
        with self._lock:
            count = getattr(self._release(version), outcome) + 1
            self._change(version, **{outcome: count})
            if outcome == "answered":
                self._latencies[version].add(seconds)

    def activated(
        self, version: int, difference: float, settings: Mapping[str, str] | None = None
    ) -> None:
        """A release passed its self-test and is served from now on."""
        with self._lock:
            self._count_time()
            self._active = version
            self._change(
                version,
                self_test="passed",
                difference=difference,
                problem=None,
                settings=dict(settings or {}),
            )

    def rejected(self, version: int, problem: str) -> None:
        """A release did not pass its self-test."""
        with self._lock:
            self._change(version, self_test="failed", difference=None, problem=problem[:200])

    def snapshot(self) -> TelemetrySnapshot:
        """All figures at this moment."""
        with self._lock:
            self._count_time()
            return TelemetrySnapshot(
                datetime.now(UTC).isoformat(timespec="seconds"),
                AGENT_VERSION,
                self._active,
                self._starts,
                round(self._clock() - self._started, 3),
                _resident_bytes(),
                tuple(
                    replace(self._releases[v], buckets=self._latencies[v].pairs())
                    for v in sorted(self._releases)
                ),
            )

    def save(self) -> None:
        """Write the figures, durably; nothing when they have not changed.

        Raises:
            StateError: the file system refuses.
        """
        with self._saving:
            found = self.snapshot()
            # the passing of time alone is not worth a write
            changed = tuple(replace(r, served_seconds=0.0) for r in found.releases)
            if changed == self._saved:
                return
            data = json.dumps(found.to_json(), separators=(",", ":")).encode()
            with disk(f"write {self._path}"):
                write_atomically(self._path, data)
            self._saved = changed

    @contextmanager
    def saving(self, every: float) -> Iterator[None]:
        """Save every so many seconds while the block runs, and when it ends.

        A disk that refuses is tried again the next time: figures are not worth an interruption.
        """
        over = threading.Event()

        def repeat() -> None:
            while not over.wait(every):
                with suppress(StateError):
                    self.save()

        thread = threading.Thread(target=repeat, name="telemetry", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            with suppress(StateError):
                self.save()

    def _release(self, version: int) -> ReleaseFigures:
        if version not in self._releases:
            self._releases[version] = ReleaseFigures(version)
            self._latencies[version] = LatencyHistogram()
            others = sorted(v for v in self._releases if v not in (self._active, version))
            for old in others[: max(0, len(self._releases) - _REMEMBERED)]:
                del self._releases[old], self._latencies[old]
        return self._releases[version]

    def _change(self, version: int, **figures: Any) -> None:
        self._releases[version] = replace(self._release(version), **figures)

    def _count_time(self) -> None:
        now = self._clock()
        if self._active is not None:
            served = self._release(self._active).served_seconds + now - self._since
            self._change(self._active, served_seconds=round(served, 3))
        self._since = now


def read_telemetry(state: Path) -> TelemetrySnapshot | None:
    """The figures that were last saved in a state folder; None when there are none to read."""
    try:
        document = read_document(Path(state) / _FILE, most_bytes=_MOST_BYTES)
        return from_document(TelemetrySnapshot, document)
    except (OSError, ValueError):
        return None  # figures only inform: unreadable ones are begun anew


def _resident_bytes() -> int | None:
    """Resident set of this process in bytes; None where ``/proc`` does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
