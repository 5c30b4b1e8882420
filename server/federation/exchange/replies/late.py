"""Rounds go on without late replies: what nodes are told, and what still comes of these.

Messages carry the deadline of their round: a node that comes to one later than that does not train
on it, so that a slow one catches up. The nodes' clocks may be wrong, and nothing depends on them
alone. A node of whose clock nothing is known is told no deadline. One that refuses while its reply
is wanted is asked again without one. The time to live of a message decides on the server's side
whether it is still delivered; Flower also has the node see by its own clock how long it may reply,
so that it is shortened for those alone whose clock is known, and by as much more as that is ahead.

A late reply is looked at once, before the next messages go out: it says what its node holds. Its
update is discarded, and the node takes back the residual that went with it; or it is applied in the
next round as an update of what is sent then, with a weight that falls with the rounds it is behind.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from prunecast.compression.flower import NUMPY
from prunecast.compression.flower.internals import ErrorCode, make_message
from prunecast.compression.versions import is_statistic
from prunecast.server.federation.exchange.batches import Batch, Prepared
from prunecast.server.federation.exchange.deadlines import Deadlines, staleness_weight
from prunecast.server.federation.exchange.replies.lazy import LazyArray
from prunecast.server.federation.exchange.replies.receiving import Received, Receiver
from prunecast.server.federation.publishing.in_flight import InFlight
from prunecast.server.federation.publishing.participation import trains
from prunecast.server.federation.publishing.version import Version
from prunecast.server.federation.reporting.ledger import Entry

__all__ = ["LateReplies", "moved"]

_ROUNDS = 16  # that a late reply may be behind
_LEAST = 30.0  # seconds that messages are fresh where no deadline says it
_LOOKED_AT = 60.0  # seconds after a deadline in which a reply is looked at, at the least
_GONE = (  # what the SuperLink answers where nothing will come
    *(ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE),
    ErrorCode.NODE_UNAVAILABLE,
)

Answered = Callable[[Message, Prepared], Entry]


class LateReplies:
    """Messages of rounds that have ended, whose replies may still come.

    Args:
        grid: that brings the replies.
        receiver: makes something of them.
        in_flight: knows what nodes will hold; told which messages nobody will come to.

    Attributes:
        deadlines: of the run.
    """

    def __init__(self, grid: Grid, receiver: Receiver, in_flight: InFlight) -> None:
        self.deadlines = Deadlines()
        self._grid, self._receiver, self._in_flight = grid, receiver, in_flight
        self._pending: dict[str, Prepared] = {}  # by id of the message; the oldest first
        self._arrived: list[Received] = []
        self._paces: dict[str, deque[float]] = {}

    def fresh_seconds(self, kind: str) -> float:
        """For how long replies to messages of a type are wanted; 0 where nobody knows.

        Where rounds end after so many replies, that is twice the longest of the last four: so that
        a node which has messages of many rounds before it trains on none but the last.
        """
        seconds, pace = self.deadlines.seconds, self._paces.get(kind)
        if self.deadlines.replies and pace:
            paced = max(_LEAST, 2 * max(pace))
            return min(seconds, paced) if seconds else paced
        return seconds

    def ended(self, kind: str, seconds: float) -> None:
        """Enough replies to messages of a type came within so many seconds."""
        self._paces.setdefault(kind, deque(maxlen=4)).append(seconds)

    def limit(self, messages: Iterable[Message], fresh: float, ahead: Mapping[int, float]) -> None:
        """Let messages be delivered only as long as their replies are of use.

        Args:
            messages: not sent yet.
            fresh: seconds that their replies are wanted; 0 for ever.
            ahead: of nodes of whose clock something is known, by how many seconds it is ahead.
        """
        if self.deadlines.applies or not fresh:
            return
        for message in messages:
            metadata = message.metadata
            if metadata.dst_node_id in ahead:
                looked_at = fresh + max(fresh, _LOOKED_AT) + ahead[metadata.dst_node_id]
                metadata.ttl = min(metadata.ttl, looked_at)

    def leave(self, message_id: str, sent: Prepared) -> None:
        """Go on without the reply to a message."""
        if not self._applies(sent):
            self._receiver.give_up(sent)
            sent = _slim(sent)
        self._pending[message_id] = sent

    def look(self, answered: Answered) -> None:
        """See once which late replies have come.

        Args:
            answered: makes the line of a reply in the ledger.
        """
        self._forget()
        if not self._pending:
            return
        replies = self._grid.pull_messages(list(self._pending))
        come = {reply.metadata.reply_to_message_id: reply for reply in replies}
        for message_id in [wanted for wanted in self._pending if wanted in come]:
            sent, reply = self._pending.pop(message_id), come[message_id]
            if reply.has_error() and reply.error.code in _GONE:
                self._in_flight.over(sent.node, sent.number)
                self._give_up(sent)
            else:
                self._take(reply, sent, answered(reply, sent))

    def _applies(self, sent: Prepared) -> bool:
        return self.deadlines.applies and trains(sent.original)

    def _forget(self) -> None:
        """Wait no more for what Flower delivers no reply to, and for what is too old."""
        now = time.time()
        newest = max((sent.round for sent in self._pending.values()), default=0)
        for message_id, sent in list(self._pending.items()):
            metadata = sent.original.metadata
            if metadata.created_at + metadata.ttl < now or newest - sent.round >= _ROUNDS:
                self._in_flight.over(sent.node, sent.number)
                self._give_up(self._pending.pop(message_id))

    def _give_up(self, sent: Prepared) -> None:
        if self._applies(sent):  # else it was, when its round ended
            self._receiver.give_up(sent)

    def _take(self, reply: Message, sent: Prepared, entry: Entry) -> None:
        if not self._applies(sent):
            self._receiver.look(reply, sent, entry)
            if entry.kind == "late":  # a node that was told so while it trained is told again
                self._receiver.give_up(sent)
            return
        received = self._receiver.understand(reply, sent, entry, retried=False)
        if received is None or received.message.has_error():
            self._give_up(sent)
        else:
            self._arrived.append(received)

    def updates(self, present: Prepared, answered: Answered) -> list[Received]:
        """What came late since the last round, as replies to a message of this one.

        Args:
            present: a message of the present round.
            answered: makes the line of a reply in the ledger.
        """
        self.look(answered)
        arrived, self._arrived = self._arrived, []
        taken: list[Received] = []
        for item in arrived:
            rounds = max(1, present.round - item.sent.round)
            weight = staleness_weight(rounds, self.deadlines.late_exponent)
            content = moved(item.message.content, item.sent, present, weight)
            if content is None or rounds > _ROUNDS or not self._receiver.is_update(item):
                self._receiver.late(item, 0.0)
                self._give_up(item.sent)
                continue
            self._receiver.late(item, weight)
            item.message = make_message(item.message.metadata, content)
            taken.append(item)
        return taken


def _slim(sent: Prepared) -> Prepared:
    """What is needed to know from a reply what the node holds, without master weights."""
    empty = make_message(sent.original.metadata, RecordDict())
    return Prepared(
        *(Batch([]), empty, empty),
        versions={key: Version(version.model, {}) for key, version in sent.versions.items()},
        round=sent.round,
        rule=sent.rule,
        tag=sent.tag,
        told=sent.told,
        number=sent.number,
    )


def moved(content: RecordDict, sent: Prepared, now: Prepared, weight: float) -> RecordDict | None:
    """A late reply as one to what nodes are sent now: ``now + weight * (trained - sent)``.

    So a strategy of any kind counts the update, and not the model that it started from. Running
    statistics, which must stay in their range, go that part of the way to what the node has, and
    integers stay what they are.

    Args:
        content: the reply as the strategy would have seen it.
        sent: the message that it answers.
        now: a message of the present round.
        weight: above 0, 1 at most.

    Returns:
        None where the reply is no update of an array record of both messages, or of one that each
        node has of its own.
    """
    made = RecordDict(dict(content))
    for key, record in content.array_records.items():
        before, base = _master(sent, key), _master(now, key)
        if not len(record) or before.keys() != base.keys() or record.keys() != base.keys():
            return None
        if not all(
            item.batch.is_shared(key, item.original.content.array_records[key])
            for item in (sent, now)
        ):
            return None  # a node's own arrays are no change of another's
        made[key] = placed = ArrayRecord()
        for name, array in record.items():
            shape = tuple(array.shape)
            if not shape == tuple(before[name].shape) == tuple(base[name].shape):
                return None
            placed[name] = _moved(name, array, before[name], base[name], weight)
    return made


def _master(sent: Prepared, key: str) -> dict[str, Any]:
    """What a strategy takes a reply to be a change of: arrays, or what reads as one, by name."""
    arrays = dict(sent.original.content.array_records.get(key, ArrayRecord()))
    known = sent.versions[key].master if key in sent.versions else {}
    return {**arrays, **{name: known[name] for name in arrays if name in known}}


def _moved(name: str, array: Array, before: Any, base: Any, weight: float) -> Array:
    if array.stype != NUMPY or np.dtype(array.dtype).kind != "f":
        return base if isinstance(base, Array) else Array(base)
    start, inside = _values(base), is_statistic(name)
    if isinstance(array, LazyArray):
        return array.moved(_values(before), start, weight, inside=inside)
    values = array.numpy()
    change = values - (start if inside else _values(before))
    return Array(np.asarray(start + weight * change, values.dtype))


def _values(array: Any) -> NDArray[Any]:
    found: NDArray[Any] = array.numpy() if isinstance(array, Array) else array
    return found
