"""A Flower grid that runs the ClientApp here and now, one client after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["InlineGrid"]


class InlineGrid(Grid):
    """Nodes without processes, threads or sockets: deterministic to the byte.

    Args:
        client: what every node runs.
        count: number of nodes; node `i` has partition id `i` and node id ``i + 1000``.
        run_id: of the run that messages belong to.
    """

    def __init__(self, client: ClientApp, *, count: int, run_id: int = 1) -> None:
        self._client = client
        self._run = Run.create_empty(run_id)
        self._contexts = {
            1000 + number: Context(
                run_id=run_id,
                node_id=1000 + number,
                node_config={"partition-id": number, "num-partitions": count},
                state=RecordDict(),
                run_config={},
            )
            for number in range(count)
        }
        self._numbers = itertools.count(1)
        self._replies: dict[str, Message] = {}
        # Flower's messages take their sender from here
        TaskIdentity.run_id = run_id
        TaskIdentity.task_id = 1
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    def set_run(self, run: Run) -> None:
        """See `flwr.serverapp.Grid.set_run`."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid operates in."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See `flwr.serverapp.Grid.create_message`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes, by partition."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes, by partition."""
        return [NodeInfo(node_id=node_id) for node_id in self._contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the clients that are addressed, at once; a client that raises answers an error."""
        ids = []
        for message in messages:
            message_id = f"message-{next(self._numbers):08d}"
            message.metadata.__dict__["_message_id"] = message_id
            context = self._contexts[message.metadata.dst_node_id]
            try:
                reply = self._client(message=message, context=context)
            except Exception as error:  # as Flower does: a client's failure is a reply
                reason = f"{type(error).__name__}: {error}"
                reply = Message(
                    Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason),
                    reply_to=message,
                )
            reply.metadata.__dict__["_message_id"] = f"reply-{next(self._numbers):08d}"
            self._replies[message_id] = reply
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages."""
        return [self._replies.pop(i) for i in sorted(message_ids) if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return the replies; `timeout` has no meaning here."""
        return self.pull_messages(self.push_messages(messages))
