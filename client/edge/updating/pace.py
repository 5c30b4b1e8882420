"""How fast bytes come: no faster than they may, no slower than a server must send them."""

from __future__ import annotations

import http.client
import io
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import urllib3

from prunecast.client.edge.updating.problems import TooSlow

__all__ = ["LeastRate", "TokenBucket", "paced_connections"]


class TokenBucket:
    """Limits an average rate; a burst of one second may pass at once.

    Args:
        rate: bytes per second.
        clock: monotonic seconds.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        rate: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not rate > 0:
            raise ValueError(f"a rate is above zero, not {rate}")
        self.rate = rate
        self._clock, self._sleep = clock, sleep
        self._held, self._seen = rate, clock()

    def take(self, count: int) -> None:
        """Account for `count` bytes that have come; sleeps until the average is kept again."""
        now = self._clock()
        self._held = min(self.rate, self._held + (now - self._seen) * self.rate) - count
        self._seen = now
        if self._held < 0:
            self._sleep(-self._held / self.rate)

    def slow(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The same bytes, no faster; a wait lasts a quarter of a second."""
        size = max(1, int(self.rate / 4))
        for chunk in chunks:
            for at in range(0, len(chunk), size):
                piece = chunk[at : at + size]
                self.take(len(piece))
                yield piece


class _PacedFile(io.RawIOBase):
    """What a server sends, one receive at a time, under a `LeastRate`."""

    def __init__(self, raw: io.RawIOBase, pace: LeastRate) -> None:
        self._raw, self._pace = raw, pace

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        return self._pace.receive(lambda: self._raw.readinto(buffer))

    def close(self) -> None:
        self._raw.close()
        super().close()


def paced_connections(
    make: Callable[[], LeastRate],
) -> list[type[urllib3.connection.HTTPConnection]]:
    """urllib3's connections for HTTP and HTTPS, whose answers keep a pace from the first byte.

    It is measured below http.client, because a server can trickle everywhere: in the status line,
    in headers, between chunks, in the body.
    """

    class Response(http.client.HTTPResponse):
        def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
            super().__init__(sock, *args, **options)
            self.fp.close()
            raw = cast(io.RawIOBase, sock.makefile("rb", buffering=0))
            self.fp = io.BufferedReader(_PacedFile(raw, make()))

    bases = (urllib3.connection.HTTPConnection, urllib3.connection.HTTPSConnection)
    return [type(f"_{b.__name__}", (b,), {"response_class": Response}) for b in bases]


class LeastRate:
    """Watches that one answer of a server keeps a least average rate.

    Args:
        least_rate: bytes per second.
        patience: seconds of waiting before the rate counts.
        silence: seconds without any byte; how long one receive may last, for the message.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        least_rate: float,
        patience: float,
        silence: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._least_rate, self._patience, self._silence = least_rate, patience, silence
        self._clock = clock
        self._waited, self._received = 0.0, 0

    def receive(self, read: Callable[[], int | None]) -> int | None:
        """Call `read` and return its number of bytes.

        Only the time inside `read` counts, so a receiver that is slow itself blames nobody.

        Raises:
            TooSlow: the rate fell below the least one, or nothing came at all.
        """
        begun = self._clock()
        try:
            count = read()
        except TimeoutError as error:
            raise TooSlow(
                f"it stopped sending ({self._silence:g} seconds without a byte)"
            ) from error
        self._waited += self._clock() - begun
        self._received += count or 0
        if count:
            self.check()
        return count

    def check(self) -> None:
        """Raise TooSlow if the rate has fallen below the least one."""
        if self._waited > max(self._patience, self._received / self._least_rate):
            raise TooSlow(
                f"{self._received / self._waited:.0f} bytes per second came, least is "
                f"{self._least_rate:.0f}"
            )
