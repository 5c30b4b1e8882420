"""Ends inferences that take too long, with one thread for all sessions of a process.

onnxruntime looks between two operators, and between the rounds of a loop, whether it was asked to
end. What it does inside one operator nobody can break off: that shows as being late.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["OVERSEER", "Overseer", "Watched"]


class Watched:
    """Something in progress.

    Attributes:
        due: when it has to be over, in monotonic seconds.
        ended: why it was asked to end; None: it was not.
    """

    def __init__(self, due: float, end: Callable[[], None]) -> None:
        self.due, self._end = due, end
        self.ended: str | None = None

    def end(self, why: str) -> None:
        """Ask it to end, once."""
        if self.ended is None:
            self.ended = why
            self._end()


class Overseer:
    """Knows what is in progress and when it has to be over; safe from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watched: set[Watched] = set()
        self._thread: threading.Thread | None = None
        self._wakes = math.inf

    @contextmanager
    def watching(self, seconds: float, end: Callable[[], None]) -> Iterator[Watched]:
        """While the block runs: after so many seconds call `end`, which asks it to end.

        Args:
            seconds: infinite: only `end_all` ends it.
            end: must be quick and must not raise.
        """
        watched = Watched(time.monotonic() + seconds, end)
        with self._changed:
            self._watched.add(watched)
            if watched.due < math.inf and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="overseer", daemon=True)
                self._thread.start()
            elif watched.due < self._wakes:
                self._changed.notify()
        try:
            yield watched
        finally:
            with self._changed:
                self._watched.discard(watched)

    def end_all(self, why: str) -> None:
        """Ask everything that is in progress to end, now."""
        with self._changed:
            for watched in self._watched:
                watched.end(why)
                watched.due = min(watched.due, time.monotonic())

    def is_late(self, grace: float) -> bool:
        """Whether something has not ended so many seconds after it had to be over."""
        now = time.monotonic()
        with self._changed:
            return any(watched.due + grace < now for watched in self._watched)

    def _work(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                for watched in self._watched:
                    if watched.due <= now:
                        watched.end("time")
                waiting = [w.due for w in self._watched if w.ended is None]
                self._wakes = min(waiting, default=math.inf)
                self._changed.wait(None if self._wakes == math.inf else self._wakes - now)


OVERSEER = Overseer()
"""Of this process."""
