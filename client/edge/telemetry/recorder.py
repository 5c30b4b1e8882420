"""Counts what happens on a device and keeps it through restarts."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from prunecast.client.edge.config import AGENT_VERSION
from prunecast.client.edge.errors import StateError
from prunecast.client.edge.model import InferenceOutcome
from prunecast.client.edge.telemetry.figures import (
    LatencyHistogram,
    ReleaseFigures,
    TelemetrySnapshot,
)
from prunecast.common.files import StorageError, write_atomically

__all__ = ["Telemetry", "read_telemetry", "resident_bytes"]

_FILE = "telemetry.json"
_REMEMBERED = 8  # releases
_MOST_BYTES = 1 << 20
_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError),
    *(OverflowError, RecursionError),
)


@dataclass
class _Release:
    figures: ReleaseFigures
    latency: LatencyHistogram

    def frozen(self) -> ReleaseFigures:
        return replace(self.figures, buckets=self.latency.pairs())


class Telemetry:
    """Counts inferences, latencies and self-tests by release; safe from several threads.

    Nothing is written while counting: `save` and `saving` decide when, so that a busy device does
    not wear out its flash. What was counted since the last save is lost with the power.

    Args:
        state: the agent's state folder; earlier counts in it are continued.
        clock: seconds that never go back.
        now: UTC time.
    """

    def __init__(
        self,
        state: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._path, self._clock, self._now = Path(state) / _FILE, clock, now
        self._lock, self._saving = threading.Lock(), threading.Lock()
        earlier = read_telemetry(state)
        self._starts = earlier.starts + 1 if earlier else 1
        self._releases = {
            figures.version: _Release(figures, LatencyHistogram(figures.buckets))
            for figures in (earlier.releases if earlier else ())
        }
        self._active: int | None = None
        self._started = self._since = clock()
        self._saved: tuple[ReleaseFigures, ...] | None = None

    def observe(self, version: int, outcome: InferenceOutcome, seconds: float) -> None:
        """Count an inference, see `Observer`."""
        with self._lock:
            release = self._release(version)
            count = getattr(release.figures, outcome) + 1
            release.figures = replace(release.figures, **{outcome: count})
            if outcome == "answered":
                release.latency.add(seconds)

    def activated(self, version: int, difference: float) -> None:
        """A release passed its self-test and is served from now on."""
        with self._lock:
            self._count_time()
            self._active = version
            release = self._release(version)
            release.figures = replace(
                release.figures, self_test="passed", difference=difference, problem=None
            )

    def rejected(self, version: int, problem: str) -> None:
        """A release did not pass its self-test."""
        with self._lock:
            release = self._release(version)
            release.figures = replace(
                release.figures, self_test="failed", difference=None, problem=problem[:200]
            )

    def snapshot(self) -> TelemetrySnapshot:
        """All figures at this moment."""
        with self._lock:
            self._count_time()
            return TelemetrySnapshot(
                self._now().isoformat(timespec="seconds"),
                AGENT_VERSION,
                self._active,
                self._starts,
                round(self._clock() - self._started, 3),
                resident_bytes(),
                tuple(self._releases[v].frozen() for v in sorted(self._releases)),
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
            try:
                write_atomically(self._path, data)
            except StorageError as error:
                raise StateError(str(error)) from error
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

    def _release(self, version: int) -> _Release:
        found = self._releases.get(version)
        if found is None:
            found = self._releases[version] = _Release(ReleaseFigures(version), LatencyHistogram())
            for old in sorted(v for v in self._releases if v not in (self._active, version)):
                if len(self._releases) <= _REMEMBERED:
                    break
                del self._releases[old]
        return found

    def _count_time(self) -> None:
        now = self._clock()
        if self._active is not None:
            release = self._release(self._active)
            served = round(release.figures.served_seconds + now - self._since, 3)
            release.figures = replace(release.figures, served_seconds=served)
        self._since = now


def read_telemetry(state: Path) -> TelemetrySnapshot | None:
    """The figures that were last saved in a state folder; None when there are none to read."""
    path = Path(state) / _FILE
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        return TelemetrySnapshot.from_json(json.loads(path.read_bytes()))
    except _UNREADABLE:
        return None  # figures only inform: unreadable ones are begun anew


def resident_bytes() -> int | None:
    """Resident set of this process in bytes; None where ``/proc`` does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
