"""What an operator watches: counts for Prometheus, and whether the repository is fit to serve."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from prunecast.compression.release.manifest import MAX_MANIFEST_BYTES
from prunecast.server.repository.checks.metadata import Finding, check_metadata
from prunecast.server.repository.errors import RepositoryError
from prunecast.server.repository.reading import RepositoryReader
from prunecast.server.repository.serving.files import family

__all__ = ["BlobKinds", "HealthCheck", "Metrics", "RepositoryHealth", "check_health"]

_BOUNDS = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0, 300.0)  # seconds
_WORDS = {"keyframe": "keyframe", "patches": "patch", "files": "file"}
_PAUSE = 10.0  # seconds between two looks at all manifests
_KEPT = 5.0  # seconds: probes may come often, and signatures cost milliseconds


class Metrics:
    """Counters of a release server, in a registry of their own.

    Attributes:
        connections: open now.
    """

    def __init__(self) -> None:
        self.connections = 0
        self._registry = CollectorRegistry()

        def made(kind: Any, name: str, said: str, *labels: str, **more: Any) -> Any:
            return kind(name, said, labels, registry=self._registry, **more)

        serve = "prunecast_serve"
        answers = "Answers by kind of file and status."
        self._requests = made(Counter, f"{serve}_requests", answers, "kind", "status")
        self._bytes = made(Counter, f"{serve}_sent_bytes", "Bytes of bodies sent.", "kind")
        untaken = "Answers that the client did not take."
        self._interrupted = made(Counter, f"{serve}_interrupted", untaken, "kind")
        self._refused = made(Counter, f"{serve}_refused", "What a limit refused.", "reason")
        took, name = "From the request to the last byte.", f"{serve}_request_seconds"
        self._seconds = made(Histogram, name, took, "kind", buckets=_BOUNDS)
        made(Gauge, f"{serve}_connections", "Open connections.").set_function(
            lambda: self.connections
        )
        fit = "Whether the metadata verify and are in force."
        self._ready = made(Gauge, f"{serve}_ready", fit)
        when = "When metadata expire, Unix time."
        self._expires = made(Gauge, "prunecast_metadata_expires_seconds", when, "role")
        ProcessCollector(registry=self._registry)

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
        self._requests.labels(kind, status).inc()
        self._bytes.labels(kind).inc(sent)
        self._interrupted.labels(kind).inc(not complete)
        self._seconds.labels(kind).observe(seconds)

    def refused(self, reason: str) -> None:
        """Count what a limit refused: ``connections``, ``requests``, ``bytes``, ``timeout``."""
        self._refused.labels(reason).inc()

    def text(self, *, ready: bool, expires: Mapping[str, float]) -> bytes:
        """Everything, as Prometheus reads it.

        Args:
            ready: whether the repository is fit to be served.
            expires: by role, when its metadata expires, in seconds since 1970.
        """
        self._ready.set(ready)
        self._expires.clear()
        for role, at in expires.items():
            self._expires.labels(role).set(at)
        return generate_latest(self._registry)


class BlobKinds:
    """What a repository's blobs are for: only its manifests tell, for a blob's name is a digest.

    For counting alone: signatures are not checked.
    """

    def __init__(self, root: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._root, self._clock = root, clock
        self._kinds: dict[str, str] = {}
        self._seen: set[str] = set()
        self._due = 0.0

    def of(self, sha256: str) -> str:
        """``patch``, ``keyframe``, ``file``, or ``blob`` where no manifest is known to name it."""
        return self._kinds.get(sha256, "blob")

    @property
    def stale(self) -> bool:
        """Whether it is time to look at all manifests again."""
        return self._clock() >= self._due

    def look(self) -> None:
        """Read every manifest that was not read yet."""
        self._due = self._clock() + _PAUSE
        for path in self._root.glob("targets/*/*/*.release.json"):
            self.read(path.relative_to(self._root).as_posix())
        self._due = self._clock() + _PAUSE

    def read(self, name: str) -> None:
        """Read one manifest, unless that was done."""
        if name in self._seen or family(name) != "manifest":
            return
        try:
            with open(self._root / name, "rb") as file:
                document = json.loads(file.read(MAX_MANIFEST_BYTES))
            found = _digests(document, None)
        except (OSError, ValueError, RecursionError):
            return  # a device will complain about it; it does not matter to the counts
        self._seen.add(name)
        self._kinds.update(found)


def _digests(value: Any, kind: str | None) -> dict[str, str]:
    """Digests in a manifest by the field they stand below, however deep."""
    found: dict[str, str] = {}
    if isinstance(value, list):
        for inner in value:
            found |= _digests(inner, kind)
    elif isinstance(value, dict):
        digest = value.get("sha256")
        if kind is not None and isinstance(digest, str):
            found[digest] = kind
        for key, inner in value.items():
            found |= _digests(inner, _WORDS.get(key, kind))
    return found


@dataclass(frozen=True)
class RepositoryHealth:
    """The state of a repository.

    Attributes:
        problems: why devices would refuse its metadata; empty when it is fit.
        warnings: what must be done before long.
        expires: by role, when its metadata expire.
    """

    problems: tuple[Finding, ...] = ()
    warnings: tuple[Finding, ...] = ()
    expires: dict[str, datetime] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Whether devices can use the repository."""
        return not self.problems

    def json(self) -> bytes:
        """What `/healthz` says."""

        def shown(found: tuple[Finding, ...]) -> list[dict[str, str]]:
            return [{k: v for k, v in asdict(one).items() if k != "severity"} for one in found]

        document = {
            "status": "ready" if self.ready else "not ready",
            "problems": shown(self.problems),
            "warnings": shown(self.warnings),
            "expires": {role: at.isoformat() for role, at in self.expires.items()},
        }
        return json.dumps(document, indent=1).encode() + b"\n"


def check_health(root: Path, now: datetime) -> RepositoryHealth:
    """Verify the metadata in force, from root to targets."""
    try:
        _, found = check_metadata(root / "metadata", now)
        found = [one for one in found if one.severity == "problem"]
        soon = tuple(one for one in found if one.code == "expires-soon")
        fatal = tuple(one for one in found if one.code != "expires-soon")
        readable = all(one.code == "expired" for one in fatal)
        return RepositoryHealth(fatal, soon, RepositoryReader(root).expires() if readable else {})
    except (OSError, RepositoryError) as error:
        broken = Finding("problem", "metadata-unreadable", "metadata", str(error), "see the doctor")
        return RepositoryHealth((broken,))


class HealthCheck:
    """The health of a repository, looked at when somebody asks and it is not known of late."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._last: tuple[float, RepositoryHealth] | None = None
        self._lock = asyncio.Lock()

    async def get(self) -> RepositoryHealth:
        """The health, at most five seconds old."""
        async with self._lock:
            if self._last is None or time.monotonic() - self._last[0] > _KEPT:
                health = await asyncio.to_thread(check_health, self._root, datetime.now(UTC))
                self._last = (time.monotonic(), health)
            return self._last[1]
