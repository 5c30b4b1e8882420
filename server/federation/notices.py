"""What a run's people must be told: each thing once when it happens, all of it in one line."""

from __future__ import annotations

import threading
from collections import Counter
from logging import WARNING

from prunecast.compression.flower.internals import log

__all__ = ["Notices"]

_KEPT = 10_000  # different things that were said; more are only counted


class Notices:
    """Says what was not compressed as intended, and what failed: once, and summed up."""

    def __init__(self) -> None:
        self._said: set[tuple[object, ...]] = set()
        self._inexact: Counter[str] = Counter()
        self._records, self._failures = 0, 0
        self._failing: set[int] = set()
        self._lock = threading.Lock()

    def failed(self, node: int, reason: str, remedy: str = "") -> None:
        """A reply that was an error or was refused."""
        with self._lock:
            self._failures += 1
            self._failing.add(node)
        self._say(("failed", node, reason), f"Node {node}: {reason}", remedy)

    def unkept(self, node: int, trouble: str) -> None:
        """A node that could not keep what it should, and could before."""
        text = "Node %s cannot keep what makes its next messages small, until that is mended: %s"
        log(WARNING, text, node, trouble)

    def unasked(self, node: int) -> None:
        """A reply that was delivered before, or to a message that was given up."""
        text = f"Node {node}: a reply that nobody waits for was dropped; it came twice or too late"
        self._say(("unasked", node), text)

    def _say(self, key: tuple[object, ...], text: str, remedy: str = "") -> None:
        with self._lock:
            if key in self._said or len(self._said) >= _KEPT:
                return
            self._said.add(key)
        log(WARNING, "%s%s", text, f" ({remedy})" if remedy else "")
