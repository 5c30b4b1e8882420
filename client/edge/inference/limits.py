"""What requests to the endpoint may cost, all of them together, and how they are refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prunecast.client.edge.errors import EdgeError

__all__ = ["Budget", "EndpointError", "EndpointLimits", "RequestRefused"]


class EndpointError(EdgeError):
    """The endpoint cannot be served at the address that was asked for."""


class RequestRefused(EdgeError):
    """One request cannot be answered.

    Args:
        status: of HTTP.
        message: what is wrong with the request and what would be right.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class EndpointLimits:
    """Bounds of the endpoint.

    Attributes:
        body_bytes: of one request.
        json_bytes: of the JSON in it; parsed, JSON takes up to twenty times its size, so only one
            large document is parsed at a time.
        total_bytes: of all bodies that are in memory at a time.
        output_bytes: of all outputs of one inference; where the model's signature tells what
            an input leads to, it does not even run.
        connections: open at a time; one more is answered 503 and closed.
        running: inferences at a time; others wait.
        waiting_seconds: how long a request waits for memory or for its turn before it is
            answered 503.
        request_seconds: from the first byte of a request to its last, and for the answer.
        idle_seconds: how long a connection may stay open between requests.
        closing_seconds: how long requests in progress may take when the endpoint ends.
    """

    body_bytes: int = 16 * 2**20
    json_bytes: int = 4 * 2**20
    total_bytes: int = 64 * 2**20
    output_bytes: int = 64 * 2**20
    connections: int = 32
    running: int = 4
    waiting_seconds: float = 5.0
    request_seconds: float = 30.0
    idle_seconds: float = 60.0
    closing_seconds: float = 10.0


class Budget:
    """A number of units that requests share: bytes of memory, or turns.

    Args:
        units: how many there are.
        what: the name of the units in errors.
    """

    def __init__(self, units: int, what: str) -> None:
        self._units, self._free, self._what = units, units, what
        self._changed = threading.Condition()

    @contextmanager
    def take(self, units: int, seconds: float) -> Iterator[None]:
        """Hold so many units while the block runs; wait for them at most `seconds`.

        Raises:
            RequestRefused: 503, they did not become free.
        """
        units = min(units, self._units)
        with self._changed:
            if not self._changed.wait_for(lambda: self._free >= units, timeout=seconds):
                raise RequestRefused(503, f"busy: no {self._what} became free, try again")
            self._free -= units
        try:
            yield
        finally:
            with self._changed:
                self._free += units
                self._changed.notify_all()
