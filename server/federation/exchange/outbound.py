"""Messages on their way to the nodes: how models travel down, and what nodes are told."""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from numpy.typing import NDArray

from prunecast.compression.flower import (
    CONTROL_RECORD,
    array_record,
    coded_record,
    dense_arrays,
    float_names,
    put_back,
    set_apart,
    stated,
    stated_round,
    stream_id,
)
from prunecast.compression.flower.envelope import PACKED_RECORD
from prunecast.compression.flower.internals import (
    Measured,
    Record,
    content_bytes,
    make_message,
    own_bytes,
)
from prunecast.compression.flower.secure import is_secure
from prunecast.compression.versions import (
    NOTHING_SENT,
    TAG_BYTES,
    Instruction,
    LatticeTensor,
    SchemeRule,
    UpdateRule,
    encode_plain,
    short,
)
from prunecast.server.federation.errors import FederationError
from prunecast.server.federation.exchange.lazy import largest_of
from prunecast.server.federation.exchange.overlap import Overlap
from prunecast.server.federation.publishing.budgets import Budget
from prunecast.server.federation.publishing.participation import rule_for, trains
from prunecast.server.federation.publishing.streams import NodeState, Streams
from prunecast.server.federation.publishing.version import Version
from prunecast.server.federation.reporting.ledger import Entry
from prunecast.server.federation.reporting.notices import uncodable

__all__ = ["Batch", "Down", "Outbound", "Prepared", "within"]


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
        densely: whether versions went as plain Flower sends arrays.
        job: whose streams it is of: a name, or Flower's run id.
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


_PERSONAL = (
    "it is of this node alone, so it travels exactly and not as a version; what several nodes are "
    "sent together does"
)
_ONE_MODEL = (
    "prunecast.widths slices the one model that all nodes share, and record {}: send it under one "
    "key, after Run or grid.use_widths(plans) said what each class trains, or set no widths"
)

_NOT_SECURE = (
    "secure aggregation gives the strategy the mean of what nodes made of the published model, and "
    "what rounding to the lattice drops would be lost in every round: wrap the strategy in "
    "prunecast.server.SecureStrategy(strategy, grid), or choose the policy 'lossless'"
)
_SECURE_WIDTHS = (
    "secure aggregation sums vectors of one length, and prunecast.widths gives nodes slices of "
    "several: set no widths"
)


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


Down = Callable[[Prepared, str, ArrayRecord], ArrayRecord]
"""How an array record travels to a node: given what is being prepared, the record's key and the
record, the record that takes its place; notes in what is being prepared what it became."""


def _in_few_digits(norm: float) -> float:
    """A norm that a message states in few bytes, and all machines alike."""
    return float(f"{norm:.4g}")


def within(budget: Budget, prepared: Sequence[Prepared], rate: float) -> None:
    """Tell the nodes of a batch how many bytes their replies may have.

    Args:
        budget: of the run.
        prepared: the messages.
        rate: share of the nodes that train in a round.

    Raises:
        BudgetError: it cannot be met at all.
    """
    for training in (True, False):
        found = [item for item in prepared if trains(item.original) is training]
        if not found:
            continue
        if training:
            budget.begin(found[0].round)
        nodes = [item.original.metadata.dst_node_id for item in found]
        payloads = [item.payload_bytes for item in found]
        plan = budget.plan(nodes, payloads, expected=rate, training=training)
        for item, most in zip(found, plan.most, strict=True):
            item.bound(most)


class Outbound:
    """Prepares messages by a policy.

    Args:
        streams: versions and nodes of the run, with its policy.
        seed: decides, with the number of the message, what is random in replies by a scheme.

    Attributes:
        answered: types of messages that nodes answer with arrays though they are sent none; the
            others need not be told how to code these.
        secure: whether a `SecureStrategy` makes master weights of what secure aggregation sums.
        securely: the version that was sent last to be trained under it.
    """

    def __init__(self, streams: Streams, seed: int) -> None:
        self.answered: set[str] = set()
        self.secure = False
        self.securely: Version | None = None
        self._streams, self._seed, self._count = streams, seed, 0
        self._policy, self._scheme = streams.policy, streams.policy.scheme
        self._down: Down = self._densely if self._policy.down == "dense" else self._by_version

    def prepare(self, batch: Batch, original: Message) -> Prepared:
        """Code the array records of one message for its node.

        Raises:
            FederationError: the message already has a record under a key of ours.
            NonFiniteModel: the model holds NaN or infinity.
        """
        for key in (CONTROL_RECORD, PACKED_RECORD):
            if key in original.content:
                raise FederationError(
                    f"a message has a record named {key!r}, which Prunecast uses itself: "
                    "rename it, or wrap the grid only once"
                )
        job = self._streams.job or original.metadata.run_id
        number = stated_round(original.content)
        prepared = Prepared(batch, original, original, round=number, job=job)
        content = RecordDict()
        for key, record in original.content.items():
            content[key] = record
            if isinstance(record, ArrayRecord):
                prepared.dense[key] = batch.measured(record).nbytes
                content[key] = self._down(prepared, key, record)
        instruction = self._instruction(prepared, self._streams.node(original.metadata.dst_node_id))
        if instruction is not None:
            name, attempt = self._streams.told(original.metadata.run_id)
            instruction = replace(
                instruction,
                channels=prepared.channels,
                job=name,
                attempt=attempt,
                fresh_seconds=self._fresh(batch, original.metadata.dst_node_id),
            )
            if self._streams.ends_with(original.metadata.run_id, prepared.round):
                instruction = replace(instruction, last=True)
            if self._policy.classes:
                node = self._streams.node(original.metadata.dst_node_id)
                instruction = replace(
                    instruction,
                    asks=node.able is None,
                    keeps_version=not node.treatment.keyframes,
                    keeps_residual=node.treatment.residual,
                )
            prepared.instruct(instruction, content)
        elif prepared.densely:
            prepared.message = make_message(original.metadata, content)
        if not prepared.round and prepared.versions:
            prepared.round = max(v.model.counter for v in prepared.versions.values())
        # the envelope of both messages is the same but for one record key
        envelope = make_message(original.metadata, RecordDict())
        prepared.dense_bytes = batch.size(original.content) + own_bytes(envelope)
        return prepared

    def _fresh(self, batch: Batch, node_id: int) -> int:
        """For how long a node is told that its reply is wanted, by its own clock."""
        ahead = self._streams.node(node_id).ahead
        if not batch.fresh_seconds or ahead is None:
            return 0
        return math.ceil(batch.fresh_seconds + ahead)

    def _densely(self, prepared: Prepared, key: str, record: ArrayRecord) -> ArrayRecord:
        """As in plain Flower."""
        prepared.kinds.append("dense")
        prepared.measured[key] = prepared.batch.measured(record)
        return record

    def _by_version(self, prepared: Prepared, key: str, record: ArrayRecord) -> ArrayRecord:
        """A version of a published model: keyframe, delta or reuse, whatever the node holds.

        A personalised model cannot be shared and goes losslessly, outside the stream.
        """
        metadata, batch = prepared.original.metadata, prepared.batch
        known, others = set_apart(record)
        if not len(known):
            prepared.kinds.append("verbatim")
            if len(record):
                prepared.apart.append(("verbatim", key, uncodable(record)))
            return record
        also = "/verbatim" if others else ""
        started = time.perf_counter()
        if not batch.is_shared(key, record):
            if self._policy.widths:
                raise FederationError(_ONE_MODEL.format(f"{key!r} is another one on every node"))
            data = encode_plain(dense_arrays(known), stream=prepared.stream_of(key))
            prepared.encode_ms += (time.perf_counter() - started) * 1e3
            prepared.kinds.append("plain" + also)
            prepared.apart.append(("plain" + also, key, _PERSONAL))
            return coded_record(data, others)
        if others:
            prepared.apart.append(("beside a version", key, uncodable(record)))
        stream = self._streams.stream(metadata.run_id, key)
        version = stream.version_of(
            known,
            batch.content_id(record),
            stated=prepared.round or self._streams.round,
            training=metadata.message_type.partition(".")[0] != MessageType.EVALUATE,
            occasion=batch.occasion,
        )
        node, asks = self._streams.node(metadata.dst_node_id), False
        secure = is_secure(prepared.original.content)
        if secure:
            self._check_secure(version)
            self.securely = version
        if node.treatment.dense:
            return self._as_dense_version(prepared, key, version, others)
        if self._policy.widths:
            if stream.slices is None:
                raise FederationError(_ONE_MODEL.format(f"{key!r} has none"))
            asks = node.width is None
            version = stream.slice_of(version, node.width or "")
        held, digest = node.held.get(key), short(version.model.digest)
        if node.treatment.keyframes:
            held = None
        prepared.versions[key] = version
        if asks:  # by what nobody holds: what it lacks is answered together with its class
            prepared.reuse[key] = short(NOTHING_SENT.digest)
            prepared.kinds.append("ask")
            return ArrayRecord()
        if stream.wanted and not (prepared.wanted or version.width or secure):
            prepared.wanted, prepared.pruned = stream.wanted, key
        # what fails before the mod reads it, such as where there is no function for that type, will
        # again; else the node says that it does not hold the version, and gets it at once
        if held == digest or metadata.message_type in node.unread:
            prepared.reuse[key] = digest
            prepared.kinds.append("reuse" + also)
            # no payload holds the place: two objects less on every message
            return ArrayRecord({f"={name}": array for name, array in others.items()})
        payload = stream.payload(version, held)
        prepared.payload_bytes += len(payload.data)
        if (channels := stream.unknown_channels(version, held)) is not None:
            prepared.channels[key] = channels
        prepared.encode_ms += (time.perf_counter() - started) * 1e3
        prepared.kinds.append(payload.kind.name.lower() + also)
        if others:
            return coded_record(payload.data, others)
        prepared.measured[key] = payload.measured
        return payload.record

    def _as_dense_version(
        self, prepared: Prepared, key: str, version: Version, others: Mapping[str, Array]
    ) -> ArrayRecord:
        """The values of a version as plain Flower sends them, in one record for all who need it."""
        if version.densely is None:
            version.densely = array_record(version.model.arrays())
        prepared.versions[key], prepared.densely = version, True
        prepared.payload_bytes += prepared.dense[key]
        prepared.kinds.append("dense")
        return put_back(version.densely, others) if others else version.densely

    def _check_secure(self, version: Version) -> None:
        """That what secure aggregation sums can become the next master weights."""
        if self._policy.widths:
            raise FederationError(_SECURE_WIDTHS)
        on_lattice = any(isinstance(t, LatticeTensor) for t in version.model.tensors.values())
        if on_lattice and not self.secure:
            raise FederationError(_NOT_SECURE)

    def _update_rule(self, prepared: Prepared) -> UpdateRule:
        """How a node quantises its update, which depends on how often it sends one."""
        metadata, rule = prepared.original.metadata, self._policy.update_rule
        treatment = self._streams.node(metadata.dst_node_id).treatment
        if self._policy.finer_when_rare:
            rule = rule_for(rule, self._streams.participation.gap(metadata.dst_node_id))
        treated = treatment.rule(rule)
        assert isinstance(treated, UpdateRule)
        rule = treated
        if self._policy.lazy and prepared.versions and treatment.residual:
            streams = (self._streams.stream(metadata.run_id, key) for key in prepared.versions)
            least = min(stream.changes.norm for stream in streams)
            rule = replace(rule, lazy=_in_few_digits(self._policy.lazy * least))
        return rule

    def _instruction(self, prepared: Prepared, node: NodeState) -> Instruction | None:
        metadata = prepared.original.metadata
        if node.treatment.dense:
            return None
        if not prepared.has_arrays and metadata.message_type not in self.answered:
            return None
        tags = self._streams.ends_of(node)
        prepared.told = frozenset(tags[0] + tags[1])
        prepared.tag = prepared.batch.tag(metadata.dst_node_id)
        told = *tags, prepared.reuse, prepared.wanted
        if self._policy.up == "lattice":
            return Instruction(self._update_rule(prepared), *told, prepared.tag)
        records = prepared.original.content.array_records.values()
        if self._scheme is not None and any(float_names(record) for record in records):
            label = f"prunecast scheme {self._seed}/{self._count}".encode()
            self._count += 1
            key = int.from_bytes(hashlib.sha256(label).digest()[:8], "little")
            rule = SchemeRule(self._scheme.name, self._scheme.config(), key)
            return Instruction(rule, *told, prepared.tag)
        return Instruction(None, *told) if self._policy.down != "dense" else None
