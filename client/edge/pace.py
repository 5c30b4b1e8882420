"""How fast bytes may come, and how slowly."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Pace", "TokenBucket", "TooSlow"]


class TooSlow(TimeoutError):
    """A server sends less than the least rate."""


class Pace:
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
        if count and self._waited > max(self._patience, self._received / self._least_rate):
            raise TooSlow(
                f"{self._received / self._waited:.0f} bytes per second came, least is "
                f"{self._least_rate:.0f}"
            )
        return count


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
