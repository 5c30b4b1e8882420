"""What clients may take: limits of the server, and quotas by address."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Quota", "ServingLimits", "client_of"]

_BURST = 10.0  # seconds of the rate that may come at once
_ADDRESSES = 65_536  # remembered; the one that asked least recently is forgotten first


@dataclass(frozen=True)
class ServingLimits:
    """Limits of a release server; times in seconds.

    Attributes:
        connections: at the same time; further ones are answered 503.
        header_bytes: of a request's line and headers together; longer ones are answered 431.
        request_timeout: for a TLS handshake, and for a request from its first byte to its last.
        idle_timeout: between two requests of a connection.
        stall_timeout: for a client to take the next 16 KiB.
        drain: for downloads in progress when the server is stopped.
        requests_per_second: of one client on average, ten seconds' worth at once; None: any.
        bytes_per_second: likewise, of bodies. A client whose account is not empty may begin a
            file of any size and pays for it afterwards.
    """

    connections: int = 1024
    header_bytes: int = 16 * 1024
    request_timeout: float = 30.0
    idle_timeout: float = 75.0
    stall_timeout: float = 60.0
    drain: float = 30.0
    requests_per_second: float | None = None
    bytes_per_second: float | None = None


class Quota:
    """An account for every client, filled at a steady rate (a token bucket that may owe).

    Args:
        rate: units per second.
        clock: monotonic seconds, for tests.

    >>> quota = Quota(2.0, clock=lambda: 0.0)
    >>> quota.take("a", 50), quota.take("a", 1), quota.take("b", 1)
    (0.0, 15.5, 0.0)
    """

    def __init__(self, rate: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._most = max(1.0, _BURST * rate)
        self._accounts: OrderedDict[str, tuple[float, float]] = OrderedDict()  # level, as of when

    def take(self, client: str, amount: float) -> float:
        """Take from a client's account, unless less than one unit is in it.

        Returns:
            0, or the seconds after which to ask again; then nothing was taken.
        """
        level = self._level(client)
        paid = amount if level >= 1.0 else 0.0
        self._accounts[client] = (level - paid, self._clock())
        self._accounts.move_to_end(client)
        if len(self._accounts) > _ADDRESSES:
            self._accounts.popitem(last=False)
        return max(0.0, (1.0 - level) / self._rate)

    def give_back(self, client: str, amount: float) -> None:
        """Return what was taken and not used."""
        if client in self._accounts:
            self._accounts[client] = (self._level(client) + amount, self._clock())

    def _level(self, client: str) -> float:
        level, then = self._accounts.get(client, (self._most, 0.0))
        return min(self._most, level + self._rate * (self._clock() - then))


def client_of(address: str) -> str:
    """Who an address counts as: itself, or its /64, the least that an IPv6 customer is given.

    >>> client_of("192.0.2.7"), client_of("2001:db8::1:2:3:4"), client_of("::ffff:192.0.2.7")
    ('192.0.2.7', '2001:db8::', '192.0.2.7')
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(found) >> 64 << 64))
