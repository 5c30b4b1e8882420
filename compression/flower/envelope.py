"""A message in one record: what surrounds a small payload in Flower's objects costs more than it.

Flower sends a content as objects, one for each record, array and piece of an array, each with a
header, a name by its SHA-256 and a request of its own. Where payloads are small, all records of a
message travel inside one config record instead, under the key of the control record. Large ones
stay records of their own, which a server uploads once for all nodes that get them.

In the one field ``m``, for every record: a byte of kind and, above its four lowest bits, of usual
keys; another key, and the content, each after its length as a base-128 varint. A record that is
outside has no content here and keeps its place. A record of plain numbers is, for each, its name
after its length and an integer as a zigzag varint times two, or 1 and a float64.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from prunecast.compression.flower import CONTROL_RECORD, payload_of, payload_record
from prunecast.compression.flower.internals import Record, record_body, record_from
from prunecast.compression.versions import BadPayload

__all__ = ["is_packed", "pack", "unpack"]

_FIELD = "m"
_MOST = 1 << 15  # bytes of payloads that travel inside; more are worth sharing between nodes
_OUTSIDE, _PAYLOAD, _EMPTY, _CONFIG, _METRIC, _INSTRUCTION, _REPORT, *_NUMBERS = range(9)
_CONTROLS = {_INSTRUCTION: "instruction", _REPORT: "report"}
_USUAL = ("", CONTROL_RECORD, "arrays", "config", "metrics")
_KIND_BITS = 4


def is_packed(content: RecordDict) -> bool:
    """Whether a content came from `pack`."""
    control = content.config_records.get(CONTROL_RECORD)
    return control is not None and list(control) == [_FIELD]


def pack(content: RecordDict) -> RecordDict:
    """The same content in one record, if it has a control record and its payloads are small.

    Records of arrays in the open, and payloads beside such arrays, stay outside.
    """
    if CONTROL_RECORD not in content.config_records:
        return content
    payloads = {key: payload_of(record) for key, record in content.items()}
    if sum(len(payload) for payload in payloads.values() if payload is not None) > _MOST:
        return content
    data, packed = bytearray(), RecordDict()
    for key, record in content.items():
        kind, body = _inside(record, payloads[key])
        usual = _USUAL.index(key) if key in _USUAL else 0
        data.append(kind | usual << _KIND_BITS)
        for part in (body,) if usual else (key.encode(), body):
            data += _varint(len(part)) + part
        if kind == _OUTSIDE:
            packed[key] = record
    packed[CONTROL_RECORD] = ConfigRecord({_FIELD: bytes(data)})
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
    data, at = content.config_records[CONTROL_RECORD][_FIELD], 0
    if not isinstance(data, bytes):
        raise BadPayload("the record that holds a message is damaged: it holds no bytes")
    found = RecordDict()
    outside = {key: record for key, record in content.items() if key != CONTROL_RECORD}
    while at < len(data):
        (usual, kind), at = divmod(data[at], 1 << _KIND_BITS), at + 1
        name, at = (_USUAL[usual].encode(), at) if 0 < usual < len(_USUAL) else _part(data, at)
        body, at = _part(data, at)
        try:
            key = name.decode()
            if kind == _OUTSIDE:
                found[key] = outside.pop(key)
            else:
                found[key] = _record(kind, body)
        except (ValueError, KeyError) as error:
            raise BadPayload(f"the record that holds a message is damaged: {error}") from error
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
    data = bytearray()
    for name, value in record.items():
        data += _varint(len(name.encode())) + name.encode()
        if isinstance(value, int):
            data += _varint((value << 1 if value >= 0 else -2 * value - 1) << 1)
        else:
            data += _varint(1) + struct.pack("<d", value)
    return bytes(data)


def _unpack_numbers(data: bytes) -> Iterator[tuple[str, int | float]]:
    at = 0
    while at < len(data):
        name, at = _part(data, at)
        value, at = _number(data, at)
        if value == 1:
            if len(data) < at + 8:
                raise ValueError("a number ends too early")
            yield name.decode(), float(struct.unpack_from("<d", data, at)[0])
            at += 8
        elif value & 1:
            raise ValueError("a number is of an unknown kind")
        else:
            value >>= 1
            yield name.decode(), -(value >> 1) - 1 if value & 1 else value >> 1


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise BadPayload("the record that holds a message is damaged: it ends too early")
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _part(data: bytes, at: int) -> tuple[bytes, int]:
    size, at = _number(data, at)
    if size > len(data) - at:
        raise BadPayload("the record that holds a message is damaged: it ends too early")
    return data[at : at + size], at + size
