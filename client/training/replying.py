"""A node's reply: its array records as the server asked for them, and what they drop kept."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from prunecast.client.training.by_scheme import encode_clipped, scheme_input
from prunecast.client.training.encoding import Coded, align, compress_reply
from prunecast.client.training.incoming import Incoming
from prunecast.client.training.sparing import MOST_COARSER, coarser_rule, fitted, unsent
from prunecast.client.training.store import ModError, NonFiniteUpdate, StoreError
from prunecast.compression.codec import CodecError, NonFiniteError, TensorSpec
from prunecast.compression.flower import (
    STATISTICS_RECORD,
    coded_record,
    is_codable_array,
    native,
    payload_record,
    stated,
)
from prunecast.compression.flower.secure import SECURE_RECORD, narrowed
from prunecast.compression.pruning.growing import strongest
from prunecast.compression.pruning.statistics import (
    GROWTH,
    VOTES,
    Statistics,
    asked,
    pack_statistics,
)
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.schemes import StateError
from prunecast.compression.schemes.interface import Scheme
from prunecast.compression.schemes.layout import layout_of, state_arrays, state_from
from prunecast.compression.versions import (
    NOTHING_SENT,
    SchemeRule,
    UpdateRule,
    allowed_beside,
    describe,
    encode_update,
)

__all__ = ["Reply"]


class Reply:
    """What an app answered to a message.

    Args:
        incoming: the message.
        content: of the app's reply.
    """

    def __init__(self, incoming: Incoming, content: RecordDict) -> None:
        self._incoming, self._reply = incoming, content

    def encode(self, statistics: Statistics) -> RecordDict:
        """The reply's array records as the server asked for them, everything else as it is.

        Statistics that were contributed are added in a record of their own.
        """
        started = time.perf_counter()
        content = RecordDict()
        for key, record in self._reply.items():
            try:
                coded = record
                if isinstance(record, ArrayRecord):
                    with self._incoming.store.alone():
                        coded = self._coded(key, stated(record))
                elif key == SECURE_RECORD and isinstance(record, ConfigRecord):
                    coded = narrowed(record)
            except NonFiniteError as error:
                raise NonFiniteUpdate(f"the update was not sent: {error}") from error
            except CodecError as error:
                raise ModError(f"the update was not sent: {error}") from error
            content[key] = coded
        found = self._thinned(statistics)
        if found and not self._incoming.reticent:
            content[STATISTICS_RECORD] = payload_record(pack_statistics(found))
        return self._incoming.wrap(content, (time.perf_counter() - started) * 1e3)

    def _thinned(self, statistics: Statistics) -> dict[str, Mapping[str, NDArray[Any]]]:
        """Statistics without the weights that the server did not ask for."""
        shares = asked(self._incoming.instruction.statistics)
        found = dict(statistics)
        for name in {GROWTH, VOTES} & found.keys():
            found[name] = strongest(name, found[name], self._incoming.masks(), shares[name])
        return {name: arrays for name, arrays in found.items() if arrays}

    def _coded(self, key: str, record: ArrayRecord) -> ArrayRecord:
        rule = self._incoming.instruction.rule
        if self._incoming.scheme is not None:
            return self._by_scheme(self._incoming.scheme, key, record)
        if isinstance(rule, UpdateRule) and any(map(is_codable_array, record.values())):
            return self._on_lattice(key, record, rule)
        return record

    def _on_lattice(self, key: str, record: ArrayRecord, rule: UpdateRule) -> ArrayRecord:
        """The record against the version received that it answers, or against nothing."""
        arrays = _known(record)
        models = self._incoming.models
        base_key = self._base_for(key, arrays, {k: m.specs for k, m in models.items()})
        base = NOTHING_SENT if base_key is None else models[base_key]
        if not self._incoming.instruction.keeps_residual:
            rule = replace(rule, error_feedback=False, lazy=0.0)
            self._incoming.store.drop(key, residuals=True)
        if not models:
            rule = replace(rule, step=0.0)  # an answer to a query, a personal model
        plan = self._incoming.plans.get(base_key or key)
        feeds_back = rule.error_feedback and self._incoming.feeds_back
        rule = replace(rule, error_feedback=feeds_back, lazy=rule.lazy * feeds_back)
        residual = self._residual(key, plan) if feeds_back else {}

        def coded_as(coded: Coded) -> bytes:
            stream = self._incoming.stream(base_key or key)
            return encode_update(base, coded.changes, stream=stream, tensors=coded.tensors)

        def encoded(rule: UpdateRule, left: Mapping[str, NDArray[Any]]) -> tuple[Coded, bytes]:
            coded = compress_reply(base, arrays, left, rule, clip=self._incoming.clip)
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
            self._incoming.coarser = MOST_COARSER
            return coded_record(payload, {})
        quarters = MOST_COARSER if found is None else found[2]
        self._incoming.coarser = max(self._incoming.coarser, quarters)
        rule = coarser_rule(rule, quarters)
        coded, payload = encoded(rule, residual or {}) if found is None else found[:2]
        sent = self._incoming.received_bytes
        if base_key is not None:
            sent = sum(spec.nbytes for spec in base.specs.values())
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
        if not self._incoming.instruction.keeps_residual:
            self._incoming.store.drop(key, residuals=True)
            return None
        try:
            if plan is not None:
                self._incoming.store.remove(key, plan)
            return self._incoming.store.residual(key)
        except StoreError as error:
            self._incoming.in_trouble(error)
            return None

    def _stage(
        self, key: str, dropped: Mapping[str, NDArray[Any]], plan: ChannelPlan | None
    ) -> bool:
        """Whether what a reply drops could be written."""
        try:
            self._incoming.store.stage(key, self._incoming.instruction.tag, dropped, plan)
        except StoreError as error:
            self._incoming.in_trouble(error)
            return False
        return True

    def _by_scheme(self, chosen: Scheme, key: str, record: ArrayRecord) -> ArrayRecord:
        """*Reply - received*, or the reply itself, by a scheme, as far as it has what came."""
        arrays, received = _known(record), {k: _known(r) for k, r in self._incoming.arrived.items()}
        base_key = self._base_for(key, arrays, {k: _specs(r) for k, r in received.items()})
        if base_key is None:
            return record
        clip, rule = self._incoming.clip, self._incoming.instruction.rule
        found = scheme_input(arrays, received[base_key], clipped=clip is not None)
        if not found.arrays:
            return record
        assert isinstance(rule, SchemeRule)
        fresh = chosen.init(layout_of(found.arrays))
        if clip is not None:
            payload = encode_clipped(chosen, found.arrays, fresh, clip, rule.key)
        elif not self._incoming.feeds_back:
            payload, _ = chosen.encode(found.arrays, fresh, key=rule.key)
        else:
            kept = " ".join((f"{key} by {chosen.name}", *found.own))
            plan, state = self._incoming.plans.get(base_key), fresh
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


def _known(record: ArrayRecord) -> dict[str, NDArray[Any] | None]:
    """The arrays of a record; None for what the codec does not know."""
    return {n: native(array) if is_codable_array(array) else None for n, array in record.items()}


def _specs(arrays: Mapping[str, NDArray[Any] | None]) -> dict[str, TensorSpec]:
    return {n: TensorSpec(a.dtype, a.shape) for n, a in arrays.items() if a is not None}


def _resembles(arrays: Mapping[str, NDArray[Any] | None], specs: Mapping[str, TensorSpec]) -> bool:
    """Whether most of a record's arrays have name and shape of those received."""
    tensors = align(arrays, specs).values()
    return 2 * sum(tensor.like is not None for tensor in tensors) > len(tensors)
