"""What a message takes on the wire between a SuperLink and a SuperNode: estimated, not measured.

A SuperNode opens every connection. It asks for a message, fetches each of its objects by a request
and confirms it; it announces its reply and uploads each object. So a message costs bytes in both
directions, whichever way it goes. The constants are those of Flower 1.42, counted by a relay
(`benchmarks/wire.py`); docs/payloads.md has the table, and a test on the real engine holds it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from flwr.serverapp import Grid

from prunecast.compression.flower.internals import on_superlink
from prunecast.server.federation.wrapper import GridWrapper

__all__ = ["Direction", "Pauses", "Wire", "wire_cost"]

Direction = Literal["down", "up"]


@dataclass(frozen=True)
class Wire:
    """What comes on top of a message's own bytes.

    Attributes:
        requests: of HTTP, all from the node.
        http_up, http_down: bytes of HTTP and of Flower's lists, from and to the node.
        tls_up, tls_down: bytes that TLS adds to those.
    """

    requests: int
    http_up: int
    http_down: int
    tls_up: int
    tls_down: int


@dataclass(frozen=True)
class _Cost:
    """Requests, and bytes (from the node, to the node): of a message, and of each object in it."""

    requests: int
    message: tuple[int, int]
    an_object: tuple[int, int]


# down: pull-messages and confirm-message-received, then a pull-object for each; up: push-messages,
# then a push-object for each. Ids in Flower's lists of objects are some 67 bytes each.
_COSTS: dict[Direction, _Cost] = {
    "down": _Cost(2, message=(1800, 390), an_object=(933, 207)),
    "up": _Cost(1, message=(1067, 242), an_object=(1044, 196)),
}
# TLS 1.3 (RFC 8446, section 5.2): a record's header, content type and tag, for 16 KiB at most;
# header and body of a request, and of a response, are records of their own.
_RECORD, _RECORD_BYTES = 22, 1 << 14
_RECORDS = 2
# Opening a connection, with one EC certificate of 336 bytes; a longer chain adds what it is longer.
_HANDSHAKE = 597, 1216
_LIFE = 5.0  # seconds after which httpx and uvicorn close a connection that nobody uses
_POLL = 3.0  # seconds between the questions of a SuperNode that waits
_WORKERS = 2  # connections of a SuperNode that fetches, or uploads, objects
_SIGN = 30.0  # seconds between its signs of life, each of which keeps a connection open


def wire_cost(direction: Direction, objects: int, size: int, seconds: float = 0.0) -> Wire:
    """What a message adds on the wire.

    Args:
        direction: in which it goes.
        objects: of Flower's that it consists of.
        size: of these together, in bytes.
        seconds: since the last message between the two, 0.0 where that is not known: then node
            and server are taken to be busy for longer than an idle connection lives.
    """
    cost = _COSTS[direction]
    requests = cost.requests + objects
    http_up, http_down = (
        message + an_object * objects
        for message, an_object in zip(cost.message, cost.an_object, strict=True)
    )
    opened = _opened(direction, seconds)
    records = round(size / _RECORD_BYTES * _RECORD)
    tls_up, tls_down = (requests * _RECORDS * _RECORD + round(opened * part) for part in _HANDSHAKE)
    if direction == "up":
        tls_up += records
    else:
        tls_down += records
    return Wire(requests, http_up, http_down, tls_up, tls_down)


def _opened(direction: Direction, seconds: float) -> float:
    """How many connections a message is expected to open."""
    if direction == "down":
        # the first connection lives by the node's questions; the other is needed at the question
        # after these seconds, which is the third or later where they are more than one pause
        return float(seconds == 0.0 or seconds > _POLL)
    # the node began to work up to a pause after the server had sent the message
    late = 1.0 if seconds == 0.0 else min(max((seconds - _LIFE) / _POLL, 0.0), 1.0)
    return (_WORKERS - _LIFE / _SIGN) * late


class Pauses:
    """Seconds between the messages of each node, where they travel by a SuperLink.

    Args:
        grid: that messages go through; those of a simulation are not timed.
    """

    def __init__(self, grid: Grid) -> None:
        while isinstance(grid, GridWrapper):
            grid = grid.wrapped
        self._timed = on_superlink(grid)
        self._last: dict[int, float] = {}

    def since(self, node: int) -> float:
        """Seconds since this was asked for the node before; 0.0 where that is not known."""
        if not self._timed:
            return 0.0
        now = time.monotonic()
        before = self._last.get(node)
        self._last[node] = now
        return 0.0 if before is None else max(round(now - before, 3), 0.001)
