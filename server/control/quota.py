"""How much one device may ask for, so that it cannot starve the others."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Concurrency", "QuotaExceeded", "RateQuota"]

_MOST_KEYS = 100_000


@dataclass
class QuotaExceeded(Exception):
    """A quota is used up.

    Attributes:
        seconds: after which it is worth trying again.
    """

    seconds: float

    def __str__(self) -> str:
        return f"try again in {self.seconds:.0f} seconds"


class RateQuota:
    """A token bucket per key; keys that have not been seen for long are forgotten.

    Args:
        per_second: calls that a key may make on average.
        burst: calls that it may make at once.

    >>> quota = RateQuota(per_second=1, burst=2)
    >>> quota.take("cam", now=0), quota.take("cam", now=0), quota.take("cam", now=1)
    (None, None, None)
    """

    def __init__(self, *, per_second: float, burst: int) -> None:
        self._rate, self._burst = per_second, burst
        self._held: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str, *, now: float) -> None:
        """Account for one call at a time in monotonic seconds.

        Raises:
            QuotaExceeded: the key has made too many.
        """
        held, seen = self._held.pop(key, (float(self._burst), now))
        held = min(self._burst, held + (now - seen) * self._rate)
        self._held[key] = (held - 1 if held >= 1 else held, now)
        if len(self._held) > _MOST_KEYS:
            self._held.popitem(last=False)
        if held < 1:
            raise QuotaExceeded((1 - held) / self._rate)


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
