"""A message as it came to a node: what it brings, and what the node holds for it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from logging import WARNING
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from prunecast.client.training.store import NodeStore, StoreError, plan_of
from prunecast.compression.flower import (
    CONTROL_RECORD,
    array_record,
    open_coded,
    put_back,
    stated_clip,
    stream_id,
)
from prunecast.compression.flower.chains import decode_chain
from prunecast.compression.flower.internals import log
from prunecast.compression.flower.secure import is_secure
from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.schemes.registry import scheme
from prunecast.compression.versions import (
    BadPayload,
    BaseMissing,
    Capabilities,
    Instruction,
    Kind,
    LatticeTensor,
    NodeReport,
    PublishedModel,
    SchemeRule,
    decode_model,
    inspect,
    model_limits,
    open_plain,
    short,
)

__all__ = ["Incoming"]

_TEACHER = "prunecast-teacher "  # before the key of the record whose dense version it was
_MOST_PLANS = 64  # of channels, in a message


class Incoming:
    """One message of the compressed grid, decoded by what this node keeps.

    Args:
        message: as it came, unpacked.
        instruction: that came with it.
        store: of the node's files.
        most: bytes of the largest model that this node may take.
        keeps_teacher: keep the last dense version on disk once the model is pruned.
        noised: whether noise is added to the reply.
        feeds_back: let what quantisation drops of a noised reply go into the next one, too.
        width: the class that the node states; "" for none.
        able: what the node says of itself; None where it was not asked.

    Attributes:
        content: as the app is given it.
        missing: keys of records that cannot be had, as their base is gone.
        stale: whether the server's deadline is over.
        models: record key to the version received.
        plans: record key to which channels remain of the module's.
        arrived: the records as they were given to the app.
        received_bytes: of these.
        clip: what the server said of clipping; None for nothing.
        reticent: whether nothing is said of the node's data beside the reply.
        feeds_back: whether what quantisation drops goes into the next reply.
        scheme: that replies travel by; None for none.
        coarser: quarters of a doubling by which the reply is coarser than its rule.

    Raises:
        VersionsError, CodecError, PlanError: the message is damaged, or another server's.
    """

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
        self.instruction = instruction
        self.store = store
        rule = instruction.rule
        self.scheme = scheme(rule.name, **rule.options) if isinstance(rule, SchemeRule) else None
        self.models: dict[str, PublishedModel] = {}
        self.plans = self._plans(message.content)
        self.missing: list[str] = []
        # by this node's clock: where that is wrong, the server asks again
        fresh = instruction.fresh_seconds
        self.stale = bool(fresh) and time.time() > message.metadata.created_at + fresh
        self.content = RecordDict()
        self._unkept: dict[str, PublishedModel | None] = {}  # what is held in a version's stead
        self._trouble, self._unsettled = "", False
        try:
            store.go_on(instruction.attempt, instruction.accepted, instruction.given_up)
        except StoreError as error:  # nothing is lost: the server says it again
            self.in_trouble(error)
            self._unsettled = True
        self.coarser = 0
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
        self.clip, secure = stated_clip(self.content), is_secure(self.content)
        # what a node says of its data beside a reply is neither clipped, noised nor summed
        self.reticent = noised or secure or self.clip is not None
        self.feeds_back = self.clip is None and (feeds_back or not noised)
        # measured now: what the app does to the records later is its own affair
        records = self.content.array_records.values()
        self.received_bytes = sum(len(a.data) for record in records for a in record.values())
        self.arrived = {k: ArrayRecord(dict(r)) for k, r in self.content.array_records.items()}

    def _plans(self, records: RecordDict) -> dict[str, ChannelPlan]:
        """Plans of the records that came; those of others are left unread."""
        coded = {k: plan for k, plan in self.instruction.channels.items() if k in records}
        if len(coded) > _MOST_PLANS:
            raise BadPayload(f"plans of channels for {len(coded)} records, above {_MOST_PLANS}")
        return {key: ChannelPlan.from_bytes(plan, self._most) for key, plan in coded.items()}

    @staticmethod
    def _whole(known: ArrayRecord, others: Mapping[str, Array]) -> ArrayRecord:
        try:
            return put_back(known, others) if others else known
        except ValueError as error:
            raise BadPayload("arrays beside a payload do not say where they belong") from error

    def stream(self, key: str) -> bytes:
        """Identifier of the stream of one of its records."""
        return stream_id(self.instruction.job or self._metadata.run_id, key)

    def _reuse(self, key: str, digest: bytes) -> ArrayRecord:
        held, _ = self._held(key)
        if held is None or short(held.digest) != digest:
            return self._miss(key, held)
        self.models[key] = held
        return array_record(held.arrays())

    def _held(self, key: str) -> tuple[PublishedModel | None, PublishedModel | None]:
        """The version on disk, and what a payload builds on: its part, once channels have gone.

        None for the latter where the node is to have channels that it does not hold, as its class
        is another now.
        """
        (held, text), plan = self.store.version(key), self.plans.get(key)
        if held is None or text == ("" if plan is None else plan.to_text()):
            return held, held
        before = plan_of(text)
        if plan is not None:
            try:
                return held, plan.since(before).narrow(held)
            except PlanError:
                return held, None
        if before is not None:
            self.plans[key] = before
        return held, held

    def _decode(self, key: str, payload: bytes) -> ArrayRecord:
        info = inspect(payload)
        if info.kind is Kind.PLAIN:
            limits = model_limits(self._most, info.size)
            return array_record(open_plain(payload, stream=self.stream(key), limits=limits))
        stored, held = self._held(key)
        known = 0 if held is None else sum(spec.nbytes for spec in held.specs.values())
        limits = model_limits(max(known, self._most), info.size)
        try:
            decode = decode_chain if info.kind is Kind.SCHEME else decode_model
            model = decode(payload, held=held, stream=self.stream(key), limits=limits)
        except BaseMissing:
            if held is None or short(held.digest) != info.digest:
                return self._miss(key, stored)
            model = held  # the server does not know that its last reply was lost on the way
        self.models[key] = held if held is not None and held.digest == model.digest else model
        if not self.instruction.keeps_version:
            self.store.drop(key, versions=True)
            self._unkept[key] = None
        elif stored is not self.models[key]:
            try:
                if stored is not None and self._is_teacher(stored, model, key):
                    self.store.keep(_TEACHER + key, stored)
                self.store.keep(key, model, self.plans.get(key))
            except StoreError as error:
                self.in_trouble(error)
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
            name: mask for model in self.models.values() for name, mask in model.masks().items()
        }

    def _is_teacher(self, held: PublishedModel, model: PublishedModel, key: str) -> bool:
        """Whether the version held is the last dense one before a pruned one."""
        pruned = key in self.plans or _is_pruned(model)
        if not (self._keeps_teacher and pruned) or _is_pruned(held):
            return False
        return self.store.channels(key) is None

    def teacher(self) -> dict[str, NDArray[Any]] | None:
        """The last dense version before the received one was pruned, as far as it was kept."""
        for key, model in self.models.items():
            if self._keeps_teacher and (key in self.plans or _is_pruned(model)):
                held = self.store.held(_TEACHER + key)
                return None if held is None else held.arrays()
        return None

    def channels(self) -> ChannelPlan | None:
        """Which channels remain of the received model; None for all."""
        return next((plan for key, plan in self.plans.items() if key in self.models), None)

    def in_trouble(self, error: StoreError) -> None:
        """Go on without what cannot be kept: training is worth more than the bytes it saves."""
        log(WARNING, "The reply is sent, but nothing was kept for the next one: %s", error)
        self._trouble = str(error)

    def wrap(self, content: RecordDict, encode_ms: float = 0.0) -> RecordDict:
        """Add the report of what this node holds."""
        kept = {**self.models, **self._unkept} if self._unkept else {}
        held = {key: short(model.digest) for key, model in kept.items() if model is not None}
        missing, as_sent = tuple(self.missing), not self._unkept
        report = NodeReport(
            *(held, missing, encode_ms, self._trouble, as_sent, self._width),
            unsettled=self._unsettled,
            stale=self.stale,
            able=self._able,
            coarser=self.coarser,
        )
        content[CONTROL_RECORD] = ConfigRecord({"report": report.to_bytes()})
        return content


def _is_pruned(model: PublishedModel) -> bool:
    return any(isinstance(t, LatticeTensor) and t.pruned for t in model.tensors.values())
