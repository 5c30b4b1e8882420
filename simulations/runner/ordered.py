"""A grid in which nodes and replies have an order, so that a run can be repeated bit for bit."""

from __future__ import annotations

import time
from collections.abc import Iterable

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from prunecast.compression.flower.internals import NodeInfo
from prunecast.server.federation.wrapper import GridWrapper
from prunecast.simulations.runner.errors import EngineFailed

__all__ = ["NODE_RECORD", "OrderedGrid", "nodes_by_partition"]

NODE_RECORD = "node"
"""Key of the config record in which a client answers a query with its ``partition-id``."""

_QUERY_SECONDS = 120.0


def nodes_by_partition(grid: Grid, count: int) -> list[int]:
    """Wait for `count` nodes and ask each for its partition; node ids in order of partition.

    Flower draws node ids at random; partitions are what stays the same from run to run.

    Raises:
        EngineFailed: the nodes do not come up, or do not answer.
    """
    deadline = time.monotonic() + _QUERY_SECONDS
    while len(nodes := list(grid.get_node_ids())) < count:
        if time.monotonic() > deadline:
            raise EngineFailed(f"only {len(nodes)} of {count} simulated nodes came up")
        time.sleep(0.1)
    queries = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
    partitions: dict[int, int] = {}
    for reply in grid.send_and_receive(queries, timeout=_QUERY_SECONDS):
        if reply.has_error():
            raise EngineFailed(f"a simulated node failed to start: {reply.error.reason}")
        record = reply.content[NODE_RECORD]
        assert isinstance(record, ConfigRecord)
        partitions[reply.metadata.src_node_id] = int(record["partition-id"])  # type: ignore[arg-type]
    if len(partitions) < count:
        raise EngineFailed(f"only {len(partitions)} of {count} simulated nodes answered")
    return sorted(partitions, key=partitions.__getitem__)


class OrderedGrid(GridWrapper):
    """Lists nodes by partition, and returns replies in the order of those nodes.

    Sums of floats depend on the order of their terms, and the sampling of nodes on the order of
    the nodes: without this no two runs are alike.

    Args:
        grid: the grid to wrap.
        nodes: node ids in the order to keep.
    """

    def __init__(self, grid: Grid, nodes: Iterable[int]) -> None:
        super().__init__(grid)
        self._rank = {node: rank for rank, node in enumerate(nodes)}

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the connected nodes, in order."""
        return sorted(self._grid.get_node_ids(), key=self._place)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The connected nodes, in order."""
        return sorted(self._grid.get_nodes(), key=lambda node: self._place(node.node_id))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, in the order of their nodes."""
        return self._grid.push_messages(self._by_node(messages))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages; the replies in the order of the nodes that were asked."""
        ordered = self._by_node(messages)
        replies = list(self._grid.send_and_receive(ordered, timeout=timeout))
        asked = {m.metadata.message_id: self._place(m.metadata.dst_node_id) for m in ordered}
        return sorted(replies, key=lambda r: asked.get(r.metadata.reply_to_message_id, len(asked)))

    def _by_node(self, messages: Iterable[Message]) -> list[Message]:
        return sorted(messages, key=lambda m: self._place(m.metadata.dst_node_id))

    def _place(self, node: int) -> int:
        return self._rank.get(node, len(self._rank))
