"""How long to wait before trying again."""

from __future__ import annotations

import random

__all__ = ["Backoff"]


class Backoff:
    """Waits that grow, each drawn evenly from zero to a bound that doubles.

    Full jitter: after a server's restart its devices come back spread over the bound, not in
    step (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).

    Args:
        first: bound of the first wait in seconds.
        most: bound of any wait.
        rng: source of the jitter.

    >>> backoff = Backoff(1.0, 4.0, random.Random(1))
    >>> [round(backoff.next(), 2) for _ in range(4)]
    [0.13, 1.69, 3.06, 1.02]
    """

    def __init__(self, first: float, most: float, rng: random.Random) -> None:
        self._first, self._most, self._rng = first, most, rng
        self._bound = first

    def next(self) -> float:
        """Seconds to wait."""
        bound, self._bound = self._bound, min(self._most, self._bound * 2)
        return self._rng.uniform(0, bound)

    def long(self) -> float:
        """Seconds to wait for what time alone does not heal."""
        self._bound = self._most
        return self._rng.uniform(self._most / 2, self._most)

    def reset(self) -> None:
        """It works again."""
        self._bound = self._first
