"""What nodes will hold once they have come to the messages that are on their way to them."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["InFlight"]

_NOTHING: Mapping[str, bytes] = {}


class InFlight:
    """The versions of the latest message to each node that has not answered it.

    A node comes to its messages in the order in which they were sent, and keeps the version of each
    of them, whether it trains on it or finds it too late. So what a message brings builds on the
    version of the one before, although the node has not said yet that it holds it. Built on what it
    said last, it would miss the base, say so, and be sent the same once more.
    """

    def __init__(self) -> None:
        self._count = 0
        self._latest: dict[int, tuple[int, Mapping[str, bytes]]] = {}
        self._heard: dict[int, int] = {}

    def sent(self, node: int, versions: Mapping[str, bytes]) -> int:
        """A message is on its way.

        Args:
            node: id.
            versions: record key to short digest of what the node will hold for it.

        Returns:
            The message's number: 1 or more, in the order of all of them.
        """
        self._count += 1
        if versions:
            self._latest[node] = self._count, {**self.expected(node), **versions}
        return self._count

    def over(self, node: int, number: int) -> None:
        """A message was answered, or the node will not come to it any more."""
        if self._latest.get(node, (0, _NOTHING))[0] == number:
            del self._latest[node]

    def missed(self, node: int) -> None:
        """A node lacks a base, so that it will not hold what was built on that either."""
        self._latest.pop(node, None)

    def is_news(self, node: int, number: int) -> bool:
        """Whether the answer to a message says more than those heard before; notes it, if so."""
        if number < self._heard.get(node, 0):
            return False
        self._heard[node] = number
        return True

    def expected(self, node: int) -> Mapping[str, bytes]:
        """Record key to short digest of what a node will hold; empty where it said so itself."""
        return self._latest.get(node, (0, _NOTHING))[1]
