"""Messages on their way to the nodes: how models travel down, and what nodes are told."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from logging import WARNING

from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict

from prunecast.compression.flower import (
    CONTROL_RECORD,
    array_record,
    coded_record,
    dense_arrays,
    float_names,
    put_back,
    set_apart,
    stated_round,
)
from prunecast.compression.flower.envelope import PACKED_RECORD
from prunecast.compression.flower.internals import function_of, log, make_message, own_bytes
from prunecast.compression.flower.secure import is_secure
from prunecast.compression.versions import (
    NOTHING_SENT,
    Instruction,
    LatticeTensor,
    SchemeRule,
    UpdateRule,
    encode_plain,
    short,
)
from prunecast.server.federation.errors import FederationError
from prunecast.server.federation.exchange.batches import Batch, Prepared
from prunecast.server.federation.publishing.budgets import Budget
from prunecast.server.federation.publishing.participation import rule_for, trains
from prunecast.server.federation.publishing.streams import NodeState, Streams
from prunecast.server.federation.publishing.version import Version
from prunecast.server.federation.reporting.notices import uncodable

__all__ = ["Down", "Outbound", "within"]


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
_SECURE_DENSE = (
    "node {} is of the class {!r} of prunecast.classes, which is sent dense arrays and told no "
    "masks: under secure aggregation nodes leave out what is pruned (shared_mask_mod), and its "
    "vector could not be summed with theirs. Take 'dense' out of prunecast.classes, or prune "
    "nothing"
)
_SECURE_WIDTHS = (
    "secure aggregation sums vectors of one length, and prunecast.widths gives nodes slices of "
    "several: set no widths"
)


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
    say_exceeded(budget)


def say_exceeded(budget: Budget) -> None:
    """Warn of limits that were exceeded, of each once."""
    for complaint in budget.take_complaints():
        log(WARNING, "%s", complaint)


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
        prepared.densely = self._streams.node(prepared.node).treatment.dense
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
            training=function_of(metadata.message_type) != MessageType.EVALUATE,
            occasion=batch.occasion,
        )
        node, asks = self._streams.node(metadata.dst_node_id), False
        secure = is_secure(prepared.original.content)
        if secure:
            self._check_secure(version, node, metadata.dst_node_id)
            self.securely = version
        if node.treatment.dense:
            return self._as_dense_version(prepared, key, version, others)
        if self._policy.widths:
            if stream.slices is None:
                raise FederationError(_ONE_MODEL.format(f"{key!r} has none"))
            asks = node.width is None
            version = stream.slice_of(version, node.width or "")
        held, digest = node.held.get(key), short(version.model.digest)
        held = self._streams.in_flight.expected(metadata.dst_node_id).get(key, held)
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
        prepared.versions[key] = version
        prepared.payload_bytes += prepared.dense[key]
        prepared.kinds.append("dense")
        return put_back(version.densely, others) if others else version.densely

    def _check_secure(self, version: Version, node: NodeState, node_id: int) -> None:
        """That what secure aggregation sums can become the next master weights."""
        pruned = self._policy.target or version.model.masks()
        if node.treatment.dense and pruned:
            raise FederationError(_SECURE_DENSE.format(node_id, node.treatment.name))
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
