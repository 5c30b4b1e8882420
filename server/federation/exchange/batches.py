"""Messages that are sent together, and each of them as it is prepared for its node."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from prunecast.compression.flower import CONTROL_RECORD, stated, stream_id
from prunecast.compression.flower.internals import Measured, Record, content_bytes, make_message
from prunecast.compression.versions import TAG_BYTES, Instruction, SchemeRule, UpdateRule, short
from prunecast.server.federation.exchange.replies.lazy import largest_of
from prunecast.server.federation.exchange.replies.overlap import Overlap
from prunecast.server.federation.publishing.version import Version
from prunecast.server.federation.reporting.ledger import Entry

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
        rule: how the node is told to code its reply; None for not at all.
        wanted: the statistics that the node is asked to contribute, by name.
        pruned: key of the record that they are of.
        measured: record key to the record of `message` that other messages hold, too.
        channels: record key to the plan of channels that the node does not know, as it is coded.
        tag: of its reply.
        told: tags of replies that the node is told the end of.
        apart: of array records that do not travel as the policy has it: kind, key and cause.
        entry: its line in the ledger, once it was sent.
        payload_bytes: of the payloads that it brings.
        instruction: what the node is told; None for nothing.
        densely: whether it is as plain Flower sends it, for a node that may have no mod.
        job: whose streams it is of: a name, or Flower's run id.
        number: in the order of all messages that were sent; 0 before.
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
    rule: UpdateRule | SchemeRule | None = None
    wanted: tuple[str, ...] = ()
    pruned: str = ""
    measured: dict[str, Measured] = field(default_factory=dict)
    channels: dict[str, bytes] = field(default_factory=dict)
    tag: str = ""
    told: frozenset[str] = frozenset()
    apart: list[tuple[str, str, str]] = field(default_factory=list)
    entry: Entry | None = None
    payload_bytes: int = 0
    instruction: Instruction | None = None
    densely: bool = False
    job: int | str = 0
    number: int = 0

    @property
    def node(self) -> int:
        """Id of the node that it goes to."""
        return int(self.original.metadata.dst_node_id)

    @property
    def kept(self) -> dict[str, bytes]:
        """Record key to short digest of the versions that the node holds once it has read this."""
        if self.densely:
            return {}
        found = {key: short(version.model.digest) for key, version in self.versions.items()}
        return {
            key: digest for key, digest in found.items() if self.reuse.get(key) in (None, digest)
        }

    def stream_of(self, key: str) -> bytes:
        """Identifier of the stream of one of its records."""
        return stream_id(self.job, key)

    def instruct(self, instruction: Instruction, content: RecordDict) -> None:
        """Tell the node something, in a message of such content."""
        self.instruction, self.rule = instruction, instruction.rule
        control = ConfigRecord({"instruction": instruction.to_bytes()})
        content = RecordDict({**content, CONTROL_RECORD: control})
        self.message = make_message(self.original.metadata, content)

    def bound(self, most: int) -> None:
        """Tell the node how many bytes the payloads of its reply may have; 0 for any."""
        rule = self.rule
        if most and self.instruction is not None and isinstance(rule, UpdateRule) and rule.step:
            told = replace(self.instruction, rule=replace(rule, most=most))
            self.instruct(told, self.message.content)

    @property
    def has_arrays(self) -> bool:
        """Whether there is anything in it to code."""
        return any(map(len, self.original.content.array_records.values()))

    @property
    def coded(self) -> bool:
        """Whether a client without the mod cannot answer it as it is meant."""
        if any(kind not in ("verbatim", "dense") for kind in self.kinds):
            return True
        return isinstance(self.rule, SchemeRule)


class Batch:
    """Messages that are sent together, and which of their records several nodes share.

    A content that all messages with a record key share, or that several of them share, is one
    model for many. A content that only one of several nodes receives is a personalised model.

    Args:
        messages: as the strategy built them; not changed.
        legacy: let arrays state their dtype and shape where Flower's legacy API left them out.

    Attributes:
        occasion: one for all of them.
        overlap: of the replies, where nodes train slices of the model.
        fresh_seconds: after its messages' creation, for how long replies are wanted; 0 for ever.
    """

    def __init__(self, messages: Iterable[Message], *, legacy: bool = True) -> None:
        self._measured: dict[int, Measured] = {}
        self._sizes: dict[int, int] = {}
        self._largest: dict[int, tuple[object, float]] = {}
        self.messages = self._stated(messages) if legacy else list(messages)
        self.occasion = object()  # a round, where messages state none
        self.overlap = Overlap()
        self.fresh_seconds = 0.0
        self._tags: list[str] = []
        self._tagged: Counter[int] = Counter()

    def _stated(self, messages: Iterable[Message]) -> list[Message]:
        made: dict[int, tuple[ArrayRecord, ArrayRecord]] = {}  # what several share, they go on to
        found = []
        for message in messages:
            content = message.content
            for key, record in content.array_records.items():
                given, full = made.setdefault(id(record), (record, stated(record)))
                if full is not given:
                    if content is message.content:
                        content = RecordDict(dict(content))
                    content[key] = full
            same = content is message.content
            found.append(message if same else make_message(message.metadata, content))
        return found

    @cached_property
    def _shared(self) -> dict[str, set[str]]:
        counts: dict[str, Counter[str]] = {}
        for message in self.messages:
            for key, record in message.content.array_records.items():
                counts.setdefault(key, Counter())[self.content_id(record)] += 1
        return {
            key: {c for c, n in counter.items() if n > 1 or len(counter) == 1}
            for key, counter in counts.items()
        }

    def measured(self, record: Record) -> Measured:
        """A record of one of the messages, measured once."""
        # the batch keeps the messages alive, so an id() names one record throughout
        if id(record) not in self._measured:
            self._measured[id(record)] = Measured(record)
        return self._measured[id(record)]

    def size(self, content: RecordDict) -> int:
        """Serialised bytes of the content of one of the messages; most share one."""
        if id(content) not in self._sizes:
            records = {key: self.measured(record) for key, record in content.items()}
            self._sizes[id(content)] = content_bytes(records)
        return self._sizes[id(content)]

    def content_id(self, record: ArrayRecord) -> str:
        """Digest of a record's content."""
        return self.measured(record).object_id

    def tag(self, node_id: int) -> str:
        """Tag of the reply to one more message to a node; all nodes' first have the same one.

        So what nodes are told is the same where they are in the same state, and uploaded once.
        """
        number = self._tagged[node_id]
        self._tagged[node_id] += 1
        if number == len(self._tags):
            self._tags.append(secrets.token_hex(TAG_BYTES))
        return self._tags[number]

    def largest(self, array: NDArray[Any]) -> float:
        """The largest magnitude of an array that the replies have in common, computed once."""
        if id(array) not in self._largest:
            self._largest[id(array)] = array, largest_of(array)
        return self._largest[id(array)][1]

    def is_shared(self, key: str, record: ArrayRecord) -> bool:
        """Whether a record is not a personalised one."""
        return self.content_id(record) in self._shared[key]
