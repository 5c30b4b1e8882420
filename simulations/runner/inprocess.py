"""A Flower grid that runs its ClientApps in this process: for tests, debugging, small studies.

Messages cross it as bytes: every message is serialised into Flower's objects and built anew on
the other side, so what works here works over a wire. There are no threads and no waiting; replies
exist as soon as `push_messages` returns. Asked for a message that it does not know, or whose reply
it delivered, it answers with an error, as the SuperLink does.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from prunecast.compression.flower.internals import (
    SUPERLINK_NODE_ID,
    ErrorCode,
    Run,
    identify_process,
    make_message,
    over_the_wire,
    set_message_id,
    set_source,
    unavailable,
)

__all__ = ["InProcessGrid"]


class InProcessGrid(Grid):
    """Nodes 1..n, each with its own `Context`, served one after the other.

    Args:
        client_app: the ClientApp of every node, or a mapping of node id to ClientApp.
        num_nodes: number of nodes; their ``partition-id`` is node id - 1.
        run_id: id of the run; part of what payloads are bound to.

    Attributes:
        online: node ids `get_node_ids` reports; remove one to let it skip rounds.
        busy: node ids that come to their messages when `serve` says so, and not at once. What has
            expired by then is not delivered, as on the SuperLink. For fault injection.
        on_reply: called with every reply before it is delivered; may change it, or return None
            to lose it. For fault injection.
    """

    def __init__(
        self,
        client_app: ClientApp | dict[int, ClientApp],
        num_nodes: int,
        *,
        run_id: int = 1,
    ) -> None:
        nodes = range(1, num_nodes + 1)
        self._apps = (
            client_app if isinstance(client_app, dict) else dict.fromkeys(nodes, client_app)
        )
        self._run = Run.create_empty(run_id)
        self._contexts = {
            node: Context(
                run_id=run_id,
                node_id=node,
                node_config=UserConfig({"partition-id": node - 1, "num-partitions": num_nodes}),
                state=RecordDict(),
                run_config=UserConfig(),
            )
            for node in nodes
        }
        self._replies: dict[str, Message] = {}
        self._waiting: dict[str, float] = {}  # id of a message -> until when its reply may come
        self._queued: dict[str, Message] = {}  # what nodes have not come to
        self._numbers = itertools.count(1)
        self.online, self.busy = set(nodes), set[int]()
        self.on_reply: Callable[[Message], Message | None] = lambda reply: reply
        identify_process(run_id, SUPERLINK_NODE_ID)

    def set_run(self, run: Run) -> None:
        """Set the run; only its id matters here."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
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
        """Ids of the nodes that are online, ascending."""
        return sorted(self.online)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver every message and run its ClientApp at once, but for those to busy nodes."""
        ids = []
        for message in messages:
            ids.append(f"message-{next(self._numbers):012d}")
            set_message_id(message, ids[-1])
            self._waiting[ids[-1]] = message.metadata.created_at + message.metadata.ttl
            self._queued[ids[-1]] = over_the_wire(message)
            if message.metadata.dst_node_id not in self.busy:
                self._deliver(ids[-1])
        return ids

    def serve(self, node: int, most: int | None = None) -> int:
        """Let a node come to its messages, in the order in which they were sent.

        Args:
            node: its id.
            most: how many messages it takes, at most; None for all.

        Returns:
            How many it took.
        """
        mine = [i for i, m in self._queued.items() if m.metadata.dst_node_id == node]
        for message_id in mine[:most]:
            self._deliver(message_id)
        return len(mine[:most])

    def _deliver(self, message_id: str) -> None:
        message = self._queued.pop(message_id)
        if self._waiting.get(message_id, 0.0) < time.time():
            return
        reply = self.on_reply(self._run_client(message))
        if reply is not None:
            self._replies[message_id] = reply

    def _run_client(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node not in self.online:
            return _offline(message)
        try:
            reply = self._apps[node](message, self._contexts[node])
        except Exception as error:  # as Flower's own runtimes
            reason = f"{type(error)}:<'{error}'>"
            failure = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
            return Message(failure, reply_to=message)
        set_message_id(reply, f"reply-to-{message.metadata.message_id}")
        if reply.has_error():
            return reply
        return over_the_wire(make_message(reply.metadata, reply.content))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to the given messages, each delivered once; nothing for those not there yet.

        A message that is not waited for, or no longer, is answered with an error that names it.
        """
        answers = []
        for wanted in dict.fromkeys(message_ids):
            if self._waiting.get(wanted, 0.0) < time.time():
                self._waiting.pop(wanted, None)
                self._replies.pop(wanted, None)
                answers.append(unavailable(wanted, self._run.run_id))
            elif wanted in self._replies:
                del self._waiting[wanted]
                answers.append(self._replies.pop(wanted))
            elif wanted in self._queued:
                message = self._queued[wanted]
                if message.metadata.dst_node_id not in self.online:
                    del self._waiting[wanted], self._queued[wanted]
                    answers.append(_offline(message))
        return answers

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Deliver and collect; a lost reply is simply absent."""
        return self.pull_messages(list(self.push_messages(messages)))


def _offline(message: Message) -> Message:
    """What the SuperLink, which names no node, answers in place of a node that is gone."""
    reason = f"node {message.metadata.dst_node_id} is not online"
    reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, reason), reply_to=message)
    set_source(reply, SUPERLINK_NODE_ID)
    return reply
