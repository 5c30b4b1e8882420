"""How much a device may ask for, so that it cannot starve the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prunecast.server.control.errors import QuotaExceeded

__all__ = ["Concurrency", "ControlLimits"]


@dataclass(frozen=True)
class ControlLimits:
    """What one device, or all of them, may ask of a control server.

    Attributes:
        request_bytes: of one request.
        streams: calls in progress of all devices together.
        fetches: files that one device gets at the same time.
        fetch_bytes: of the largest file that is handed out.
        reports_per_second: of one device on average.
        report_burst: of one device at once, after it was offline.
        watches_per_second: watches that one device may begin on average.
        watch_burst: watches that it may begin at once.
        keep_alive: seconds after which a watching device hears something at the latest.
        drain: seconds that calls in progress may take when the server ends.
    """

    request_bytes: int = 64 * 1024
    streams: int = 20_000
    fetches: int = 2
    fetch_bytes: int = 64 * 2**20
    reports_per_second: float = 0.2
    report_burst: int = 100
    watches_per_second: float = 0.2
    watch_burst: int = 20
    keep_alive: float = 30.0
    drain: float = 10.0


class Concurrency:
    """Limits what one key does at the same time.

    Args:
        most: at once.
    """

    def __init__(self, most: int) -> None:
        self._most, self._busy = most, Counter[str]()

    @contextmanager
    def entered(self, key: str) -> Iterator[None]:
        """Count one more while the context lasts.

        Raises:
            QuotaExceeded: the key does as much as it may already.
        """
        if self._busy[key] >= self._most:
            raise QuotaExceeded(1.0)
        self._busy[key] += 1
        try:
            yield
        finally:
            self._busy[key] -= 1
            if not self._busy[key]:
                del self._busy[key]
