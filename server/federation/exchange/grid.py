"""`CompressedGrid`: any Flower strategy, a fraction of the bytes, all of them counted."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from numpy.typing import NDArray

from prunecast.compression.flower import (
    array_record,
    dense_arrays,
    put_back,
    set_apart,
    stated_round,
)
from prunecast.compression.flower.internals import (
    Aggregation,
    Measured,
    aggregation_above,
    content_bytes,
    log,
    objects_in,
    rounds_above,
    serialised_objects,
    set_reply_to,
    uncached,
    unsent,
)
from prunecast.compression.pruning.structure.channels import ChannelChooser, ChannelPlan
from prunecast.compression.versions import MAX_MODEL_BYTES, PublishedModel, UpdateRule
from prunecast.server.federation.errors import CheckpointError, FederationError
from prunecast.server.federation.exchange.deadlines import Attendance, Closing, Deadlines
from prunecast.server.federation.exchange.inbound import up_of
from prunecast.server.federation.exchange.late import LateReplies
from prunecast.server.federation.exchange.outbound import Batch, Outbound, Prepared, within
from prunecast.server.federation.exchange.packing import pack_together
from prunecast.server.federation.exchange.receiving import Received, Receiver, refuse
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.publishing.participation import trains
from prunecast.server.federation.publishing.progress import measured_in
from prunecast.server.federation.publishing.publisher import Streams, Version
from prunecast.server.federation.publishing.widths import Slices
from prunecast.server.federation.reporting.layers import LayerSamples
from prunecast.server.federation.reporting.ledger import Entry, Ledger
from prunecast.server.federation.reporting.notices import Notices, uncodable
from prunecast.server.federation.reporting.wire import Pauses
from prunecast.server.federation.state.checkpoints import Checkpoint
from prunecast.server.federation.state.stream_state import grid_state, know_nodes, put_grid
from prunecast.server.federation.wrapper import GridWrapper

__all__ = ["CompressedGrid", "Recode"]

Recode = Callable[[bytes], int]
"""From the bytes of a message to how many bytes it has under another coding."""

_KEPT = 1000  # entries of a ledger
_POOL_EVERY = 10  # rounds: how many nodes there are changes slowly
_NOT_BY_ITSELF = (
    "prunecast.server.Run does that; a loop of your own calls grid.remove_channels(arrays, plan)."
)


class CompressedGrid(GridWrapper):
    """A Flower grid that prunes, quantises and codes every array record in both directions.

    It wraps the grid Flower hands to the ServerApp; strategies and custom loops use it unchanged::

        strategy.start(grid=CompressedGrid(grid, "balanced"), initial_arrays=arrays)

    Several threads may use it, each with messages of its own, as Flower's legacy server does.

    The clients need ``ClientApp(mods=[compression_mod()])``. With the policy "dense" it changes
    nothing, needs no mod, and records what plain Flower costs.

    Args:
        grid: the grid to wrap.
        policy: a `Policy`, or the name of a preset, such as "balanced" or "small".
        ledger: where messages are recorded: a `Ledger`, a path for a JSON Lines file that is
            appended to, or None for no file. The latest 1000 are kept in memory.
        seed: decides, with the number of the message, everything random in replies by a scheme.
        alternatives: other codings to measure on the very same messages, by name, such as
            ``{"zstd-3": lambda data: len(zstandard.compress(data, 3))}``. Each is given the
            objects of one message, joined.
        verify_replies: decode every reply once on arrival. A damaged reply then becomes an error
            of its own instead of stopping the aggregation it takes part in.
        poll_interval: seconds between looking for replies in `send_and_receive`.
        job: name of what this run of Flower goes on with: nodes keep what they hold from one run
            of a job to its next; "" for a job of this run alone. Two runs of one job at a time
            cost each other what their nodes hold.
        deadlines: when `send_and_receive` returns without every reply, and what becomes of those
            that are late.

    Attributes:
        samples: bytes by tensor of single messages; off, unless it is wanted.
        deadlines: see `use_deadlines`.
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
        self._rounds_checked = False
        self._sent: dict[str, Prepared] = {}
        self._retries: dict[str, str] = {}  # message id of a retry -> id the caller knows
        self._late = LateReplies(self._grid, self._receiver)
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

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Encode and send messages; returns their ids as the wrapped grid does.

        Raises:
            NonFiniteModel: an array to be published holds NaN or infinity; nothing was sent.
        """
        with self._lock:
            return self._push_batch(messages)

    def _push_batch(self, messages: Iterable[Message], fresh: float = 0.0) -> list[str]:
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
        measured = [self._measured(item.message, item.measured) for item in prepared]
        # a list: the HTTP grid goes over the messages twice
        ids = list(self._grid.push_messages([p.message for p in prepared]))
        pushed = set(ids)
        for item, (size, alternatives, objects) in zip(prepared, measured, strict=True):
            metadata = item.message.metadata
            if metadata.message_id not in pushed:
                continue
            self._sent[metadata.message_id] = item
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
                    width=self._streams.node(metadata.dst_node_id).width or "",
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

    def _measured(
        self, message: Message, measured: Mapping[str, Measured] | None = None
    ) -> tuple[int, dict[str, int], int]:
        """Serialised bytes of a message, also under the alternatives, and its objects.

        The message is not touched.

        Args:
            message: the message.
            measured: those of its records that were measured before.
        """
        if self._alternatives or message.has_error():
            objects = serialised_objects(uncached(message))
            joined = b"".join(objects)
            alternatives = {name: recode(joined) for name, recode in self._alternatives.items()}
            return sum(map(len, objects)), alternatives, len(objects)
        known = measured or {}
        records = {key: known.get(key) or Measured(r) for key, r in message.content.items()}
        # besides those of its records, the content and the message
        return content_bytes(records, message), {}, len(objects_in(records.values())) + 2

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
            pushed = self._push_batch(batch, self._late.fresh_seconds(kind))
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
            if present is not None and kind.partition(".")[0] == MessageType.TRAIN:
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
        size, alternatives, objects = self._measured(reply)
        # an error reply made for a dead node names no useful source: the instruction does
        node = self._streams.node(sent.original.metadata.dst_node_id)
        if not reply.has_error():
            node.ahead = max(0.0, reply.metadata.created_at - time.time())
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
                self._receiver.give_up(sent)
            self._retries.pop(message_id, None)

    @property
    def attempt(self) -> int:
        """How often the job was resumed."""
        return self._streams.attempt

    def note_saved(self, *, again: bool = True) -> None:
        """A checkpoint of the present state is on the disk.

        Args:
            again: whether others follow: nodes are then told that their replies were accepted once
                there is a checkpoint which has it, so that a run that is resumed from one trains
                the round after it again as it was.
        """
        self._streams.saves = again
        self._streams.saved()

    def use_job(self, job: str) -> None:
        """Be of a job, see `CompressedGrid`; before the first message.

        Raises:
            FederationError: there was one, or it is no name.
        """
        self._streams.use_job(job)

    @property
    def job(self) -> str:
        """Name of the job; the run's id where it has none."""
        return self._streams.job or str(self.run.run_id)

    def _leave(self, message_ids: Iterable[str]) -> None:
        """End a round without the replies to messages; what still comes of them is looked at."""
        retries = {origin: retry for retry, origin in self._retries.items()}
        for origin in message_ids:
            message_id = retries.get(origin, origin)
            self._retries.pop(message_id, None)
            if (sent := self._sent.pop(message_id, None)) is not None:
                self._late.leave(message_id, sent)

    def begin_round(self, number: int) -> None:
        """State the round of messages that state none themselves; schedules of pruning follow it.

        Flower's strategies state it, as ``server-round`` in a config record; a loop of one's own
        may do either. Without both, every batch of messages with new weights counts as a round.

        Args:
            number: 1 for the first.
        """
        self._streams.round = number

    # -- secure aggregation ------------------------------------------------------------------------

    def allow_secure_aggregation(self) -> None:
        """Say that a `SecureStrategy` makes master weights of what is summed."""
        self._outbound.secure = True

    @property
    def securely_trained(self) -> Version | None:
        """The version that nodes were sent last to train under secure aggregation."""
        return self._outbound.securely

    # -- the published model ------------------------------------------------------------------

    def published(self, arrays: ArrayRecord, *, key: str = "arrays") -> PublishedModel:
        """The version that nodes get when `arrays` is sent under `key`, published if need be.

        Args:
            arrays: master weights as the strategy holds them.
            key: key of the record in the strategy's messages.

        Raises:
            NonFiniteModel: an array holds NaN or infinity.
            FederationError: models travel densely, so that no version is published.
        """
        if self.policy.down == "dense":
            raise FederationError(
                "nothing is published where models travel densely: choose a policy with "
                "down = 'lattice'"
            )
        stream = self._streams.stream(self.run.run_id, key)
        return stream.version_of(set_apart(arrays)[0], arrays.object_id).model

    def catching_up(self, arrays: ArrayRecord, *, key: str = "arrays") -> dict[str, Any]:
        """Bytes that a node would be sent now, to hold the model of `arrays`; nothing is sent.

        Args:
            arrays: master weights as the strategy holds them.
            key: key of the record in the strategy's messages.

        Returns:
            ``whole``: of a node that holds nothing; ``missed``: of one that holds an earlier
            version, by how many versions ago. Of the array record alone, without its message.
        """
        if self.policy.down == "dense":
            return {"whole": Measured(arrays).nbytes, "missed": {}}
        stream = self._streams.stream(self.run.run_id, key)
        known = set_apart(arrays)[0]
        version = stream.version_of(known, arrays.object_id)
        earlier = stream.earlier(version)
        asked = {1, min(5, len(earlier)), len(earlier)} if earlier else set()
        return {
            "whole": stream.payload(version, None).measured.nbytes,
            "missed": {
                str(back): stream.payload(version, earlier[back - 1]).measured.nbytes
                for back in sorted(asked)
            },
        }

    def draw_initial(
        self,
        like: ArrayRecord,
        seed: int,
        *,
        key: str = "arrays",
        max_model_bytes: int = MAX_MODEL_BYTES,
    ) -> ArrayRecord:
        """Draw a from-scratch model from a seed, so that its first keyframe is a few bytes.

        Args:
            like: a freshly initialised model; layout, means and spreads are taken from it, its
                values are not.
            seed: 0 to 2**64 - 1; the same seed draws the same model on every machine.
            key: key of the record in the strategy's messages.
            max_model_bytes: what nodes have as `compression_mod(max_model_bytes=...)`; a larger
                model travels whole.

        Returns:
            The arrays to give to the strategy as `initial_arrays`.

        Raises:
            FederationError: the stream has published a version already.
        """
        stream = self._streams.stream(self.run.run_id, key)
        known, others = set_apart(like)
        drawn = stream.draw(dense_arrays(known), seed, max_model_bytes)
        return put_back(array_record(drawn), others)

    def checkpoint(self, arrays: ArrayRecord, *, key: str = "arrays") -> Checkpoint:
        """What a later run needs to go on from these master weights; see `Checkpoint.save`."""
        stream = self._streams.stream(self.run.run_id, key)
        known, others = set_apart(arrays)
        if others:
            self._notices.unsaved(key, uncodable(arrays))
        master = stream.master_of(arrays.object_id)
        if master is None:
            master = stream.as_published(stream.narrowed(dense_arrays(known)))
        widths = {} if stream.slices is None else stream.slices.statistics
        tried = tuple(stream.tried.values())
        contents = {key: arrays.object_id}
        state = {
            "arrays": arrays,
            "grid": grid_state(self._streams, self._outbound, self.run.run_id, contents),
        }
        position = stream.position
        return Checkpoint(dict(master), *position, key, stream.channels, widths, tried, state)

    def channels(self, *, key: str = "arrays") -> ChannelPlan | None:
        """Which channels remain of the module that everybody's code makes; None for all.

        Narrow such a module by it before arrays of the model are loaded, with `fit_module` of
        `prunecast.compression.pruning.structure.narrowing`.
        """
        if self.policy.down != "lattice":
            return None
        return self._streams.stream(self.run.run_id, key).channels

    def try_channels(self, choose: ChannelChooser, *, key: str = "arrays") -> None:
        """Say which channels go, where automatic pruning tries how many; before the first message.

        On trial they are zero in what is published; the master keeps them.

        Raises:
            FederationError: the record is not pruned.
        """
        stream = self._streams.stream(self.run.run_id, key)
        if stream.pruner.plan is None:
            raise FederationError(
                f"channels of record {key!r} cannot be tried: name it in prunecast.pruning-records"
            )
        stream.choose = choose

    def settled_channels(self, *, key: str = "arrays") -> ChannelPlan | None:
        """What automatic pruning has found to be dispensable, to be given to `remove_channels`.

        None while it searches, and once they are gone.
        """
        return self._streams.stream(self.run.run_id, key).settled

    def remove_channels(
        self, arrays: ArrayRecord, plan: ChannelPlan, *, key: str = "arrays"
    ) -> ArrayRecord:
        """Go on without the channels that a plan removes: call it between two rounds.

        Nodes are sent the plan with the next version, narrow by it what they hold, and their
        ClientApp finds it by `current_channels`. A strategy's own state is not reached from here:
        `Run` narrows it.

        Args:
            arrays: master weights as the strategy holds them.
            plan: made of these, such as by `prunecast.compression.pruning.structure.narrowing`.
            key: key of the record in the strategy's messages.

        Returns:
            What remains of the arrays, to go on from.

        Raises:
            PlanError: the plan is of another model; nothing was changed.
            FederationError: models do not travel as versions, or channels of another record have
                gone: a ClientApp is told one plan.
        """
        if self.policy.widths:
            raise FederationError("prunecast.widths slices a model that keeps all of its channels")
        if self.policy.down != "lattice":
            raise FederationError("channels are removed where models travel as versions: set "
                                  "prunecast.down = 'lattice'")  # fmt: skip
        other = self._streams.narrowed_beside(self.run.run_id, key)
        if other is not None:
            raise FederationError(
                f"channels of record {other!r} have gone, and nodes are told one plan: those of "
                f"{key!r} stay"
            )
        known, others = set_apart(arrays)
        others = {at: a for at, a in others.items() if not plan.loses(at.partition("=")[2])}
        narrow = plan.arrays(dense_arrays(known))
        plan.check({name: array.shape for name, array in known.items()})
        self._streams.stream(self.run.run_id, key).remove(plan)
        return put_back(array_record(narrow), others)

    def use_widths(self, plans: Mapping[str, ChannelPlan], *, key: str = "arrays") -> None:
        """Say which slice of the model each class of nodes trains; call before the first message.

        A node states its class by ``prunecast-width`` in its node config; one that states none
        trains the whole model. `Run` calls this with what `widths.leading_slices` chooses.

        Args:
            plans: of every class that the policy names, which channels of the whole model remain.
            key: key of the record in the strategy's messages.

        Raises:
            PlanError: a slice is not contained in the wider ones.
            FederationError: these are not the policy's classes.
        """
        if plans.keys() != self.policy.widths.keys():
            raise FederationError(
                f"slices of {', '.join(map(repr, plans)) or 'no class'} were given, and "
                f"prunecast.widths has {', '.join(map(repr, self.policy.widths)) or 'none'}"
            )
        stream = self._streams.stream(self.run.run_id, key)
        stream.slices = Slices(plans, stream.new_history)

    def sliced(
        self, arrays: ArrayRecord, width: str, *, key: str = "arrays"
    ) -> tuple[PublishedModel, ChannelPlan]:
        """What nodes of a class get when `arrays` is sent under `key`, and its channels.

        Raises:
            NonFiniteModel: an array holds NaN or infinity.
            FederationError: there is no such class.
        """
        stream = self._streams.stream(self.run.run_id, key)
        if stream.slices is None or width not in stream.slices.plans:
            raise FederationError(f"prunecast.widths has no class {width!r}")
        version = stream.version_of(set_apart(arrays)[0], arrays.object_id)
        return stream.slice_of(version, width).model, stream.slices.plans[width]

    def nodes_of(self, width: str) -> int:
        """How many nodes said that they are of a class; "" for those that state none."""
        return self._streams.nodes_of(width)

    def holds(self, node_id: int, *, key: str = "arrays") -> tuple[int | None, str]:
        """Which version a node last said it holds under a key.

        Returns:
            Its number, None once it is too old for deltas, and its digest's first bytes in
            hexadecimal, "" for no version.
        """
        digest = self._streams.node(node_id).held.get(key, b"")
        model = self._streams.held(digest) if digest else None
        return None if model is None else model.counter, digest.hex()

    def prunes_further(self, arrays: ArrayRecord, *, key: str = "arrays") -> bool:
        """Whether a pruning event takes weights from the version of `arrays`, published if need be.

        Only of the latest version; arguments and errors as of `published`.
        """
        self.published(arrays, key=key)
        return self._streams.stream(self.run.run_id, key).pruner.pruned

    def restate(
        self, arrays: ArrayRecord, statistics: Mapping[str, NDArray[Any]], *, key: str = "arrays"
    ) -> ArrayRecord:
        """Publish the latest version again with other running statistics of its normalisation.

        Args:
            arrays: master weights that it was published from.
            statistics: name to array in the shape and dtype of the tensor.
            key: key of the record in the strategy's messages.

        Returns:
            The arrays to go on from.
        """
        changed = ArrayRecord(
            {n: Array(statistics[n]) if n in statistics else a for n, a in arrays.items()}
        )
        self.published(arrays, key=key)
        stream = self._streams.stream(self.run.run_id, key)
        stream.restate(arrays.object_id, statistics, changed.object_id)
        return changed

    def expect_rounds(self, rounds: int) -> None:
        """Say how many rounds there will be, those before a resume included.

        The bounds of pruning follow from it. Flower's strategies are asked by themselves; a loop
        of one's own says it before the first message.
        """
        self._rounds_checked = True
        self._streams.expect(rounds)

    def note_metrics(self, metrics: Mapping[str, Any], *, key: str = "arrays") -> None:
        """Tell automatic pruning what the server measured of the last version, held out.

        Args:
            metrics: name to number; those whose name ends as `pruning_metric` says count.
            key: key of the record in the strategy's messages.
        """
        if self.policy.down == "lattice":
            stream = self._streams.stream(self.run.run_id, key)
            for value in measured_in(metrics, self.policy.pruning_metric):
                stream.pruner.measured.add(value, held_out=True)

    def pruned(self, *, key: str = "arrays") -> list[dict[str, Any]]:
        """What pruning did to the versions published since this was asked before.

        Returns:
            For every version whose masks an event changed, and every level that a search chose: the
            fields of the run's event ``pruning`` (docs/run.md).
        """
        if self.policy.down == "dense":
            return []
        return self._streams.stream(self.run.run_id, key).pruner.take_events()

    def budget(self) -> dict[str, Any] | None:
        """What the round may cost and has cost, see docs/run.md; None without a budget."""
        budget = self._streams.budget
        return None if budget is None else budget.report(self.policy.down_step)

    def mask_cost(self, *, key: str = "arrays") -> dict[str, float]:
        """What making masks took so far: ``seconds``, ``peak_bytes``, and how often (``made``)."""
        cost = self._streams.stream(self.run.run_id, key).mask_cost
        return {"seconds": cost.seconds, "peak_bytes": cost.peak_bytes, "made": cost.made}

    def resume(self, checkpoint: Checkpoint) -> ArrayRecord:
        """Continue a stream from a checkpoint; call before the first message.

        Returns:
            The master weights, to be given to the strategy as `initial_arrays`.

        Raises:
            CheckpointError: its search for a sparsity is of other knobs than the policy's.
        """
        self._rounds_checked = True  # the schedule goes on, and does not begin
        job = None if checkpoint.state is None else checkpoint.state["grid"]["job"]
        if checkpoint.state is not None and job == self._streams.job:
            know_nodes(self._streams, self.run.run_id, checkpoint.state["grid"])
        stream = self._streams.stream(self.run.run_id, checkpoint.key)
        at = checkpoint.counter, checkpoint.steps, checkpoint.clock
        try:
            stream.resume(
                *at,
                checkpoint.progress,
                checkpoint.masks,
                checkpoint.searched,
                checkpoint.channels,
                checkpoint.tried,
            )
            if stream.slices is not None:
                stream.slices.resume(checkpoint.widths, checkpoint.arrays)
        except ValueError as error:
            raise CheckpointError(
                f"the checkpoint does not fit the policy ({error}): go on with the policy of the "
                "run that wrote it"
            ) from error
        return array_record(checkpoint.arrays)

    def go_on(self, checkpoint: Checkpoint) -> ArrayRecord:
        """Be just where the grid was that a checkpoint is of; call before the first message.

        Nothing is published anew, as by `resume`: the next message carries the version that nodes
        were sent last, or would have been.

        Returns:
            The arrays that the strategy had then.

        Raises:
            CheckpointError: the checkpoint says too little for that, or is of another policy.
        """
        self._rounds_checked = True
        try:
            if checkpoint.state is None:
                raise ValueError("it has the weights alone")
            arrays: ArrayRecord = checkpoint.state["arrays"]
            contents = {checkpoint.key: arrays.object_id}
            state = checkpoint.state["grid"]
            put_grid(self._streams, self._outbound, self.run.run_id, state, contents)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint cannot be gone on from: {error}") from error
        return arrays

    def evaluate_published(
        self,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None],
        *,
        key: str = "arrays",
    ) -> Callable[[int, ArrayRecord], MetricRecord | None]:
        """Wrap a strategy's `evaluate_fn` so that it measures the published model.

        Flower hands `evaluate_fn` the master weights, which no client and no device ever runs.
        Where models travel densely they are what clients run, and are measured.
        """
        if self.policy.down == "dense":
            return evaluate_fn

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            dense = array_record(self.published(arrays, key=key).arrays())
            return evaluate_fn(server_round, put_back(dense, set_apart(arrays)[1]))

        return evaluate
