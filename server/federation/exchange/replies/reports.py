"""What nodes say of themselves with replies: what they hold, their class, what they can do."""

from __future__ import annotations

from prunecast.compression.versions import Capabilities, NodeReport, short
from prunecast.server.federation.errors import ReplyRefused
from prunecast.server.federation.exchange.batches import Prepared
from prunecast.server.federation.publishing.classes import class_of, foreign_format, parse_classes
from prunecast.server.federation.publishing.streams import NodeState, Streams
from prunecast.server.federation.reporting.ledger import Entry
from prunecast.server.federation.reporting.notices import Notices

__all__ = ["NodeReports"]


class NodeReports:
    """Learns what nodes say of themselves.

    Args:
        streams: versions and nodes of the run, with its policy.
        notices: told what people should know of it.
    """

    def __init__(self, streams: Streams, notices: Notices) -> None:
        self._streams, self._notices = streams, notices

    def heed(self, report: NodeReport, sent: Prepared, entry: Entry) -> None:
        """Know from now on what a node says of itself.

        Args:
            report: that came with a reply.
            sent: the message that it answers.
            entry: the reply's line in the ledger.

        Raises:
            ReplyRefused: it states a width class that there is none of.
        """
        node = self._streams.node(entry.node)
        node.unread.discard(entry.message_type)
        if report.missing:
            self._streams.in_flight.missed(entry.node)
        if self._streams.in_flight.is_news(entry.node, sent.number):
            # of the versions it was sent alone: a node must not fill this side's memory
            node.held.update({k: v for k, v in report.held.items() if k in sent.versions})
            if report.as_sent:
                node.held.update({k: short(v.model.digest) for k, v in sent.versions.items()})
        self._note_width(node, report.width, sent, entry)
        if report.able is not None:
            self._note_able(node, report.able, sent, entry)
        if not report.unsettled:
            node.knows(sent.told)
        if report.trouble and not node.troubled:
            self._notices.unkept(entry.node, report.trouble)
        node.troubled = bool(report.trouble)
        entry.encode_ms, entry.coarser = report.encode_ms, report.coarser

    def _note_width(self, node: NodeState, stated: str, sent: Prepared, entry: Entry) -> None:
        """Know the class of a node from now on, and whose bytes this exchange was."""
        widths = self._streams.policy.widths
        if not widths:
            return
        if stated and stated not in widths:
            raise ReplyRefused(
                f"it states the width class {stated!r}, and prunecast.widths has "
                f"{', '.join(map(repr, widths))}: name it there, or correct prunecast-width in its "
                "node config"
            )
        node.width = stated
        entry.width = stated
        if sent.entry is not None:
            sent.entry.width = stated

    def _note_able(self, node: NodeState, able: Capabilities, sent: Prepared, entry: Entry) -> None:
        """Know how a node is treated from now on, and whose bytes this exchange was."""
        node.able, node.foreign = able, foreign_format(able)
        node.treatment = class_of(parse_classes(self._streams.policy.classes), able)
        if node.foreign and not node.treatment.dense:
            self._notices.left_out(entry.node, node.foreign)
        entry.capability = node.treatment.name
        if sent.entry is not None:
            sent.entry.capability = node.treatment.name
