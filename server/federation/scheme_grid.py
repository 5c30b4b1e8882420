"""`SchemeGrid`: plain Flower whose client updates travel by a scheme of the literature."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from prunecast.compression.codec import Limits
from prunecast.compression.flower import stated_round
from prunecast.compression.flower.internals import make_message
from prunecast.compression.flower.schemes import (
    SCHEME_RECORD,
    SchemeInstruction,
    SchemeReport,
    float_names,
    open_coded,
)
from prunecast.compression.schemes import Scheme, SchemeError
from prunecast.compression.versions import BadPayload, VersionsError, reply_tag
from prunecast.server.federation.inbound import refuse
from prunecast.server.federation.ledger import Direction, Entry, Ledger, serialised_bytes
from prunecast.server.federation.metering import uncached
from prunecast.server.federation.wrapper import PollingGrid

__all__ = ["SchemeGrid"]


@dataclass(frozen=True)
class _Sent:
    """What was sent in one message: what its reply is an update of."""

    node: int
    round: int
    message_type: str
    records: dict[str, ArrayRecord]


class SchemeGrid(PollingGrid):
    """A grid that sends models as plain Flower does and gets updates by a scheme.

    A peer of `CompressedGrid` with the same ledger: messages to nodes are dense, replies carry
    *trained - received* in payloads of the scheme, and strategies see *sent + update*. The clients
    need ``ClientApp(mods=[scheme_mod()])``; a reply that did not pass through it is refused.

    Args:
        grid: the grid to wrap.
        scheme: how updates travel; nodes are told its name and options with every message.
        seed: decides everything random in the replies, with the number of the message.
        ledger: where messages are recorded: a `Ledger`, a path for a JSON Lines file that is
            appended to, or None to count only.
        poll_interval: seconds between looking for replies in `send_and_receive`.
        limits: what is accepted of a reply's payload.
    """

    def __init__(
        self,
        grid: Grid,
        scheme: Scheme,
        *,
        seed: int = 0,
        ledger: Ledger | Path | None = None,
        poll_interval: float = 0.2,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(grid, poll_interval=poll_interval)
        self.scheme = scheme
        self.ledger = Ledger(ledger) if ledger is None or isinstance(ledger, Path) else ledger
        self._seed, self._count = seed, 0
        self._limits = limits
        self._sent: dict[str, _Sent] = {}
        self._accepted: dict[int, str] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages with the scheme's name; returns their ids as the wrapped grid does."""
        self.ledger.flush()
        plain = list(messages)
        batch = [self._instructed(message) for message in plain]
        entries = [
            _entry(_sent(message), "down", message, original)
            for message, original in zip(batch, plain, strict=True)
        ]
        ids = list(self._grid.push_messages(batch))
        pushed = set(ids)
        for message, entry in zip(batch, entries, strict=True):
            if message.metadata.message_id in pushed:
                self._sent[message.metadata.message_id] = _sent(message)
                self.ledger.add(entry)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Fetch the replies that have arrived; their array records are *sent + update*."""
        return [self._receive(reply) for reply in self._grid.pull_messages(message_ids)]

    def _forget(self, message_ids: Iterable[str]) -> None:
        for message_id in message_ids:
            self._sent.pop(message_id, None)

    def _instructed(self, message: Message) -> Message:
        if not any(float_names(record) for record in message.content.array_records.values()):
            return message
        label = f"prunecast scheme {self._seed}/{self._count}".encode()
        self._count += 1
        instruction = SchemeInstruction(
            self.scheme.name,
            self.scheme.config(),
            int.from_bytes(hashlib.sha256(label).digest()[:8], "little"),
            self._accepted.get(message.metadata.dst_node_id, ""),
        )
        content = RecordDict(dict(message.content.items()))
        content[SCHEME_RECORD] = ConfigRecord({"instruction": instruction.to_bytes()})
        return make_message(message.metadata, content)

    # -- replies ------------------------------------------------------------------------------

    def _receive(self, reply: Message) -> Message:
        sent = self._sent.pop(reply.metadata.reply_to_message_id, None)
        if sent is None:
            return reply
        entry = self.ledger.add(_entry(sent, "up", reply, reply))
        if reply.has_error():
            entry.kind = "error"
            return reply
        try:
            content, kinds, report = self._understand(reply, sent, entry)
        except (VersionsError, SchemeError) as error:
            entry.kind = "error"
            return refuse(reply, f"reply of node {sent.node} was refused: {error}")
        entry.kind = "+".join(kinds) or "none"
        result = make_message(reply.metadata, content)
        if report is not None:
            entry.encode_ms = report.encode_ms
            entry.dense_bytes = serialised_bytes(uncached(result))
            if self.scheme.name in kinds:
                self._accepted[sent.node] = reply_tag(reply.metadata.reply_to_message_id)
        return result

    def _understand(
        self, reply: Message, sent: _Sent, entry: Entry
    ) -> tuple[RecordDict, list[str], SchemeReport | None]:
        """What the strategy sees, how each array record travelled, and what the mod says."""
        control = reply.content.config_records.get(SCHEME_RECORD)
        if control is None and sent.records:
            raise BadPayload(
                "it did not pass through scheme_mod(): add it to ClientApp(mods=[...]) on the "
                "clients"
            )
        report = None if control is None else SchemeReport.from_bytes(control.get("report"))
        if report is not None and report.name != self.scheme.name:
            raise BadPayload(f"it is coded by {report.name[:80]!r}, not by {self.scheme.name!r}")
        content, kinds = RecordDict(), []
        for key, record in reply.content.items():
            if key == SCHEME_RECORD:
                continue
            coded = open_coded(record) if isinstance(record, ArrayRecord) else None
            if coded is not None:
                started = time.perf_counter()
                content[key] = self._updated(key, sent.records.get(key), *coded)
                entry.decode_ms += (time.perf_counter() - started) * 1e3
                kinds.append(self.scheme.name)
                continue
            if isinstance(record, ArrayRecord):
                if key in sent.records and list(record) == list(sent.records[key]):
                    raise BadPayload(f"record {key!r} came without the scheme")
                kinds.append("verbatim")
            content[key] = record
        return content, kinds, report

    def _updated(
        self, key: str, base: ArrayRecord | None, payload: bytes, exact: dict[str, Array]
    ) -> ArrayRecord:
        """*Sent + update* for every array that the scheme coded, the others as they came."""
        if base is None:
            raise BadPayload(f"record {key!r} is an update of something that was not sent")
        update = self.scheme.decode(payload, limits=self._limits)
        names = float_names(base)
        shapes = {name: tuple(base[name].shape) for name in names}
        if {n: a.shape for n, a in update.items()} != shapes or list(update) != names:
            raise BadPayload(f"record {key!r}: the update is not of the arrays that were sent")
        others = {n: (a.dtype, tuple(a.shape)) for n, a in base.items() if n not in shapes}
        if {n: (a.dtype, tuple(a.shape)) for n, a in exact.items()} != others:
            raise BadPayload(f"record {key!r}: other arrays came than were sent")
        result = ArrayRecord()
        for name, array in base.items():
            if name not in update:
                result[name] = exact[name]
                continue
            held = array.numpy()
            with np.errstate(over="ignore"):
                value = np.asarray(held + update[name].astype(held.dtype), held.dtype)
            if not np.isfinite(value).all():
                raise BadPayload(f"update of {name!r} makes NaN or infinity")
            result[name] = Array(value)
        return result


def _entry(to: _Sent, direction: Direction, message: Message, dense: Message) -> Entry:
    # on copies, as in `MeteringGrid`
    size = serialised_bytes(uncached(message))
    return Entry(
        round=to.round,
        node=to.node,
        direction=direction,
        kind="dense",
        message_type=to.message_type,
        payload_bytes=size,
        dense_bytes=size if dense is message else serialised_bytes(uncached(dense)),
    )


def _sent(message: Message) -> _Sent:
    metadata, content = message.metadata, message.content
    records = {k: r for k, r in content.array_records.items() if float_names(r)}
    return _Sent(metadata.dst_node_id, stated_round(content), metadata.message_type, records)
