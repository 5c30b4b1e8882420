"""Where the bytes of a federation's messages go: tensors, headers of payloads, envelopes.

Counted on the messages themselves, as Flower serialises them, and apart from the ledger.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, Message, MessageType
from flwr.clientapp import ClientApp

from prunecast.compression.codec import PayloadCosts
from prunecast.compression.flower import open_coded, stream_id
from prunecast.compression.flower.envelope import unpack
from prunecast.compression.flower.internals import object_bytes
from prunecast.compression.versions import (
    BadPayload,
    Kind,
    PublishedModel,
    decode_model,
    inspect,
    measure_payload,
    short,
)
from prunecast.simulations.runner.inprocess import InProcessGrid

__all__ = ["Account", "AccountedGrid", "Part"]

_VERSIONS = 16  # published models that are kept, to read what builds on them
_MODELS = (Kind.KEYFRAME, Kind.SEEDED, Kind.DELTA)


@dataclass
class Part:
    """The messages of one direction whose payloads are of one kind.

    Attributes:
        messages: how many.
        bytes: of the messages as Flower serialises them, every object once.
        headers: bytes of their payloads that belong to no tensor: frame, tables, checksum.
        tensors: bytes of their payloads by tensor; of arrays in the open, those of the arrays.
    """

    messages: int = 0
    bytes: int = 0
    headers: int = 0
    tensors: Counter[str] = field(default_factory=Counter)

    @property
    def payload(self) -> int:
        """Bytes of the payloads."""
        return self.headers + self.tensors.total()

    @property
    def envelope(self) -> int:
        """Bytes of the messages without their payloads: control, metrics, Flower's own."""
        return self.bytes - self.payload


class Account:
    """Sums over messages; deltas and updates are read against the versions that came before.

    Attributes:
        parts: by direction, "down" or "up", and kind of payload: keyframe, delta, update or plain,
            as in the ledger; ``scheme`` for one of the literature's, ``dense`` for arrays in the
            open, ``none`` for neither; joined by "+" where a message has several records.
        seconds: CPU time that counting took.
    """

    def __init__(self) -> None:
        self.parts: dict[tuple[str, str], Part] = {}
        self.seconds = 0.0
        self._held: dict[bytes, PublishedModel] = {}
        self._last: tuple[bytes, PayloadCosts] | None = None  # shared payloads come in a row

    def add(self, direction: str, message: Message) -> None:
        """Count one message, in the order in which they are sent."""
        started = time.process_time()
        kinds, headers, tensors = [], 0, Counter[str]()
        content = {} if message.has_error() else unpack(message.content)
        for key, record in content.items():
            if not isinstance(record, ArrayRecord) or not len(record):
                continue
            opened = open_coded(record)
            payload, beside = (None, dict(record)) if opened is None else opened
            tensors.update({name: len(array.data) for name, array in beside.items()})
            if payload is None:
                kinds.append("dense")
                continue
            kind, costs = self._costs(payload, stream_id(message.metadata.run_id, key))
            kinds.append(kind)
            if costs is None:
                headers += len(payload)
            else:
                headers += costs.common
                tensors.update({name: cost.nbytes for name, cost in costs.tensors.items()})
        part = self.parts.setdefault((direction, "+".join(kinds) or "none"), Part())
        part.messages += 1
        part.bytes += object_bytes(message)
        part.headers += headers
        part.tensors.update(tensors)
        self.seconds += time.process_time() - started

    def _costs(self, payload: bytes, stream: bytes) -> tuple[str, PayloadCosts | None]:
        try:
            info = inspect(payload)
        except BadPayload:
            return "scheme", None
        if self._last is None or self._last[0] != payload:
            held = self._held.get(info.base)
            self._last = payload, measure_payload(payload, held=held)
            if info.kind in _MODELS:
                self._hold(decode_model(payload, held=held, stream=stream))
        kind = Kind.KEYFRAME if info.kind is Kind.SEEDED else info.kind
        return kind.name.lower(), self._last[1]

    def _hold(self, model: PublishedModel) -> None:
        self._held[short(model.digest)] = model
        if len(self._held) > _VERSIONS:
            del self._held[next(iter(self._held))]

    def rows(self) -> list[dict[str, Any]]:
        """The sums for a JSON file, down before up."""
        return [
            {
                "direction": direction,
                "kind": kind,
                "messages": part.messages,
                "bytes": part.bytes,
                "payload": part.payload,
                "headers": part.headers,
                "envelope": part.envelope,
                "tensors": dict(part.tensors),
            }
            for (direction, kind), part in sorted(self.parts.items())
        ]


class AccountedGrid(InProcessGrid):
    """The grid of a simulation in this process that counts every message but queries.

    Args:
        client_app: the ClientApp of every node.
        num_nodes: number of nodes.

    Attributes:
        account: what was counted.
    """

    def __init__(self, client_app: ClientApp, num_nodes: int) -> None:
        super().__init__(client_app, num_nodes)
        self.account = Account()
        self.on_reply = self._count_reply

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver every message and run its ClientApp at once."""
        batch = list(messages)
        for message in batch:
            if message.metadata.message_type != MessageType.QUERY:
                self.account.add("down", message)
        return super().push_messages(batch)

    def _count_reply(self, reply: Message) -> Message:
        if reply.metadata.message_type != MessageType.QUERY:
            self.account.add("up", reply)
        return reply
