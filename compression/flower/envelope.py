"""A message in one record: what surrounds a small payload in Flower's objects costs more than it.

Flower sends a content as objects, one for each record, array and piece of an array, each with a
header, a name by its SHA-256 and a request of its own. Where payloads are small, all records of a
message travel inside one config record instead. Large ones stay records of their own, which a
server uploads once for all nodes that get them.

In the one field ``m``, for every record: a byte of kind and, above its four lowest bits, of usual
keys; another key, and the content, each after its length as a base-128 varint. A record that is
outside has no content here and keeps its place. A record of plain numbers is, for each, its name
(the number of a usual one, or its length and how many are usual, and the text) and an integer as
a zigzag varint times two, or 1 and a float64.
"""

from __future__ import annotations

from collections.abc import Iterator

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from prunecast.compression.flower import CONTROL_RECORD, payload_of, payload_record
from prunecast.compression.flower.internals import Record, record_body, record_from
from prunecast.compression.versions import BadPayload
from prunecast.compression.versions.fields import FieldReader, FieldWriter

__all__ = ["PACKED_RECORD", "is_packed", "pack", "unpack"]

PACKED_RECORD = "="
"""Key of the record that holds the others; every byte of it is one of every message."""

_FIELD = "m"
_MOST = 1 << 15  # bytes of payloads that travel inside; more are worth sharing between nodes
_OUTSIDE, _PAYLOAD, _EMPTY, _CONFIG, _METRIC, _INSTRUCTION, _REPORT, *_NUMBERS = range(9)
_CONTROLS = {_INSTRUCTION: "instruction", _REPORT: "report"}
_USUAL = ("", CONTROL_RECORD, "arrays", "config", "metrics")
_USUAL_NAMES = (  # of Flower's strategies, its documentation and our own ClientApp
    *("num-examples", "server-round", "lr", "train_loss", "eval_loss", "eval_acc"),
    *("train-loss", "eval-loss"),
)
_KIND_BITS = 4


def is_packed(content: RecordDict) -> bool:
    """Whether a content came from `pack`."""
    record = content.config_records.get(PACKED_RECORD)
    return record is not None and list(record) == [_FIELD]


def pack(content: RecordDict) -> RecordDict:
    """The same content in one record, if it has a control record and its payloads are small.

    Records of arrays in the open, and payloads beside such arrays, stay outside.
    """
    if CONTROL_RECORD not in content.config_records or PACKED_RECORD in content:
        return content
    payloads = {key: payload_of(record) for key, record in content.items()}
    if sum(len(payload) for payload in payloads.values() if payload is not None) > _MOST:
        return content
    out, packed = FieldWriter(), RecordDict()
    for key, record in content.items():
        kind, body = _inside(record, payloads[key])
        usual = _USUAL.index(key) if key in _USUAL else 0
        out.raw(bytes([kind | usual << _KIND_BITS]))
        if not usual:
            out.text(key)
        out.part(body)
        if kind == _OUTSIDE:
            packed[key] = record
    packed[PACKED_RECORD] = ConfigRecord({_FIELD: bytes(out.data)})
    return packed


def _inside(record: Record, payload: bytes | None) -> tuple[int, bytes]:
    if payload is not None:
        return _PAYLOAD, payload
    if not isinstance(record, ArrayRecord) and all(map(_is_number, record.values())):
        return _NUMBERS[isinstance(record, MetricRecord)], _pack_numbers(record)
    if isinstance(record, MetricRecord):
        return _METRIC, record_body(record)
    if isinstance(record, ConfigRecord):
        for kind, field in _CONTROLS.items():
            if list(record) == [field] and isinstance(value := record[field], bytes):
                return kind, value
        return _CONFIG, record_body(record)
    return (_OUTSIDE, b"") if len(record) else (_EMPTY, b"")


def unpack(content: RecordDict) -> RecordDict:
    """Inverse of `pack`; other contents as they are.

    Raises:
        BadPayload: the record that holds the others is damaged.
    """
    if not is_packed(content):
        return content
    data = content.config_records[PACKED_RECORD][_FIELD]
    if not isinstance(data, bytes):
        raise _damaged("it holds no bytes")
    fields, found = FieldReader(data, _damaged), RecordDict()
    outside = {key: record for key, record in content.items() if key != PACKED_RECORD}
    while fields.left:
        usual, kind = divmod(fields.raw(1)[0], 1 << _KIND_BITS)
        key = _USUAL[usual] if 0 < usual < len(_USUAL) else fields.text()
        body = fields.part()
        try:
            found[key] = outside.pop(key) if kind == _OUTSIDE else _record(kind, body)
        except (ValueError, KeyError) as error:
            raise _damaged(str(error)) from error
    found.update(outside)
    return found


def _record(kind: int, body: bytes) -> Record:
    match kind:
        case 1:
            return payload_record(body)
        case 2:
            return ArrayRecord()
        case 3:
            return record_from(ConfigRecord, body)
        case 4:
            return record_from(MetricRecord, body)
        case 5 | 6:
            return ConfigRecord({_CONTROLS[kind]: body})
        case 7:
            return ConfigRecord(dict(_unpack_numbers(body)))
        case 8:
            return MetricRecord(dict(_unpack_numbers(body)))
    raise ValueError(f"a record is of kind {kind}: versions differ?")


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1 << 62)


def _pack_numbers(record: ConfigRecord | MetricRecord) -> bytes:
    out = FieldWriter()
    for name, value in record.items():
        if name in _USUAL_NAMES:
            out.number(_USUAL_NAMES.index(name))
        else:
            data = name.encode()
            out.number(len(_USUAL_NAMES) + len(data))
            out.raw(data)
        if isinstance(value, int):
            out.number((value << 1 if value >= 0 else -2 * value - 1) << 1)
        elif isinstance(value, float):
            out.number(1)
            out.float64(value)
    return bytes(out.data)


def _unpack_numbers(data: bytes) -> Iterator[tuple[str, int | float]]:
    fields = FieldReader(data, _damaged)
    while fields.left:
        which = fields.number()
        if which < len(_USUAL_NAMES):
            name = _USUAL_NAMES[which]
        else:
            name = fields.raw(which - len(_USUAL_NAMES)).decode()
        value = fields.number()
        if value == 1:
            yield name, fields.float64()
        elif value & 1:
            raise _damaged("a number is of an unknown kind")
        else:
            value >>= 1
            yield name, -(value >> 1) - 1 if value & 1 else value >> 1


def _damaged(why: str) -> BadPayload:
    return BadPayload(f"the record that holds a message is damaged: {why}")
