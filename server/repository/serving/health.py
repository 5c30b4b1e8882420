"""Whether a repository is fit to be served: its metadata verify and are in force."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from prunecast.server.repository.checks.metadata import Finding, check_metadata
from prunecast.server.repository.errors import RepositoryError
from prunecast.server.repository.reading import RepositoryReader

__all__ = ["Health", "HealthCheck", "check_health"]

_KEPT = 5.0  # seconds: probes may come often, and signatures cost milliseconds


@dataclass(frozen=True)
class Health:
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
        document = {
            "status": "ready" if self.ready else "not ready",
            "problems": [_shown(finding) for finding in self.problems],
            "warnings": [_shown(finding) for finding in self.warnings],
            "expires": {role: at.isoformat() for role, at in self.expires.items()},
        }
        return json.dumps(document, indent=1).encode() + b"\n"


def _shown(finding: Finding) -> dict[str, str]:
    return {key: value for key, value in asdict(finding).items() if key != "severity"}


def check_health(root: Path, now: datetime) -> Health:
    """Verify the metadata in force, from root to targets."""
    try:
        _, found = check_metadata(root / "metadata", now)
        problems = [f for f in found if f.severity == "problem"]
        expires = (
            {} if any(f.code != "expired" for f in problems if not _soon(f)) else _expires(root)
        )
    except (OSError, RepositoryError) as error:
        broken = Finding("problem", "metadata-unreadable", "metadata", str(error), "see the doctor")
        return Health((broken,))
    fatal = tuple(f for f in problems if not _soon(f))
    return Health(fatal, tuple(f for f in problems if _soon(f)), expires)


def _soon(finding: Finding) -> bool:
    return finding.code == "expires-soon"


def _expires(root: Path) -> dict[str, datetime]:
    return RepositoryReader(root).expires()


class HealthCheck:
    """The health of a repository, looked at when somebody asks and it is not known of late.

    Args:
        root: the repository.
        now: the clock, for tests.
    """

    def __init__(
        self, root: Path, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._root, self._now = root, now
        self._last: tuple[float, Health] | None = None
        self._lock = asyncio.Lock()

    async def get(self) -> Health:
        """The health, at most five seconds old."""
        async with self._lock:
            if self._last is None or time.monotonic() - self._last[0] > _KEPT:
                health = await asyncio.to_thread(check_health, self._root, self._now())
                self._last = (time.monotonic(), health)
            return self._last[1]
