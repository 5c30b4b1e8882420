"""Messages on their way to the nodes: records become payloads."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from prunecast.compression.flower import (
    CONTROL_RECORD,
    dense_arrays,
    is_codable,
    payload_record,
    stated_round,
    stream_id,
)
from prunecast.compression.flower.internals import make_message, object_bytes, own_bytes
from prunecast.compression.versions import Instruction, encode_plain, short
from prunecast.server.federation.errors import FederationError
from prunecast.server.federation.publisher import Version
from prunecast.server.federation.streams import Streams

__all__ = ["Batch", "Prepared"]


@dataclass
class Prepared:
    """A message ready to be sent, and what is needed to understand its reply.

    Attributes:
        batch: the batch it was sent in, which knows what its nodes share.
        message: what goes to the node; shares the metadata of `original`.
        original: the message as the strategy built it.
        versions: record key to the version sent under it.
        reuse: record key to short digest, where the node holds the version already.
        dense: record key to the serialised bytes of the dense record.
        kinds: what each array record became.
        dense_bytes: serialised bytes of `original`.
        encode_ms: time spent on payloads that did not exist before.
        round: Flower's ``server-round`` where a config record states it, else version number.
    """

    batch: Batch
    message: Message
    original: Message
    versions: dict[str, Version] = field(default_factory=dict)
    reuse: dict[str, bytes] = field(default_factory=dict)
    dense: dict[str, int] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    dense_bytes: int = 0
    encode_ms: float = 0.0
    round: int = 0

    @property
    def coded(self) -> bool:
        """Whether a client without the mod cannot have understood the message."""
        return any(kind != "verbatim" for kind in self.kinds)


class Batch:
    """Messages that are sent together.

    A content that all messages with a record key share, or that several of them share, becomes a
    version of that key's stream. A content that only one of several nodes receives (a
    personalised model) cannot be shared and goes losslessly, outside the stream.
    """

    def __init__(self, streams: Streams, messages: Iterable[Message]) -> None:
        self._streams = streams
        self._content_ids: dict[int, str] = {}
        self._sizes: dict[int, int] = {}
        self._encoded: set[int] = set()
        self.messages = list(messages)
        counts: dict[str, Counter[str]] = {}
        for message in self.messages:
            for key, record in message.content.array_records.items():
                counts.setdefault(key, Counter())[self._content_id(record)] += 1
        self._shared = {
            key: {c for c, n in counter.items() if n > 1 or len(counter) == 1}
            for key, counter in counts.items()
        }

    def _content_id(self, record: ArrayRecord) -> str:
        # the batch keeps the messages alive, so an id() names one record throughout
        if id(record) not in self._content_ids:
            self._content_ids[id(record)] = record.object_id
        return self._content_ids[id(record)]

    def _size(self, record: ArrayRecord | RecordDict) -> int:
        if id(record) not in self._sizes:
            self._sizes[id(record)] = object_bytes(record)
        return self._sizes[id(record)]

    def prepare(self, original: Message) -> Prepared:
        """Replace the array records of one message by payloads for its node.

        Raises:
            FederationError: the message already has a record under our control key.
            NonFiniteModel: the model holds NaN or infinity.
        """
        if CONTROL_RECORD in original.content:
            raise FederationError(
                f"a message has a record named {CONTROL_RECORD!r}, which Prunecast uses itself: "
                "rename it, or wrap the grid only once"
            )
        node = self._streams.node(original.metadata.dst_node_id)
        content = RecordDict()
        prepared = Prepared(self, original, original, round=stated_round(original.content))
        for key, record in original.content.items():
            if isinstance(record, ArrayRecord):
                content[key] = self._payload(prepared, key, record)
            else:
                content[key] = record
        rule = self._streams.policy.update_rule
        instruction = Instruction(rule, node.accepted, prepared.reuse)
        content[CONTROL_RECORD] = ConfigRecord({"instruction": instruction.to_bytes()})
        prepared.message = make_message(original.metadata, content)
        if not prepared.round and prepared.versions:
            prepared.round = max(v.model.counter for v in prepared.versions.values())
        # the envelope of both messages is the same but for one record key
        prepared.dense_bytes = self._size(original.content) + own_bytes(prepared.message)
        return prepared

    def _payload(self, prepared: Prepared, key: str, record: ArrayRecord) -> ArrayRecord:
        metadata = prepared.original.metadata
        prepared.dense[key] = self._size(record)
        if not is_codable(record):
            prepared.kinds.append("verbatim")
            return record
        if self._content_id(record) not in self._shared[key]:
            started = time.perf_counter()
            data = encode_plain(dense_arrays(record), stream=stream_id(metadata.run_id, key))
            prepared.encode_ms += (time.perf_counter() - started) * 1e3
            prepared.kinds.append("plain")
            return payload_record(data)
        stream = self._streams.stream(metadata.run_id, key)
        started = time.perf_counter()
        version = stream.version_of(record, self._content_id(record))
        held = self._streams.node(metadata.dst_node_id).held.get(key)
        prepared.versions[key] = version
        if held == short(version.model.digest):
            prepared.reuse[key] = held
            prepared.kinds.append("reuse")
            # an empty record holds the place: two objects less than a payload on every message
            return ArrayRecord()
        payload = stream.publisher.payload(version, held)
        prepared.encode_ms += (time.perf_counter() - started) * 1e3
        prepared.kinds.append(payload.kind.name.lower())
        return payload.record
