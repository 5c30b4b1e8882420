"""Replies as they arrive: understood, held to what was sent and to each other, then taken."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from flwr.app import ConfigRecord, Error, Message, RecordDict

from prunecast.compression.codec import CodecError
from prunecast.compression.flower import (
    CONTROL_RECORD,
    ERROR_CODE,
    ERROR_REASON,
    STATISTICS_RECORD,
    STYPE,
    node_reason,
    open_coded,
    payload_of,
)
from prunecast.compression.flower.envelope import is_packed, unpack
from prunecast.compression.flower.internals import (
    Aggregation,
    ErrorCode,
    Measured,
    WatchedReply,
    content_bytes,
    make_message,
    unwatched,
    watched,
)
from prunecast.compression.versions import NodeReport, UpdateRule, VersionsError
from prunecast.server.federation.errors import ReplyRefused
from prunecast.server.federation.exchange.batches import Prepared
from prunecast.server.federation.exchange.replies.apart import note_apart
from prunecast.server.federation.exchange.replies.checks import EXAMPLES, check_reply, misfits
from prunecast.server.federation.exchange.replies.inbound import Up, decode_reply
from prunecast.server.federation.exchange.replies.lazy import LazyArray
from prunecast.server.federation.exchange.replies.overlap import Overlap
from prunecast.server.federation.exchange.replies.reports import NodeReports
from prunecast.server.federation.publishing.masks.progress import measured_in
from prunecast.server.federation.publishing.participation import trains
from prunecast.server.federation.publishing.publisher import Publisher
from prunecast.server.federation.publishing.streams import Streams
from prunecast.server.federation.publishing.version import Version
from prunecast.server.federation.reporting.ledger import Entry
from prunecast.server.federation.reporting.notices import Notices

__all__ = ["Received", "Receiver", "refuse"]

_IN_THE_APP = (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.LOAD_CLIENT_APP_EXCEPTION)
_LONGEST = 500  # characters of a reason that came from outside
_NO_MOD = (
    "answered without Prunecast's mod, so it cannot have read the published model: add "
    "compression_mod() to ClientApp(mods=[...]) on the clients"
)
_PACKED = (
    "the arrays travel inside one record, which only compression_mod() opens: add it to "
    "ClientApp(mods=[...]) on the clients, as the first"
)
_ORDER = (
    "a mod in front of it, or a client without it, met arrays that only compression_mod() reads: "
    "put it first in ClientApp(mods=[...])"
)


@dataclass
class Received:
    """A reply that arrived.

    Attributes:
        message: as the strategy sees it.
        sent: the message that it answers.
        entry: its line in the ledger.
        update: whether it staged something.
        payload_bytes: of its payloads.
        statistics: what the node contributes to pruning; None for nothing.
        part: its content as it came, of a node that trains a slice of the model or might.
        late: whether its round had ended when it came.
    """

    message: Message
    sent: Prepared
    entry: Entry
    update: bool = False
    payload_bytes: int = 0
    statistics: bytes | None = None
    part: RecordDict | None = None
    late: bool = False


class Receiver:
    """Makes of replies what strategies see.

    Args:
        streams: versions and nodes of the run, with its policy.
        up: how array records come back.
        notices: told what was refused, and what failed on nodes.
        verify: decode every reply once on arrival.
    """

    def __init__(self, streams: Streams, up: Up, notices: Notices, *, verify: bool) -> None:
        self._streams, self._up, self._notices, self._verify = streams, up, notices, verify
        self._reports = NodeReports(streams, notices)

    def understand(
        self, reply: Message, sent: Prepared, entry: Entry, *, retried: bool
    ) -> Received | None:
        """A reply as it came to the strategy's view; None when the node needs a keyframe first.

        Args:
            reply: as it arrived.
            sent: the message that it answers.
            entry: its line in the ledger, of the kind "error" so far.
            retried: whether the node was sent a keyframe for this message already.
        """
        received = Received(reply, sent, entry)
        if reply.has_error():
            if reply.error.code in _IN_THE_APP:
                self._streams.node(entry.node).unread.add(entry.message_type)
            self._failed(received)
            return received
        try:
            if self._open(received, retried=retried):
                return received
        except (VersionsError, CodecError, ReplyRefused) as error:
            self._refuse(received, str(error))
            return received
        return None

    def take(self, received: Sequence[Received], aggregation: Aggregation | None) -> None:
        """Accept replies, but for those that do not fit the others.

        Args:
            received: replies to messages that were sent together.
            aggregation: what Flower makes of them; None where that shows later, if at all.
        """
        taken = [item for item in received if not item.message.has_error()]
        policy = self._streams.policy
        if policy.down == policy.up == "dense":
            pass
        elif aggregation is None:
            self._watch(taken)
        else:
            odd = misfits([(item.message.content, item.sent) for item in taken], aggregation)
            for index, reason in odd.items():
                self._refuse(taken[index], reason)
        for item in taken:
            if not item.message.has_error() and not item.late:  # what is old says nothing of now
                self._count(item)
        if policy.widths:
            self._overlap(
                [item for item in taken if not item.message.has_error()],
                EXAMPLES if aggregation is None else aggregation.weight,
            )
        for item in received:
            if item.message.has_error():
                self.give_up(item.sent)
            elif item.update and self._verify:
                self._streams.node(item.entry.node).settled(item.sent.tag, accepted=True)
            elif item.update:
                self._accept_when_decoded(item)

    def _overlap(self, taken: Sequence[Received], weight: str) -> None:
        """Let replies to slices be whole ones by what they have in common, weighted by a metric."""
        sliced: dict[tuple[int, str], tuple[Overlap, Version, Publisher]] = {}
        for item in taken:
            if item.part is None:
                continue
            overlap = item.sent.batch.overlap
            records = item.part.metric_records.values()
            stated = next((r[weight] for r in records if weight in r), 1.0)
            number = float(stated) if isinstance(stated, int | float) else 1.0
            key, version = next(iter(item.sent.versions.items()))
            overlap.join(item.sent.message.metadata.message_id, item.part, version, number)
            if version.width:
                stream = self._streams.stream(item.message.metadata.run_id, key)
                sliced[id(overlap), version.width] = overlap, version, stream
        for overlap, version, stream in sliced.values():
            if stream.slices is not None:
                found = overlap.statistics(version)
                stream.slices.statistics.setdefault(version.width, {}).update(found)

    def _watch(self, taken: Sequence[Received]) -> None:
        """Hold replies to each other if and when Flower's own aggregation is given them."""
        members: list[tuple[weakref.ref[WatchedReply], Received]] = []

        def told(aggregation: Aggregation, given: Sequence[Message] | None) -> None:
            found = [(reply, item) for ref, item in members if (reply := ref()) is not None]
            if given is not None:
                wanted = set(map(id, given))
                found = [(reply, item) for reply, item in found if id(reply) in wanted]
            for reply, _ in found:
                unwatched(reply)
            left = [(reply, item) for reply, item in found if not reply.has_error()]
            odd = misfits([(reply.content, item.sent) for reply, item in left], aggregation)
            for index, reason in odd.items():
                reply, item = left[index]
                item = replace(item, message=reply)
                self._refuse(item, reason)
                reply.fail(item.message.error)
                self.give_up(item.sent)

        for item in taken:
            reply = watched(item.message, told)
            members.append((weakref.ref(reply), replace(item, message=refuse(item.message, ""))))
            item.message = reply

    def _accept_when_decoded(self, item: Received) -> None:
        records = item.message.content.array_records.values()
        left = {id(a): a for r in records for a in r.values() if isinstance(a, LazyArray)}

        def decoded(key: int) -> None:
            if left.pop(key, None) is not None and not left:
                self._streams.node(item.entry.node).settled(item.sent.tag, accepted=True)

        for key, array in list(left.items()):
            array.when_formed(partial(decoded, key))

    def give_up(self, sent: Prepared) -> None:
        """The reply to a message moves nothing: let the node take back what it sent along."""
        sent.batch.overlap.leave(sent.message.metadata.message_id)
        if sent.rule is not None:
            node = self._streams.node(sent.original.metadata.dst_node_id)
            node.settled(sent.tag, accepted=False)

    def _open(self, received: Received, *, retried: bool) -> bool:
        """Decode a reply into what the strategy sees; whether the node could read the message."""
        reply, sent, entry = received.message, received.sent, received.entry
        node = self._streams.node(entry.node)
        if is_packed(reply.content):
            reply = make_message(reply.metadata, unpack(reply.content))
            records = {key: Measured(record) for key, record in reply.content.items()}
            entry.dense_bytes = content_bytes(records, reply)
        control = reply.content.config_records.get(CONTROL_RECORD)
        # none: the reply did not pass through the mod
        report = None if control is None else NodeReport.from_bytes(control.get("report"))
        if report is None and sent.coded:
            raise ReplyRefused(f"it {_NO_MOD}")
        if report is not None and control is not None:
            self._reports.heed(report, sent, entry)
            if report.able is not None and node.treatment.dense and node.foreign and not retried:
                entry.reason = node.foreign
                return False
            missing = [key for key in report.missing if key in sent.versions]
            for key in missing:
                if retried or key not in report.held:
                    node.held.pop(key, None)
            if missing and not retried:
                entry.kind = "base-missing"
                return False
            if missing:
                raise ReplyRefused(
                    f"it cannot keep the base of {missing[0]!r}: check that its store directory is "
                    "writable and belongs to it alone"
                )
            if report.stale:
                entry.kind = "stale"
                if not retried:  # its clock is wrong: the reply is wanted
                    return False
                raise ReplyRefused("it did not train though no deadline was stated")
            if ERROR_REASON in control:
                received.message = make_message(reply.metadata, error=_error_in(control))
                self._failed(received)
                return True
        coded = (open_coded(record) for record in reply.content.array_records.values())
        received.payload_bytes = sum(len(found[0]) for found in coded if found is not None)
        entry.most = sent.rule.most if isinstance(sent.rule, UpdateRule) else 0
        content, received.update = decode_reply(reply, sent, entry, self._up)
        kind, entry.kind = entry.kind, "error"
        check_reply(content, sent, self._streams.policy, values=self._verify)
        entry.kind = kind
        note_apart(reply, sent, entry, self._streams.policy.scheme, self._notices)
        if sent.wanted:
            received.statistics = payload_of(reply.content.get(STATISTICS_RECORD))
        if self._streams.policy.widths and sent.versions and content.array_records:
            received.part = content
            version = next(iter(sent.versions.values()))
            if version.width:
                content = sent.batch.overlap.whole(content, version, entry)
        received.message = make_message(reply.metadata, content)
        return True

    def look(self, reply: Message, sent: Prepared, entry: Entry) -> None:
        """Learn from a reply that nobody waits for what the node holds; the rest is left unread."""
        received, control, report = Received(reply, sent, entry), None, None
        if reply.has_error():
            self._failed(received)
            return
        try:
            control = unpack(reply.content).config_records.get(CONTROL_RECORD)
            if control is not None:
                report = NodeReport.from_bytes(control.get("report"))
                self._reports.heed(report, sent, entry)
        except (VersionsError, ReplyRefused) as error:
            entry.reason = str(error)[:_LONGEST]
            return
        if control is not None and ERROR_REASON in control:
            received.message = make_message(reply.metadata, error=_error_in(control))
            self._failed(received)
            return
        entry.kind = "late"
        self._notices.late(entry.node, 0.0)
        if report is not None:
            entry.kind = "stale" if report.stale else "late"
            for key in report.missing:
                if key not in report.held:
                    self._streams.node(entry.node).held.pop(key, None)

    def late(self, item: Received, weight: float) -> None:
        """Say of an update that came after its round what it counts; 0 for nothing."""
        item.late = True
        self._notices.late(item.entry.node, weight)

    def is_update(self, item: Received) -> bool:
        """Whether a reply's arrays are those that were sent, trained, and surely no gradients."""
        scheme = self._streams.policy.scheme
        trained = ["update", "update/verbatim", "lazy", "dense"]
        trained += [] if scheme is None else [scheme.name]
        return all(kind in trained for kind in item.entry.kind.split("+"))

    def _count(self, item: Received) -> None:
        """Add what a node contributes to pruning: statistics, and the metric it measured."""
        sent, metadata = item.sent, item.message.metadata
        records = item.message.content.metric_records.values()
        stated = [record.get(EXAMPLES) for record in records]
        weight = next((n for n in stated if isinstance(n, int | float)), 1.0)
        held_out = not trains(item.message)
        ending = self._streams.policy.pruning_metric
        for value in (value for record in records for value in measured_in(record, ending)):
            for key in (key for key, version in sent.versions.items() if not version.width):
                stream = self._streams.stream(metadata.run_id, key)
                stream.pruner.measured.add(value, weight, held_out=held_out)
        if item.statistics is None:
            return
        shapes = {n: t.shape for n, t in sent.versions[sent.pruned].model.tensors.items()}
        mean = self._streams.stream(metadata.run_id, sent.pruned).pruner.statistics
        try:
            mean.add(item.statistics, sent.wanted, shapes, weight)
        except (VersionsError, CodecError) as error:
            self._refuse(item, str(error))

    def _failed(self, received: Received) -> None:
        """Say once why a node failed: its own words come first."""
        entry, reason = received.entry, str(received.message.error.reason)
        entry.kind, entry.reason = "error", node_reason(reason)[:_LONGEST]
        remedy = _ORDER if STYPE in reason else ""
        packed = is_packed(received.sent.message.content)
        if packed and any(
            f"KeyError: '{key}'" in entry.reason for key in received.sent.original.content
        ):
            remedy = _PACKED
            error = Error(received.message.error.code, f"{entry.reason} ({remedy})")
            received.message = make_message(received.message.metadata, error=error)
        self._notices.failed(entry.node, entry.reason, remedy)

    def _refuse(self, received: Received, reason: str) -> None:
        entry = received.entry
        entry.kind, entry.reason = "error", reason[:_LONGEST]
        self._notices.failed(entry.node, f"its reply was refused: {entry.reason}")
        told = f"reply of node {entry.node} was refused: {reason}"
        received.message = refuse(received.message, told)


def refuse(reply: Message, reason: str) -> Message:
    """The reply turned into an error, so that strategies skip it and log why."""
    error = Error(code=ErrorCode.MOD_FAILED_PRECONDITION, reason=reason)
    return make_message(reply.metadata, error=error)


def _error_in(control: ConfigRecord) -> Error:
    """The error that a node reports together with what it holds."""
    code, reason = control.get(ERROR_CODE), control.get(ERROR_REASON)
    if not isinstance(code, int) or code == 0:
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    return Error(code, str(reason))
