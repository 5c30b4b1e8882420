"""Whether an endpoint answers, asked the way its clients ask."""

from __future__ import annotations

import socket
from contextlib import suppress

__all__ = ["answers"]

_REQUEST = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def answers(address: str, seconds: float) -> bool:
    """Whether HTTP comes back within so many seconds; a refusal for being busy is an answer.

    Args:
        address: `InferenceServer.address`: ``unix:PATH`` or ``http://HOST:PORT``.
        seconds: for each step of the exchange.
    """
    with suppress(OSError), _connected(address, seconds) as probe:
        probe.sendall(_REQUEST)
        return probe.recv(7) == b"HTTP/1."
    return False


def _connected(address: str, seconds: float) -> socket.socket:
    if not address.startswith("unix:"):
        host, _, port = address.removeprefix("http://").rpartition(":")
        return socket.create_connection((host.strip("[]"), int(port)), timeout=seconds)
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.settimeout(seconds)
        probe.connect(address.removeprefix("unix:"))
    except OSError:
        probe.close()
        raise
    return probe
