"""Replies on their way to the strategy: payloads become arrays that decode when read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from numpy.typing import NDArray

from prunecast.compression.codec import CodecError, Payload
from prunecast.compression.flower import CONTROL_RECORD, payload_of, stream_id
from prunecast.compression.flower.internals import ErrorCode, make_message, object_bytes, own_bytes
from prunecast.compression.versions import (
    BadPayload,
    Kind,
    Report,
    Update,
    VersionsError,
    decode_update,
    inspect,
    open_plain,
    stream_tag,
)
from prunecast.server.federation.lazy import LazyArray
from prunecast.server.federation.ledger import Entry
from prunecast.server.federation.outbound import Prepared

__all__ = ["decode_reply", "refuse", "report_of"]


def refuse(reply: Message, reason: str) -> Message:
    """The reply turned into an error, so that strategies skip it and log why."""
    error = Error(code=ErrorCode.MOD_FAILED_PRECONDITION, reason=reason)
    return make_message(reply.metadata, error=error)


def report_of(reply: Message) -> Report | None:
    """What the node's mod says of itself; None when the reply did not pass through the mod.

    Raises:
        BadPayload: the control record is damaged.
    """
    control = reply.content.config_records.get(CONTROL_RECORD)
    if control is None:
        return None
    data = control.get("report")
    if not isinstance(data, bytes):
        raise BadPayload("control record from the node carries no report")
    return Report.from_bytes(data)


def decode_reply(
    reply: Message, sent: Prepared, entry: Entry, *, verify: bool
) -> tuple[RecordDict, bool]:
    """The content the strategy sees.

    Args:
        reply: a reply that passed through the mod.
        sent: the message it answers.
        entry: ledger entry; kind, dense bytes and decoding time are set here.
        verify: decode every array once now, so that a damaged reply is refused alone.

    Returns:
        The content, and whether it holds an update.

    Raises:
        VersionsError: a payload is damaged, of another run or of another version.
    """
    content, kinds, has_update = RecordDict(), [], False
    for key, record in reply.content.items():
        if key == CONTROL_RECORD and isinstance(record, ConfigRecord):
            entry.dense_bytes -= object_bytes(record) + _mention(reply.content, key)
            continue
        payload = payload_of(record) if isinstance(record, ArrayRecord) else None
        if payload is None:
            if isinstance(record, ArrayRecord):
                kinds.append("verbatim")
            content[key] = record
            continue
        kind = inspect(payload).kind
        if kind is Kind.UPDATE:
            sent_key, update = _open_update(payload, key, sent)
            arrays = _update_arrays(update, sent, sent_key, entry)
            dense, has_update = sent.dense[sent_key], True
        elif kind is Kind.PLAIN:
            opened = open_plain(payload, stream=stream_id(reply.metadata.run_id, key))
            arrays = _plain_arrays(opened, entry)
            # 128 bytes of NumPy header and about 300 of Flower's objects surround every array
            dense = sum(
                s.dtype.itemsize * int(np.prod(s.shape)) + 428 for s in opened.specs.values()
            )
        else:
            raise BadPayload(f"a node does not send {kind.name.lower()} payloads")
        entry.dense_bytes += dense - object_bytes(record)
        kinds.append(kind.name.lower())
        if verify:
            for name, array in arrays.items():
                _check(name, array, exact=kind is Kind.PLAIN or not sent.versions)
        content[key] = arrays
    entry.kind = "+".join(kinds) or "none"
    return content, has_update


def _mention(content: RecordDict, key: str) -> int:
    """Bytes by which naming one of its records lengthens a content's own object."""
    without = RecordDict({k: record for k, record in content.items() if k != key})
    return own_bytes(content) - own_bytes(without)


def _open_update(payload: bytes, key: str, sent: Prepared) -> tuple[str, Update]:
    """Find the record an update answers: the same key, or the one whose stream it names."""
    run_id, tag = sent.original.metadata.run_id, inspect(payload).stream
    for candidate in sorted(sent.versions, key=lambda k: k != key):
        if stream_tag(stream_id(run_id, candidate)) == tag:
            model = sent.versions[candidate].model
            return candidate, decode_update(payload, model, stream=stream_id(run_id, candidate))
    raise BadPayload(f"record {key!r}: the update belongs to another run, or to a record not sent")


def _update_arrays(update: Update, sent: Prepared, key: str, entry: Entry) -> ArrayRecord:
    master = sent.versions[key].master
    arrays = ArrayRecord()
    for name, like in master.items():
        decode = partial(update.apply, name, like)
        arrays[name] = LazyArray(decode, like.dtype, like.shape, entry)
    return arrays


def _plain_arrays(opened: Payload, entry: Entry) -> ArrayRecord:
    arrays = ArrayRecord()
    for name, spec in opened.specs.items():
        arrays[name] = LazyArray(_reader(opened, name), spec.dtype, spec.shape, entry)
    return arrays


def _reader(opened: Payload, name: str) -> Callable[[], NDArray[Any]]:
    def read() -> NDArray[Any]:
        try:
            return opened[name]
        except CodecError as error:
            raise BadPayload(f"array {name!r} cannot be decoded: {error}") from error

    return read


def _check(name: str, array: Any, *, exact: bool) -> None:
    values = array.numpy()
    if not exact and values.dtype.kind == "f" and not np.isfinite(values).all():
        raise VersionsError(f"update of {name!r} makes NaN or infinity")
