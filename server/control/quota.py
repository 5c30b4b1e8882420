"""How much a device may ask for, so that it cannot starve the others."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prunecast.server.control.errors import QuotaExceeded

__all__ = ["Acquainted", "Concurrency", "ControlLimits"]


@dataclass(frozen=True)
class ControlLimits:
    """What one device, or all of them, may ask of a control server.

    Attributes:
        request_bytes: of one request.
        connections: at the same time; None: as many as the system has descriptors for.
        connections_per_client: of them, those of one address that have not yet proved whose they
            are; None: half of all.
        patience: seconds for which such a one keeps its place while others want it.
        handshake: seconds until a connection has begun its handshake, and then to end it.
        unused: seconds that a connection may stay open without a call.
        streams: calls in progress of all devices together.
        health_watches: streams of the health service, which needs no credential.
        health_watches_per_client: of them, of one address.
        refusals_per_second: unknown credentials of one address that are looked up on average.
        refusal_burst: that are looked up at once.
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
    connections: int | None = None
    connections_per_client: int | None = None
    patience: float = 1.0
    handshake: float = 10.0
    unused: float = 300.0
    streams: int = 20_000
    health_watches: int = 512
    health_watches_per_client: int = 64
    refusals_per_second: float = 1.0
    refusal_burst: int = 50
    fetches: int = 2
    fetch_bytes: int = 64 * 2**20
    reports_per_second: float = 0.2
    report_burst: int = 100
    watches_per_second: float = 0.2
    watch_burst: int = 20
    keep_alive: float = 30.0
    drain: float = 10.0


class Acquainted:
    """The keys that were added last.

    Args:
        most: that are remembered.
    """

    def __init__(self, most: int) -> None:
        self._most, self._keys = most, OrderedDict[str, None]()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(self, key: str) -> None:
        """Remember a key; the one that was added least recently may be forgotten."""
        self._keys[key] = None
        self._keys.move_to_end(key)
        if len(self._keys) > self._most:
            self._keys.popitem(last=False)

    def discard(self, key: str) -> None:
        """Forget a key, if it is there."""
        self._keys.pop(key, None)


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
