"""Protobuf messages, read so strictly that no other reader sees other fields in the same bytes.

Readers differ in what they make of odd bytes: a tag with needless bytes is cut to 32 bits by one
and taken whole by another; of a field given twice, one takes the last, another merges both. So what
is not written in the one way in which protobuf's own libraries write it is refused.
(https://protobuf.dev/programming-guides/encoding)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

__all__ = ["Field", "ProtobufError", "read_fields", "read_varint"]

_MOST_BYTES = 2**31 - 1  # of a message, as everywhere
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIRES = {
    "int": {_VARINT},
    "ints": {_VARINT, _BYTES},
    "float": {_FIXED32},
    "floats": {_FIXED32, _BYTES},
    "doubles": {_FIXED64, _BYTES},
    "one": {_BYTES},
    "many": {_BYTES},
}
_ONCE = {"int", "float", "one"}
Field = str
"""What a field may hold: ``int``, ``float`` or ``one`` string, bytes or message; ``ints``,
``floats``, ``doubles`` and ``many`` of these (numbers packed or not)."""


class ProtobufError(ValueError):
    """Bytes are no such message, or not written in the usual way."""


def read_fields(
    data: memoryview, fields: Mapping[int, Field]
) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field: an integer, or the bytes of anything else.

    Args:
        data: of the message.
        fields: what it may have, by number.

    Raises:
        ProtobufError: damaged, a field that is not among these, of another wire type or given
            twice, or a number that is not written in its shortest form.
    """
    at, seen = 0, set()
    while at < len(data):
        tag, at = read_varint(data, at, 5)
        number, wire = tag >> 3, tag & 7
        kind = fields.get(number)
        if kind is None or wire not in _WIRES[kind]:
            raise ProtobufError(f"it has a field {number} of wire type {wire}, which is unknown")
        if kind in _ONCE:
            if number in seen:
                raise ProtobufError(f"it has the field {number} twice")
            seen.add(number)
        if wire == _VARINT:
            value, at = read_varint(data, at, 10)
            yield number, value
            continue
        if wire == _BYTES:
            length, at = read_varint(data, at, 5)
        else:
            length = 8 if wire == _FIXED64 else 4
        if length > min(_MOST_BYTES, len(data) - at):
            raise ProtobufError("a field ends behind its message")
        yield number, data[at : at + length]
        at += length


def read_varint(data: memoryview, at: int, most: int) -> tuple[int, int]:
    """An integer of at most so many bytes (5: 32 bits, 10: 64 bits), and where it ends.

    Raises:
        ProtobufError: cut off, longer, or not in its shortest form.
    """
    value = 0
    for size in range(most):
        if at + size >= len(data):
            raise ProtobufError("it ends inside a number")
        byte = data[at + size]
        value |= (byte & 0x7F) << (7 * size)
        if byte < 0x80:
            if (byte == 0 and size) or value >> (32 if most == 5 else 64):
                break
            return value, at + size + 1
    raise ProtobufError("a number is too long, or not written in its shortest form")
