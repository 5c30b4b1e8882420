"""A Flower grid around another one; what a subclass does not override is passed on."""

from __future__ import annotations

import time
from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from prunecast.compression.flower.internals import NodeInfo, Run

__all__ = ["GridWrapper", "PollingGrid"]


class GridWrapper(Grid):
    """Passes every request on to the grid it wraps.

    Args:
        grid: the grid to wrap.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Run) -> None:
        """See `flwr.serverapp.Grid.set_run`."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run this grid operates in."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See `flwr.serverapp.Grid.create_message`."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the connected nodes."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The connected nodes."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; returns their ids."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Fetch the replies that have arrived."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and wait for the replies, `timeout` seconds at most (None: for ever)."""
        return self._grid.send_and_receive(messages, timeout=timeout)


class PollingGrid(GridWrapper):
    """A wrapper whose `send_and_receive` goes through its own `push_messages` and `pull_messages`.

    Args:
        grid: the grid to wrap.
        poll_interval: seconds between looking for replies.
    """

    def __init__(self, grid: Grid, *, poll_interval: float = 0.2) -> None:
        super().__init__(grid)
        self._poll_interval = poll_interval

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and wait for the replies, `timeout` seconds at most (None: for ever).

        Replies come in the order of the messages, whichever arrived first, so that sums of
        floats do not depend on timing.
        """
        sent = [message_id for message_id in self.push_messages(messages) if message_id]
        waiting = dict.fromkeys(sent)
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (deadline is None or time.monotonic() < deadline):
            arrived = list(self.pull_messages(waiting))
            replies.extend(arrived)
            for reply in arrived:
                waiting.pop(reply.metadata.reply_to_message_id, None)
            if waiting and not arrived:
                time.sleep(self._poll_interval)
        self._forget(waiting)
        order = {message_id: position for position, message_id in enumerate(sent)}
        return sorted(replies, key=lambda reply: order[reply.metadata.reply_to_message_id])

    def _forget(self, message_ids: Iterable[str]) -> None:
        """Release what is kept for messages whose replies nobody will ask for any more."""
