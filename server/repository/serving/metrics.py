"""What the server counts, in the text format of Prometheus (version 0.0.4).

Four counters, two gauges and a histogram need no client library; all of them are touched by the
server's event loop alone, so they need no locks either.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0, 300.0)  # seconds
_Samples = Iterable[tuple[str, Mapping[str, str], float]]


class Metrics:
    """Counters of a release server.

    Attributes:
        connections: open now.
    """

    def __init__(self) -> None:
        self.connections = 0
        self._requests: Counter[tuple[str, int]] = Counter()
        self._bytes: Counter[str] = Counter()
        self._interrupted: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._buckets: dict[str, list[int]] = {}
        self._seconds: Counter[str] = Counter()
        self._started = time.time()

    def answered(
        self, kind: str, status: int, sent: int, seconds: float, *, complete: bool
    ) -> None:
        """Count an answer.

        Args:
            kind: of what was asked for.
            status: of the answer.
            sent: bytes of the body that the kernel took.
            seconds: from the end of the request's head to the end of the answer.
            complete: whether the client took all of it.
        """
        self._requests[kind, status] += 1
        self._bytes[kind] += sent
        self._interrupted[kind] += not complete
        buckets = self._buckets.setdefault(kind, [0] * (len(_BOUNDS) + 1))
        buckets[bisect_left(_BOUNDS, seconds)] += 1
        self._seconds[kind] += seconds  # type: ignore[assignment]

    def refused(self, reason: str) -> None:
        """Count what a limit refused: ``connections``, ``requests``, ``bytes``, ``timeout``."""
        self._refused[reason] += 1

    def text(self, *, ready: bool, expires: Mapping[str, float]) -> str:
        """Everything, as Prometheus reads it.

        Args:
            ready: whether the repository is fit to be served.
            expires: by role, when its metadata expires, in seconds since 1970.
        """
        prefix = "prunecast_serve"
        families: list[tuple[str, str, str, _Samples]] = [
            (
                *(f"{prefix}_requests_total", "counter", "Answers by kind of file and status."),
                [("", {"kind": k, "status": str(s)}, n) for (k, s), n in self._requests.items()],
            ),
            (
                *(f"{prefix}_sent_bytes_total", "counter", "Bytes of bodies sent."),
                _by("kind", self._bytes),
            ),
            (
                *(f"{prefix}_interrupted_total", "counter", "Answers that the client did not take"),
                _by("kind", self._interrupted),
            ),
            (
                *(f"{prefix}_refused_total", "counter", "What a limit refused."),
                _by("reason", self._refused),
            ),
            (
                *(f"{prefix}_request_seconds", "histogram", "From the request to the last byte."),
                self._histogram(),
            ),
            (
                *(f"{prefix}_connections", "gauge", "Open connections."),
                [("", {}, self.connections)],
            ),
            (
                *(f"{prefix}_ready", "gauge", "Whether the metadata verify and are in force."),
                [("", {}, int(ready))],
            ),
            (
                *("prunecast_metadata_expires_seconds", "gauge", "When metadata expire, Unix time"),
                _by("role", expires),
            ),
            (
                *("process_cpu_seconds_total", "counter", "User and system CPU time."),
                [("", {}, time.process_time())],
            ),
            (
                *("process_start_time_seconds", "gauge", "When the server began, Unix time."),
                [("", {}, self._started)],
            ),
        ]
        return "".join(map(_family, families))

    def _histogram(self) -> _Samples:
        for kind, counts in self._buckets.items():
            total = 0
            for bound, count in zip((*_BOUNDS, "+Inf"), counts, strict=True):
                total += count
                yield "_bucket", {"kind": kind, "le": str(bound)}, total
            yield "_sum", {"kind": kind}, self._seconds[kind]
            yield "_count", {"kind": kind}, total


def _by(label: str, values: Mapping[str, float]) -> _Samples:
    return [("", {label: key}, value) for key, value in values.items()]


def _family(family: tuple[str, str, str, _Samples]) -> str:
    name, kind, said, samples = family
    lines = [f"# HELP {name} {said}", f"# TYPE {name} {kind}"]
    for suffix, labels, value in samples:
        # kinds, roles and reasons are our own words: nothing to escape
        shown = ",".join(f'{key}="{text}"' for key, text in labels.items())
        lines.append(f"{name}{suffix}{{{shown}}} {value}" if shown else f"{name}{suffix} {value}")
    return "\n".join(lines) + "\n"
