"""`compression_mod`: the client's half of the compressed grid."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from logging import ERROR, WARNING
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from numpy.typing import NDArray

from prunecast.client.training.by_scheme import encode_clipped, scheme_input
from prunecast.client.training.capabilities import capabilities
from prunecast.client.training.encoding import Coded, align, compress_reply
from prunecast.client.training.housekeeping import default_root
from prunecast.client.training.sparing import MOST_COARSER, coarser_rule, fitted, unsent
from prunecast.client.training.store import (
    ModError,
    NodeStore,
    NonFiniteUpdate,
    StoreError,
    plan_of,
)
from prunecast.compression.codec import CodecError, NonFiniteError, TensorSpec
from prunecast.compression.flower import (
    CONTROL_RECORD,
    ERROR_CODE,
    ERROR_REASON,
    STATISTICS_RECORD,
    array_record,
    coded_record,
    is_codable_array,
    native,
    open_coded,
    payload_record,
    put_back,
    stated,
    stated_clip,
    stream_id,
)
from prunecast.compression.flower.chains import decode_chain
from prunecast.compression.flower.envelope import is_packed, pack, unpack
from prunecast.compression.flower.internals import (
    ClientAppCallable,
    ErrorCode,
    Mod,
    adds_noise,
    log,
    make_message,
)
from prunecast.compression.flower.secure import SECURE_RECORD, is_secure, narrowed
from prunecast.compression.pruning.growing import strongest
from prunecast.compression.pruning.masks import holding
from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.statistics import (
    GROWTH,
    VOTES,
    Statistics,
    asked,
    pack_statistics,
)
from prunecast.compression.pruning.structure.channels import ChannelPlan, holding_channels
from prunecast.compression.schemes import StateError
from prunecast.compression.schemes.interface import Scheme
from prunecast.compression.schemes.layout import layout_of, state_arrays, state_from
from prunecast.compression.schemes.registry import scheme
from prunecast.compression.versions import (
    MAX_MODEL_BYTES,
    NOTHING_SENT,
    BadPayload,
    BaseMissing,
    Capabilities,
    Instruction,
    Kind,
    LatticeTensor,
    NodeReport,
    PublishedModel,
    SchemeRule,
    TooLarge,
    UpdateRule,
    VersionsError,
    allowed_beside,
    decode_model,
    describe,
    encode_update,
    inspect,
    model_limits,
    open_plain,
    short,
)

__all__ = ["compression_mod"]

_TEACHER = "prunecast-teacher "  # before the key of the record whose dense version it was
_MOST_PLANS = 64  # of channels, in a message
_LONGEST = 10_000  # characters of the reason of an error


def compression_mod(
    store: Path | str | None = None,
    *,
    max_model_bytes: int | None = None,
    store_quota: int | None = None,
    teacher: bool | None = None,
    noised_feedback: bool = False,
) -> Mod:
    """A Flower mod that decodes what `CompressedGrid` sends and encodes the reply.

    Put it first, outside mods that look at arrays::

        app = ClientApp(mods=[compression_mod()])

    Files of a node go by its id; by ``prunecast-node`` of its config, a number that no other node
    of this machine has, where Flower gives it another id whenever it starts.

    A node whose config has ``prunecast-width`` says so to the server, which may then send it a
    slice of the model, see docs/pruning.md.

    How arrays come and go is the server's choice, told with every message. With a server that does
    not compress, messages pass through unchanged, so the same client serves both.

    Args:
        store: directory for held models and residuals. Default: ``prunecast-store`` of the node
            config, else ``$PRUNECAST_STORE``, else ``prunecast/nodes`` in the user's cache
            directory. Simulations that span machines need one that all of them see.
        max_model_bytes: of the largest model that this node may take.
        store_quota: most bytes that all jobs and nodes of this machine may keep in the store, or
            ``prunecast-store-quota`` of the node config; default: any number. Jobs used longest
            ago make room, and never the one whose message is handled; where that alone needs more,
            the update is sent all the same, and nothing is kept for the next one.
        teacher: keep the last dense version on disk once the model is pruned, for
            `current_teacher()`; None: where the run config has `distillation` above 0.
        noised_feedback: also where Flower's `LocalDpMod` stands behind, add what quantisation
            dropped of a noised reply to the next one. Off, as what a node sends in one round is
            then made of several.

    A message that arrives after the server's deadline is not trained on, so that a slow node
    catches up; the model that came with it is kept.

    An exception of the ClientApp, or of a mod inside, is logged and reported to the server together
    with what the node holds; strategies see Flower's error reply.

    So is a message that this node refuses: a payload is damaged, of another run, or of a newer
    format; and a reply that is not sent, as training produced NaN or infinity.

    Raises (while handling a message, reported to the server by Flower):
        ModError: the message is none of the compressed grid's.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        with ExitStack() as stack:
            return handled(message, context, call_next, stack)

    def handled(
        message: Message, context: Context, call_next: ClientAppCallable, stack: ExitStack
    ) -> Message:
        if not is_packed(message.content) and CONTROL_RECORD not in message.content.config_records:
            if any(map(open_coded, message.content.array_records.values())):
                raise ModError(
                    "arrays came as the server coded them, and without what it says of them: "
                    "another mod in front of this one changed the message. Put compression_mod() "
                    "first in ClientApp(mods=[...])"
                )
            return call_next(message, context)
        root = Path(store or str(context.node_config.get("prunecast-store", "")) or default_root())
        try:
            message = make_message(message.metadata, unpack(message.content))
            control = message.content.config_records.get(CONTROL_RECORD) or ConfigRecord()
            stated = control.get("instruction")
            if stated is None:
                raise BadPayload("its control record has no instruction")
        except (VersionsError, CodecError) as error:
            raise ModError(f"message from the server was refused: {error}") from error
        node: NodeStore | None = None
        try:
            instruction = Instruction.from_bytes(stated)
            most = _bytes_of("max_model_bytes", max_model_bytes, context) or MAX_MODEL_BYTES
            quota = _bytes_of("store_quota", store_quota, context)
            job = instruction.job or message.metadata.run_id
            node = NodeStore(root, job, _number(context), quota=quota)
            stack.callback(node.close)
            node.note_end(last=instruction.last)
            able = capabilities(root, context.node_config) if instruction.asks else None
            exchange = _Exchange(
                *(message, instruction, node, most),
                able=able,
                keeps_teacher=_distils(context) if teacher is None else teacher,
                noised=adds_noise(call_next),
                feeds_back=noised_feedback,
                width=str(context.node_config.get("prunecast-width", "")),
            )
        except (ModError, VersionsError, CodecError, PlanError) as error:
            return _refusal(message, node, capabilities(root, context.node_config), error)
        if exchange.missing or exchange.stale:
            return Message(pack(exchange.wrap(RecordDict())), reply_to=message)
        try:
            with (
                holding_channels(exchange.channels()),
                holding(
                    exchange.masks(), tuple(asked(instruction.statistics)), exchange.teacher
                ) as statistics,
            ):
                reply = call_next(make_message(message.metadata, exchange.content), context)
            if not isinstance(reply, Message):
                raise TypeError(f"the app returned {type(reply).__name__}, which is no Message")
            if not reply.has_error():
                coded = exchange.encode(reply.content, statistics)
                return make_message(reply.metadata, pack(coded))
            failure = reply.error
        except Exception as raised:
            # Flower would make the error reply, in which there is no place for what this node holds
            log(ERROR, "ClientApp raised an exception", exc_info=raised)
            failure = _raised(raised)
        return Message(pack(exchange.failed(failure)), reply_to=message)

    return mod


def _refusal(
    message: Message, store: NodeStore | None, able: Capabilities, error: Exception
) -> Message:
    """An error reply that says what this node holds of the records that it was sent.

    Where the instruction could not be read, it says nothing of that, and the server goes by what it
    knows; but what this node is able to read.
    """
    text = f"message from the server was refused: {error}"
    if isinstance(error, TooLarge):
        text += (
            ": set compression_mod(max_model_bytes=...), or prunecast-max-model-bytes in the node "
            "config, to the bytes of the largest model that this node may take"
        )
    refused = error if isinstance(error, ModError) else ModError(text)
    log(ERROR, "%s", refused)
    held: dict[str, bytes] = {}
    if store is not None:
        found = {key: store.held(key) for key in message.content.array_records}
        held = {key: short(model.digest) for key, model in found.items() if model is not None}
    report = NodeReport(held, able=able if store is None else None)
    content = RecordDict({CONTROL_RECORD: ConfigRecord({"report": report.to_bytes()})})
    return Message(pack(_with_error(content, _raised(refused))), reply_to=message)


def _raised(error: Exception) -> Error:
    """What Flower makes of an exception of a ClientApp."""
    return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error)}:<'{error}'>")


def _with_error(content: RecordDict, error: Error) -> RecordDict:
    """The content of a reply, with an error in whose place the server puts an error reply."""
    control = content.config_records[CONTROL_RECORD]
    control[ERROR_CODE], control[ERROR_REASON] = error.code, (error.reason or "")[:_LONGEST]
    return content


def _bytes_of(name: str, stated: int | None, context: Context) -> int | None:
    """A limit, of the code or else of the node config; None for neither."""
    key = f"prunecast-{name.replace('_', '-')}"
    most = context.node_config.get(key) if stated is None else stated
    if most is None:
        return None
    if not isinstance(most, int) or isinstance(most, bool) or most <= 0:
        raise ModError(f"{name} ({key}) is {most!r}: give a positive number of bytes")
    return most


def _number(context: Context) -> int:
    """What the node's files go by: Flower's id of it, or its own where that is another each time.

    Raises:
        ModError: its own is no number.
    """
    number = context.node_config.get("prunecast-node", context.node_id)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ModError(f"prunecast-node in the node config is {number!r}: give a whole number")
    return number


def _distils(context: Context) -> bool:
    share = context.run_config.get("distillation", 0.0)
    return isinstance(share, int | float) and share > 0


class _Exchange:
    """One message and its reply."""

    def __init__(
        self,
        message: Message,
        instruction: Instruction,
        store: NodeStore,
        most: int,
        *,
        keeps_teacher: bool = False,
        noised: bool = False,
        feeds_back: bool = False,
        width: str = "",
        able: Capabilities | None = None,
    ) -> None:
        self._able = able
        self._metadata, self._most, self._width = message.metadata, most, width
        self._keeps_teacher = keeps_teacher
        self._instruction = instruction
        self._store = store
        rule = instruction.rule
        self._scheme = scheme(rule.name, **rule.options) if isinstance(rule, SchemeRule) else None
        self._models: dict[str, PublishedModel] = {}
        self._channels = self._plans(message.content)
        self.missing: list[str] = []
        # by this node's clock: where that is wrong, the server asks again
        fresh = instruction.fresh_seconds
        self.stale = bool(fresh) and time.time() > message.metadata.created_at + fresh
        self.content = RecordDict()
        self._reply = RecordDict()
        self._unkept: dict[str, PublishedModel | None] = {}  # what is held in a version's stead
        self._trouble, self._unsettled = "", False
        try:
            store.settle(instruction.accepted, instruction.given_up)
            store.go_on(instruction.attempt)
        except StoreError as error:  # nothing is lost: the server says it again
            self._in_trouble(error)
            self._unsettled = True
        self._coarser = 0
        for key, record in message.content.items():
            if key == CONTROL_RECORD:
                continue
            coded = open_coded(record) if isinstance(record, ArrayRecord) else None
            if key in instruction.reuse:
                beside = record if isinstance(record, ArrayRecord) else ArrayRecord()
                others = {name[1:]: array for name, array in beside.items()}
                self.content[key] = self._whole(self._reuse(key, instruction.reuse[key]), others)
            elif coded is not None:
                self.content[key] = self._whole(self._decode(key, coded[0]), coded[1])
            else:
                self.content[key] = record
        self._clip, self._secure = stated_clip(self.content), is_secure(self.content)
        # what a node says of its data beside a reply is neither clipped, noised nor summed
        self._reticent = noised or self._secure or self._clip is not None
        self._feeds_back = self._clip is None and (feeds_back or not noised)
        # measured now: what the app does to the records later is its own affair
        records = self.content.array_records.values()
        self._received = sum(len(a.data) for record in records for a in record.values())
        self._arrived = {k: ArrayRecord(dict(r)) for k, r in self.content.array_records.items()}

    def _plans(self, records: RecordDict) -> dict[str, ChannelPlan]:
        """Plans of the records that came; those of others are left unread."""
        coded = {k: plan for k, plan in self._instruction.channels.items() if k in records}
        if len(coded) > _MOST_PLANS:
            raise BadPayload(f"plans of channels for {len(coded)} records, above {_MOST_PLANS}")
        return {key: ChannelPlan.from_bytes(plan, self._most) for key, plan in coded.items()}

    @staticmethod
    def _whole(known: ArrayRecord, others: Mapping[str, Array]) -> ArrayRecord:
        try:
            return put_back(known, others) if others else known
        except ValueError as error:
            raise BadPayload("arrays beside a payload do not say where they belong") from error

    def _stream(self, key: str) -> bytes:
        return stream_id(self._instruction.job or self._metadata.run_id, key)

    def _reuse(self, key: str, digest: bytes) -> ArrayRecord:
        held, _ = self._held(key)
        if held is None or short(held.digest) != digest:
            return self._miss(key, held)
        self._models[key] = held
        return array_record(held.arrays())

    def _held(self, key: str) -> tuple[PublishedModel | None, PublishedModel | None]:
        """The version on disk, and what a payload builds on: its part, once channels have gone.

        None for the latter where the node is to have channels that it does not hold, as its class
        is another now.
        """
        (held, text), plan = self._store.version(key), self._channels.get(key)
        if held is None or text == ("" if plan is None else plan.to_text()):
            return held, held
        before = plan_of(text)
        if plan is not None:
            try:
                return held, plan.since(before).narrow(held)
            except PlanError:
                return held, None
        if before is not None:
            self._channels[key] = before
        return held, held

    def _decode(self, key: str, payload: bytes) -> ArrayRecord:
        info = inspect(payload)
        if info.kind is Kind.PLAIN:
            limits = model_limits(self._most, info.size)
            return array_record(open_plain(payload, stream=self._stream(key), limits=limits))
        stored, held = self._held(key)
        known = 0 if held is None else sum(spec.nbytes for spec in held.specs.values())
        limits = model_limits(max(known, self._most), info.size)
        try:
            decode = decode_chain if info.kind is Kind.SCHEME else decode_model
            model = decode(payload, held=held, stream=self._stream(key), limits=limits)
        except BaseMissing:
            if held is None or short(held.digest) != info.digest:
                return self._miss(key, stored)
            model = held  # the server does not know that its last reply was lost on the way
        self._models[key] = held if held is not None and held.digest == model.digest else model
        if not self._instruction.keeps_version:
            self._store.drop(key, versions=True)
            self._unkept[key] = None
        elif stored is not self._models[key]:
            try:
                if stored is not None and self._is_teacher(stored, model, key):
                    self._store.keep(_TEACHER + key, stored)
                self._store.keep(key, model, self._channels.get(key))
            except StoreError as error:
                self._in_trouble(error)
                self._unkept[key] = stored
        return array_record(model.arrays())

    def _miss(self, key: str, held: PublishedModel | None) -> ArrayRecord:
        """Note that a record cannot be had, and what there is instead."""
        self.missing.append(key)
        self._unkept[key] = held
        return ArrayRecord()

    def masks(self) -> dict[str, NDArray[np.bool_]]:
        """Masks of all received models together."""
        return {
            name: mask for model in self._models.values() for name, mask in model.masks().items()
        }

    def _is_teacher(self, held: PublishedModel, model: PublishedModel, key: str) -> bool:
        """Whether the version held is the last dense one before a pruned one."""
        pruned = key in self._channels or _is_pruned(model)
        if not (self._keeps_teacher and pruned) or _is_pruned(held):
            return False
        return self._store.channels(key) is None

    def teacher(self) -> dict[str, NDArray[Any]] | None:
        """The last dense version before the received one was pruned, as far as it was kept."""
        for key, model in self._models.items():
            if self._keeps_teacher and (key in self._channels or _is_pruned(model)):
                held = self._store.held(_TEACHER + key)
                return None if held is None else held.arrays()
        return None

    def channels(self) -> ChannelPlan | None:
        """Which channels remain of the received model; None for all."""
        return next((plan for key, plan in self._channels.items() if key in self._models), None)

    def _in_trouble(self, error: StoreError) -> None:
        """Go on without what cannot be kept: training is worth more than the bytes it saves."""
        log(WARNING, "The reply is sent, but nothing was kept for the next one: %s", error)
        self._trouble = str(error)

    def wrap(self, content: RecordDict, encode_ms: float = 0.0) -> RecordDict:
        """Add the report of what this node holds."""
        kept = {**self._models, **self._unkept} if self._unkept else {}
        held = {key: short(model.digest) for key, model in kept.items() if model is not None}
        missing, as_sent = tuple(self.missing), not self._unkept
        report = NodeReport(
            *(held, missing, encode_ms, self._trouble, as_sent, self._width),
            unsettled=self._unsettled,
            stale=self.stale,
            able=self._able,
            coarser=self._coarser,
        )
        content[CONTROL_RECORD] = ConfigRecord({"report": report.to_bytes()})
        return content

    def failed(self, error: Error) -> RecordDict:
        """An error, and what this node holds."""
        return _with_error(self.wrap(RecordDict()), error)

    def encode(self, reply: RecordDict, statistics: Statistics) -> RecordDict:
        """The reply's array records as the server asked for them, everything else as it is.

        Statistics that were contributed are added in a record of their own.
        """
        started = time.perf_counter()
        self._reply, content = reply, RecordDict()
        for key, record in reply.items():
            try:
                coded = record
                if isinstance(record, ArrayRecord):
                    coded = self._coded(key, stated(record))
                elif key == SECURE_RECORD and isinstance(record, ConfigRecord):
                    coded = narrowed(record)
            except NonFiniteError as error:
                raise NonFiniteUpdate(f"the update was not sent: {error}") from error
            except CodecError as error:
                raise ModError(f"the update was not sent: {error}") from error
            content[key] = coded
        found = self._thinned(statistics)
        if found and not self._reticent:
            content[STATISTICS_RECORD] = payload_record(pack_statistics(found))
        return self.wrap(content, (time.perf_counter() - started) * 1e3)

    def _thinned(self, statistics: Statistics) -> dict[str, Mapping[str, NDArray[Any]]]:
        """Statistics without the weights that the server did not ask for."""
        shares = asked(self._instruction.statistics)
        found = dict(statistics)
        for name in {GROWTH, VOTES} & found.keys():
            found[name] = strongest(name, found[name], self.masks(), shares[name])
        return {name: arrays for name, arrays in found.items() if arrays}

    def _coded(self, key: str, record: ArrayRecord) -> ArrayRecord:
        rule = self._instruction.rule
        if self._scheme is not None:
            return self._by_scheme(self._scheme, key, record)
        if isinstance(rule, UpdateRule) and any(map(is_codable_array, record.values())):
            return self._on_lattice(key, record, rule)
        return record

    def _on_lattice(self, key: str, record: ArrayRecord, rule: UpdateRule) -> ArrayRecord:
        """The record against the version received that it answers, or against nothing."""
        arrays = _known(record)
        base_key = self._base_for(key, arrays, {k: m.specs for k, m in self._models.items()})
        base = NOTHING_SENT if base_key is None else self._models[base_key]
        if not self._instruction.keeps_residual:
            rule = replace(rule, error_feedback=False, lazy=0.0)
            self._store.drop(key, residuals=True)
        if not self._models:
            rule = replace(rule, step=0.0)  # an answer to a query, a personal model
        plan = self._channels.get(base_key or key)
        feeds_back = rule.error_feedback and self._feeds_back
        rule = replace(rule, error_feedback=feeds_back, lazy=rule.lazy * feeds_back)
        residual = self._residual(key, plan) if feeds_back else {}

        def coded_as(coded: Coded) -> bytes:
            stream = self._stream(base_key or key)
            return encode_update(base, coded.changes, stream=stream, tensors=coded.tensors)

        def encoded(rule: UpdateRule, left: Mapping[str, NDArray[Any]]) -> tuple[Coded, bytes]:
            coded = compress_reply(base, arrays, left, rule, clip=self._clip)
            return coded, coded_as(coded)

        def kept_back(below: float) -> bytes | None:
            """The payload that says "no change", where the residual could keep all of it."""
            if base_key is None or not feeds_back or residual is None:
                return None
            coded = unsent(base, arrays, residual, below)
            staged = coded is not None and self._stage(key, coded.dropped, plan)
            return coded_as(coded) if coded is not None and staged else None

        if rule.lazy and (payload := kept_back(rule.lazy)) is not None:
            return coded_record(payload, {})
        most = self._share_of(key, rule.most)
        found = fitted(lambda rule: encoded(rule, residual or {}), rule, most)
        if found is None and (payload := kept_back(math.inf)) is not None:
            self._coarser = MOST_COARSER
            return coded_record(payload, {})
        quarters = MOST_COARSER if found is None else found[2]
        self._coarser, rule = max(self._coarser, quarters), coarser_rule(rule, quarters)
        coded, payload = encoded(rule, residual or {}) if found is None else found[:2]
        sent = self._received if base_key is None else sum(s.nbytes for s in base.specs.values())
        if sum(coded.unlike.values()) > allowed_beside(sent, len(payload)):
            # so many zeros that the server would not believe so few bytes
            arrays.update(dict.fromkeys(coded.unlike))
            coded, payload = encoded(rule, residual or {})
        stages = coded.dropped and residual is not None
        if stages and not self._stage(key, coded.dropped, plan):
            # the residual stays where it is, for a reply that can tell what it leaves
            _, payload = encoded(rule, {})
        return coded_record(payload, {n: record[n] for n, a in arrays.items() if a is None})

    def _share_of(self, key: str, most: int) -> int:
        """Of the bytes that all payloads of the reply may have, those of one record; 0 for any."""
        records = self._reply.array_records
        sizes = {k: sum(len(a.data) for a in record.values()) for k, record in records.items()}
        return most and max(1, most * sizes[key] // max(1, sum(sizes.values())))

    def _residual(self, key: str, plan: ChannelPlan | None) -> dict[str, NDArray[Any]] | None:
        """What updates of a record have dropped, of the channels that remain.

        None where the store is in trouble: a reply goes without it then, and stages nothing, so
        that what is there stays; and where nothing is to be kept.
        """
        if not self._instruction.keeps_residual:
            self._store.drop(key, residuals=True)
            return None
        try:
            if plan is not None:
                self._store.remove(key, plan)
            return self._store.residual(key)
        except StoreError as error:
            self._in_trouble(error)
            return None

    def _stage(
        self, key: str, dropped: Mapping[str, NDArray[Any]], plan: ChannelPlan | None
    ) -> bool:
        """Whether what a reply drops could be written."""
        try:
            self._store.stage(key, self._instruction.tag, dropped, plan)
        except StoreError as error:
            self._in_trouble(error)
            return False
        return True

    def _by_scheme(self, chosen: Scheme, key: str, record: ArrayRecord) -> ArrayRecord:
        """*Reply - received*, or the reply itself, by a scheme, as far as it has what came."""
        arrays, received = _known(record), {k: _known(r) for k, r in self._arrived.items()}
        base_key = self._base_for(key, arrays, {k: _specs(r) for k, r in received.items()})
        if base_key is None:
            return record
        clip, rule = self._clip, self._instruction.rule
        found = scheme_input(arrays, received[base_key], clipped=clip is not None)
        if not found.arrays:
            return record
        assert isinstance(rule, SchemeRule)
        fresh = chosen.init(layout_of(found.arrays))
        if clip is not None:
            payload = encode_clipped(chosen, found.arrays, fresh, clip, rule.key)
        elif not self._feeds_back:
            payload, _ = chosen.encode(found.arrays, fresh, key=rule.key)
        else:
            kept = " ".join((f"{key} by {chosen.name}", *found.own))
            plan, state = self._channels.get(base_key), fresh
            residual = self._residual(kept, plan)
            with suppress(StateError):  # nothing was kept yet, or of another model
                state = state_from(residual or {}, state)
            payload, after = chosen.encode(found.arrays, state, key=rule.key)
            if residual is not None and not self._stage(kept, state_arrays(after), plan):
                payload, _ = chosen.encode(found.arrays, fresh, key=rule.key)
        if not (found.usual and base_key == key):
            payload = describe(base_key, found.heads, _specs(received[base_key])) + payload
        return coded_record(payload, {n: a for n, a in record.items() if n not in found.arrays})

    def _base_for(
        self,
        key: str,
        arrays: Mapping[str, NDArray[Any] | None],
        received: Mapping[str, Mapping[str, TensorSpec]],
    ) -> str | None:
        """Which of the records received a reply's record answers; None for none.

        That under its key; else the only one that has most of its arrays, if nothing else in the
        reply answers that. What comes beside a model in its layout is no update of it.
        """
        if key in received:
            return key
        replied = self._reply.array_records
        found = [
            candidate
            for candidate, specs in received.items()
            if candidate not in replied
            and _resembles(arrays, specs)
            and sum(len(specs.keys() & r.keys()) * 2 > len(r) for r in replied.values()) < 2
        ]
        return found[0] if len(found) == 1 else None


def _is_pruned(model: PublishedModel) -> bool:
    return any(isinstance(t, LatticeTensor) and t.pruned for t in model.tensors.values())


def _known(record: ArrayRecord) -> dict[str, NDArray[Any] | None]:
    """The arrays of a record; None for what the codec does not know."""
    return {n: native(array) if is_codable_array(array) else None for n, array in record.items()}


def _specs(arrays: Mapping[str, NDArray[Any] | None]) -> dict[str, TensorSpec]:
    return {n: TensorSpec(a.dtype, a.shape) for n, a in arrays.items() if a is not None}


def _resembles(arrays: Mapping[str, NDArray[Any] | None], specs: Mapping[str, TensorSpec]) -> bool:
    """Whether most of a record's arrays have name and shape of those received."""
    tensors = align(arrays, specs).values()
    return 2 * sum(tensor.like is not None for tensor in tensors) > len(tensors)
