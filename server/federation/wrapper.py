"""A Flower grid around another one; what a subclass does not override is passed on."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from prunecast.compression.flower.internals import NodeInfo, Run

__all__ = ["GridWrapper"]


class GridWrapper(Grid):
    """Passes every request on to the grid it wraps.

    Args:
        grid: the grid to wrap.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    @property
    def wrapped(self) -> Grid:
        """The grid it wraps."""
        return self._grid

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
