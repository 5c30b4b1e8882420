"""Messages and their replies: coded, sent, waited for, sent again or given up, and recorded."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Iterable, Mapping
from logging import WARNING
from pathlib import Path

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from prunecast.compression.flower import stated_round
from prunecast.compression.flower.internals import (
    Aggregation,
    aggregation_above,
    function_of,
    log,
    rounds_above,
    set_reply_to,
    unsent,
)
from prunecast.compression.versions import UpdateRule
from prunecast.server.federation.errors import FederationError
from prunecast.server.federation.exchange.batches import Batch, Prepared
from prunecast.server.federation.exchange.deadlines import Attendance, Closing, Deadlines
from prunecast.server.federation.exchange.measuring import Recode, measured_message
from prunecast.server.federation.exchange.outbound import Outbound, within
from prunecast.server.federation.exchange.packing import pack_together
from prunecast.server.federation.exchange.replies.inbound import up_of
from prunecast.server.federation.exchange.replies.late import LateReplies
from prunecast.server.federation.exchange.replies.receiving import Received, Receiver, refuse
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.publishing.participation import trains
from prunecast.server.federation.publishing.publisher import Publisher
from prunecast.server.federation.publishing.streams import Streams
from prunecast.server.federation.reporting.layers import LayerSamples
from prunecast.server.federation.reporting.ledger import Entry, Ledger
from prunecast.server.federation.reporting.notices import Notices
from prunecast.server.federation.reporting.wire import Pauses
from prunecast.server.federation.wrapper import GridWrapper

__all__ = ["MessageExchange"]

_FURTHEST = 1e9  # seconds that a clock may be ahead
_KEPT = 1000  # entries of a ledger
_POOL_EVERY = 10  # rounds: how many nodes there are changes slowly
_NOT_BY_ITSELF = (
    "prunecast.server.Run does that; a loop of your own calls grid.remove_channels(arrays, plan)."
)


class MessageExchange(GridWrapper):
    """A Flower grid whose messages are coded by a policy and recorded, in both directions.

    `CompressedGrid` tells its arguments and attributes.
    """

    def __init__(
        self,
        grid: Grid,
        policy: Policy | str = "balanced",
        *,
        ledger: Ledger | Path | None = None,
        seed: int = 0,
        alternatives: Mapping[str, Recode] | None = None,
        verify_replies: bool = True,
        poll_interval: float = 0.2,
        job: str = "",
        deadlines: Deadlines | None = None,
    ) -> None:
        super().__init__(grid)
        self.policy = Policy.preset(policy) if isinstance(policy, str) else policy
        if not isinstance(ledger, Ledger):
            ledger = Ledger(ledger, keep=_KEPT)
        self.ledger = ledger
        self._pauses = Pauses(grid)
        self.samples = LayerSamples()
        self._poll_interval = poll_interval
        self._alternatives = dict(alternatives or {})
        self._streams = Streams(self.policy)
        self._streams.use_job(job)
        self._outbound = Outbound(self._streams, seed)
        self._lock = threading.RLock()
        self._notices = Notices()
        # where nobody else ends it: when the last name of this object is gone
        self._end = weakref.finalize(self, self._notices.sum_up)
        up = up_of(self.policy, verify=verify_replies)
        self._receiver = Receiver(self._streams, up, self._notices, verify=verify_replies)
        self._rounds_checked = self._foreseen = False
        self._sent: dict[str, Prepared] = {}
        self._retries: dict[str, str] = {}  # message id of a retry -> id the caller knows
        self._late = LateReplies(self._grid, self._receiver, self._streams.in_flight)
        self.use_deadlines(deadlines or Deadlines())

    def use_deadlines(self, deadlines: Deadlines) -> None:
        """Say when rounds end and, before the first message, what becomes of late replies.

        Raises:
            FederationError: late updates cannot be applied where nodes train slices of the model.
        """
        if deadlines.applies and self.policy.widths:
            raise FederationError(
                "late updates cannot be applied to slices of the model: set late = 'discard', or "
                "no prunecast.widths"
            )
        self.deadlines = self._late.deadlines = deadlines
        self._attendance = Attendance(deadlines)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the connected nodes, but for those that do not understand this server.

        Raises:
            NodesMissing: it is asked again and again, for longer than nodes are waited for.
            FederationError: there are nodes, and none of them understands this server.
        """
        found = self._streams.readers(list(self._grid.get_node_ids()))
        self._attendance.asked(len(found))
        return found

    def begin_round(self, number: int) -> None:
        """State the round of messages that state none themselves; schedules of pruning follow it.

        Flower's strategies state it, as ``server-round`` in a config record; a loop of one's own
        may do either. Without both, every batch of messages with new weights counts as a round.

        Args:
            number: 1 for the first.
        """
        self._streams.round = number

    def expect_rounds(self, rounds: int) -> None:
        """Say how many rounds there will be, those before a resume included.

        The bounds of pruning follow from it. Flower's strategies are asked by themselves; a loop
        of one's own says it before the first message.
        """
        self._rounds_checked = True
        self._streams.expect(rounds)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Encode and send messages; returns their ids as the wrapped grid does.

        Raises:
            NonFiniteModel: an array to be published holds NaN or infinity; nothing was sent.
        """
        with self._lock:
            return self._push_batch(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Fetch and decode the replies that have arrived.

        A node that misses the base of a payload is sent a keyframe at once; its reply appears
        under the original message's id in a later call.
        """
        with self._lock:
            return self._take(self._pull(message_ids))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and wait for the replies, `timeout` seconds at most (None: for ever).

        Replies come in the order of the messages, whichever arrived first, so that sums of
        floats do not depend on timing; `deadlines` may end it before the last of them. Late updates
        of rounds before, where these are applied, come first, as updates of what is sent now.
        """
        batch = list(messages)
        if not self._rounds_checked:  # `Run` knows more, and has said so
            self._rounds_checked = True
            if rounds := rounds_above(sys._getframe(1)):
                self._streams.expect(rounds)
            if self.policy.channels_at:
                log(WARNING, "No channels will be removed: %s", _NOT_BY_ITSELF)
        kinds = {message.metadata.message_type for message in batch}
        kind = kinds.pop() if len(kinds) == 1 else ""
        aggregation = aggregation_above(sys._getframe(1), kind) if kind else None
        with self._lock:
            pushed = self._push_batch(batch, self._late.fresh_seconds(kind), whole=True)
            sent = [message_id for message_id in pushed if message_id]
            present = next(filter(None, map(self._sent.get, sent)), None)
        waiting = dict.fromkeys(sent)
        closing = Closing(self.deadlines, len(sent), timeout)
        found: list[Message | Received] = []
        while waiting and not closing.over:
            with self._lock:
                arrived = self._pull(waiting)
            found.extend(arrived)
            for item in arrived:
                reply = item.message if isinstance(item, Received) else item
                waiting.pop(reply.metadata.reply_to_message_id, None)
                closing.count(reply)
            if waiting and not arrived:
                time.sleep(self._poll_interval)
        with self._lock:
            if waiting and not closing.timed_out:
                self._late.ended(kind, closing.seconds)
            self._leave(waiting)
            if present is not None and function_of(kind) == MessageType.TRAIN:
                found = [*self._late.updates(present, self._answered), *found]
            replies = self._take(found, aggregation)
        order = {message_id: position for position, message_id in enumerate(sent)}
        return sorted(replies, key=lambda reply: order.get(reply.metadata.reply_to_message_id, -1))

    def sum_up(self) -> None:
        """Say in one line what did not travel as the policy has it, and what failed, so far.

        `Run` does at its end; else it is said when the grid is no longer used. What each of it was
        is said when it happens first.
        """
        self._notices.sum_up()

    def _stream(self, key: str) -> Publisher:
        """Of the versions that travel under a record key."""
        return self._streams.stream(self.run.run_id, key)

    # -- messages -----------------------------------------------------------------------------

    def _push_batch(
        self, messages: Iterable[Message], fresh: float = 0.0, *, whole: bool = False
    ) -> list[str]:
        """Send messages; `whole` says that a round has no others of their type."""
        self.ledger.flush()
        self._attendance.sent()
        self._forget(self._expired())
        self._late.look(self._answered)
        dense = self.policy.down == self.policy.up == "dense"
        batch = Batch(messages, legacy=not dense)
        batch.fresh_seconds = fresh
        self._late.limit(batch.messages, fresh, self._streams.ahead)
        training = [message for message in batch.messages if trains(message)]
        if training and not dense:
            asked = {message.metadata.dst_node_id for message in training}
            stated = stated_round(training[0].content) or self._streams.round
            self._streams.participation.begin(asked, self._pool(len(asked)), stated)
        prepared = [self._outbound.prepare(batch, message) for message in batch.messages]
        if self._streams.budget is not None:
            within(self._streams.budget, prepared, self._streams.participation.rate)
        known = whole or self._streams.participation.rounds > 1
        if training and known and not self._foreseen and not dense:
            self._foreseen = True
            first = next(item for item in prepared if trains(item.original))
            self._streams.foresee(first.original.metadata.run_id, first.versions)
        return self._push(prepared)

    def _pool(self, asked: int) -> int:
        """How many nodes there are, asked now and then; 0 where that is known or nobody knows."""
        participation = self._streams.participation
        if participation.rounds % _POOL_EVERY and participation.pool >= asked:
            return 0
        try:
            return len(list(self._grid.get_node_ids()))
        except Exception:  # of whatever grid is wrapped: it only tells who is there
            return 0

    def _push(self, prepared: list[Prepared]) -> list[str]:
        # before they are pushed: an engine in this process may be reading them as soon as they
        # are in its hands
        pack_together(prepared)
        measured = [
            measured_message(item.message, self._alternatives, item.measured) for item in prepared
        ]
        # a list: the HTTP grid goes over the messages twice
        ids = list(self._grid.push_messages([p.message for p in prepared]))
        pushed = set(ids)
        for item, (size, alternatives, objects) in zip(prepared, measured, strict=True):
            metadata = item.message.metadata
            if metadata.message_id not in pushed:
                continue
            self._sent[metadata.message_id] = item
            node = self._streams.node(metadata.dst_node_id)
            # nobody knows whether a type that failed before the mod is read this time
            kept = {} if metadata.message_type in node.unread else item.kept
            item.number = self._streams.in_flight.sent(item.node, kept)
            self._notices.counted(records=len(item.kinds))
            for kind, key, cause in item.apart:
                self._notices.apart(metadata.dst_node_id, "down", kind, key, cause)
            entry = self.ledger.add(
                Entry(
                    round=item.round,
                    node=metadata.dst_node_id,
                    direction="down",
                    kind="+".join(item.kinds) or "none",
                    message_type=metadata.message_type,
                    payload_bytes=size,
                    dense_bytes=item.dense_bytes,
                    encode_ms=item.encode_ms,
                    alternatives=alternatives,
                    objects=objects,
                    width=node.width or "",
                    capability=node.treatment.name,
                    seconds=self._pauses.since(metadata.dst_node_id),
                )
            )
            item.entry = entry
            if self._streams.budget is not None:
                self._streams.budget.sent(
                    entry.node, size, item.payload_bytes, training=trains(item.original)
                )
            self.samples.note(entry, item.message.content, self._streams.held)
        return ids

    # -- replies ------------------------------------------------------------------------------

    def _pull(self, message_ids: Iterable[str]) -> list[Message | Received]:
        """Replies that have arrived; those to messages that are not known here as they are."""
        # in place of the original: the SuperLink forgets a message whose reply it delivered, and
        # answers for one that it does not know with an error
        retries = {origin: retry for retry, origin in self._retries.items()}
        asked = dict.fromkeys(retries.get(wanted, wanted) for wanted in message_ids)
        found: list[Message | Received] = []
        for reply in self._grid.pull_messages(list(asked)):
            message_id = reply.metadata.reply_to_message_id
            if message_id not in asked:
                self._notices.unasked(reply.metadata.src_node_id)
                continue
            del asked[message_id]
            received = self._receive(reply)
            if received is not None:
                found.append(received)
        return found

    def _receive(self, reply: Message) -> Message | Received | None:
        message_id = reply.metadata.reply_to_message_id
        # of equal content and envelope, a retry may have the id of its original
        retried, origin = message_id in self._retries, self._retries.pop(message_id, message_id)
        sent = self._sent.pop(message_id, None)
        if sent is None:
            set_reply_to(reply, origin)
            if reply.has_error():
                return reply
            return refuse(reply, "it answers a message that was given up, or not sent from here")
        entry = self._answered(reply, sent)
        content = None if reply.has_error() else reply.content
        received = self._receiver.understand(reply, sent, entry, retried=retried)
        learns = received is not None and received.payload_bytes and trains(sent.original)
        if self._streams.budget is not None and received is not None and learns:
            told = entry.payload_bytes, received.payload_bytes, entry.coarser, entry.most
            self._streams.budget.understood(*told)
        if content is not None:
            self.samples.note(entry, content, self._streams.held)
        if not sent.has_arrays and not reply.has_error() and reply.content.array_records:
            self._outbound.answered.add(entry.message_type)
        if received is None:
            self._retry(sent, origin)
            return None
        set_reply_to(received.message, origin)
        return received

    def _answered(self, reply: Message, sent: Prepared) -> Entry:
        """The line of a reply in the ledger, of the kind "error" so far."""
        self._streams.in_flight.over(sent.node, sent.number)
        size, alternatives, objects = measured_message(reply, self._alternatives)
        # an error reply made for a dead node names no useful source: the instruction does
        node = self._streams.node(sent.original.metadata.dst_node_id)
        if not reply.has_error():
            ahead = reply.metadata.created_at - time.time()
            node.ahead = min(max(0.0, ahead), _FURTHEST)  # whatever the node states
        entry = Entry(
            round=sent.round,
            node=sent.original.metadata.dst_node_id,
            direction="up",
            kind="error",
            message_type=sent.original.metadata.message_type,
            payload_bytes=size,
            dense_bytes=size,
            alternatives=alternatives,
            objects=objects,
            width=node.width or "",
            capability=node.treatment.name,
            seconds=self._pauses.since(sent.original.metadata.dst_node_id),
        )
        self.ledger.add(entry)
        if self._streams.budget is not None:
            self._streams.budget.received(entry.node, size, training=trains(sent.original))
        self._notices.counted(replies=1)
        return entry

    def _take(
        self, found: list[Message | Received], aggregation: Aggregation | None = None
    ) -> list[Message]:
        self._receiver.take([item for item in found if isinstance(item, Received)], aggregation)
        return [item.message if isinstance(item, Received) else item for item in found]

    def _retry(self, sent: Prepared, origin: str) -> None:
        """Send the same message again, with keyframes for what the node does not hold.

        It is wanted now, whatever the node's clock says.
        """
        sent.batch.fresh_seconds = 0.0
        prepared = self._outbound.prepare(sent.batch, unsent(sent.original))
        if isinstance(sent.rule, UpdateRule):
            prepared.bound(sent.rule.most)
        self._push([prepared])
        self._retries[prepared.message.metadata.message_id] = origin

    def _expired(self) -> list[str]:
        """Messages that outlived their time to live: Flower delivers no reply to them."""
        now = time.time()
        return [
            message_id
            for message_id, sent in self._sent.items()
            if (meta := sent.original.metadata).created_at + meta.ttl < now
        ]

    def _forget(self, message_ids: Iterable[str]) -> None:
        """Release what is kept for messages whose replies nobody will ask for any more."""
        gone = set(message_ids)
        gone |= {retry for retry, origin in self._retries.items() if origin in gone}
        for message_id in gone:
            if (sent := self._sent.pop(message_id, None)) is not None:
                self._streams.in_flight.over(sent.node, sent.number)
                self._receiver.give_up(sent)
            self._retries.pop(message_id, None)

    def _leave(self, message_ids: Iterable[str]) -> None:
        """End a round without the replies to messages; what still comes of them is looked at."""
        retries = {origin: retry for retry, origin in self._retries.items()}
        for origin in message_ids:
            message_id = retries.get(origin, origin)
            self._retries.pop(message_id, None)
            if (sent := self._sent.pop(message_id, None)) is not None:
                self._late.leave(message_id, sent)
