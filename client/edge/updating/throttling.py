"""When and how fast an agent may download."""

from __future__ import annotations

import re
import time as clocks
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, time

from prunecast.client.edge.updating.transport import Fetcher, Stream

__all__ = ["LimitedFetcher", "QuietHours", "TokenBucket"]

_WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True)
class QuietHours:
    """A daily window of local time; it may cross midnight.

    Attributes:
        begin: first moment of the window.
        end: first moment after it.

    >>> hours = QuietHours.parse("22:00-06:00")
    >>> datetime(2026, 1, 1, 23, 30) in hours, datetime(2026, 1, 1, 6, 0) in hours
    (True, False)
    """

    begin: time
    end: time

    @classmethod
    def parse(cls, text: str) -> QuietHours:
        """Read ``HH:MM-HH:MM``.

        Raises:
            ValueError: not of that form, or empty.
        """
        found = _WINDOW.fullmatch(text)
        if not found or found[1] + found[2] == found[3] + found[4]:
            raise ValueError(f"{text!r} is no window of time: write it like 22:00-06:00")
        hours = [int(part) for part in found.groups()]
        return cls(time(hours[0], hours[1]), time(hours[2], hours[3]))

    def __contains__(self, moment: datetime) -> bool:
        """Whether a local time lies in the window."""
        at = moment.time()
        if self.begin < self.end:
            return self.begin <= at < self.end
        return at >= self.begin or at < self.end


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
        clock: Callable[[], float] = clocks.monotonic,
        sleep: Callable[[float], None] = clocks.sleep,
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


class LimitedFetcher(Fetcher):
    """Another fetcher, no faster than a token bucket allows.

    Args:
        inner: the network.
        bucket: holds the rate, the clock and what waits.
    """

    def __init__(self, inner: Fetcher, bucket: TokenBucket) -> None:
        self._inner, self._bucket = inner, bucket

    def open(self, url: str, offset: int = 0) -> Stream:
        """See `Fetcher.open`."""
        stream = self._inner.open(url, offset)
        return Stream(stream.start, self._slowed(stream.chunks))

    def _slowed(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        size = max(1, int(self._bucket.rate / 4))  # a wait lasts a quarter of a second
        for chunk in chunks:
            for at in range(0, len(chunk), size):
                piece = chunk[at : at + size]
                self._bucket.take(len(piece))
                yield piece
