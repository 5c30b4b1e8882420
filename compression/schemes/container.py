"""The container of every payload: magic, version, scheme, layout, exact lengths, checksum.

All integers are little-endian; docs/schemes.md has the whole format::

    magic     3  b"PCS"
    major     1  1; another major is refused
    minor     1  0; read and ignored
    scheme    1  number of the scheme
    coding    1  0 the paper's, 1 prunecast's codec
    flags     1  0; a set bit is refused
    total     8  bytes of the whole payload
    tensors   4  number of tensors
    layout    4  bytes of the layout section
    layout    …  per tensor: length of the name (2), name (UTF-8), dimensions (1), each (8)
    body      …  the scheme's own
    crc       4  CRC-32 of everything before it"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import (
    ChecksumMismatch,
    CodecError,
    Context,
    LimitExceeded,
    Limits,
    MalformedPayload,
    NotAPayload,
    TensorSpec,
    TruncatedPayload,
    UnsupportedVersion,
    decode,
    encode,
)

from . import UnsupportedTensor
from .layout import Layout, total_size

__all__ = [
    "CODINGS",
    "NAMES",
    "Envelope",
    "Reader",
    "checked_scales",
    "coded",
    "decoded",
    "seal",
    "unseal",
]

MAGIC = b"PCS"
MAJOR, MINOR = 1, 0
NAMES = ("", "topk", "stc", "qsgd", "signsgd", "int8", "int4", "fp16")
"""Of the schemes; the index is the scheme's number on the wire."""
CODINGS = ("paper", "prunecast")
"""The index is the coding's number on the wire."""

_HEAD = struct.Struct("<3sBBBBBQII")
_CRC = 4
_ITEM = 4  # bytes of a decoded element
_MOST = 1 << 60  # elements, not counting dimensions of zero: what numpy can lay out


@dataclass(frozen=True)
class Envelope:
    """A payload whose container was checked; the body was not.

    Attributes:
        scheme: name of the scheme.
        coding: "paper" or "prunecast".
        layout: names and shapes.
        body: scales and integers, as the scheme writes them.
        head_bytes: bytes of the container: header, names and shapes, checksum.
    """

    scheme: str
    coding: str
    layout: dict[str, tuple[int, ...]]
    body: bytes
    head_bytes: int

    @property
    def body_bytes(self) -> int:
        """Bytes of the scheme."""
        return len(self.body)


class Reader:
    """Reads a section from its start to its end; what is not there is never allocated."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > self.left:
            raise MalformedPayload(
                f"a section of {len(self._data)} bytes ends where {count} more are announced"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def unsigned(self, size: int) -> int:
        """The next unsigned integer of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    def array(self, dtype: str, count: int) -> NDArray[Any]:
        """The next `count` numbers of a little-endian dtype, in native byte order."""
        wire = np.dtype(dtype)
        data = self.take(count * wire.itemsize)
        return np.frombuffer(data, wire).astype(wire.newbyteorder("="), copy=False)

    def scales(self, count: int) -> NDArray[np.float32]:
        """The next `count` float32 numbers, which must be finite and not negative."""
        return checked_scales(self.array("<f4", count))

    def bits(self, count: int) -> NDArray[np.bool_]:
        """The next `count` bits, bit 7 of a byte first; zeros fill the last byte."""
        octets = self.array("u1", count + 7 >> 3)
        if count % 8 and int(octets[-1]) & (1 << 8 - count % 8) - 1:
            raise MalformedPayload("the bits that fill a byte are not zero")
        return np.unpackbits(octets, count=count).view(np.bool_)

    def rest(self) -> bytes:
        """Everything that is left."""
        return self.take(self.left)

    def end(self) -> None:
        """MalformedPayload unless everything was read."""
        if self.left:
            raise MalformedPayload(f"{self.left} bytes follow the end of a section")


def checked_scales(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scales, or norms; MalformedPayload unless they are finite and not negative."""
    if not (np.isfinite(values) & (values >= 0)).all():
        raise MalformedPayload("a scale is negative or no number")
    return values


def seal(scheme: str, coding: str, layout: Layout, body: bytes) -> bytes:
    """Return the finished payload.

    Raises:
        UnsupportedTensor: a name or a shape cannot be written.
    """
    parts = []
    for name, shape in layout.items():
        try:
            raw = name.encode()
            parts.append(struct.pack("<H", len(raw)) + raw + struct.pack("<B", len(shape)))
            parts.append(struct.pack(f"<{len(shape)}Q", *shape))
        except (UnicodeEncodeError, struct.error) as error:
            raise UnsupportedTensor(
                f"tensor {name[:80]!r} of shape {shape} cannot be named in a payload: {error}"
            ) from error
    section = b"".join(parts)
    total = _HEAD.size + len(section) + len(body) + _CRC
    kinds = NAMES.index(scheme), CODINGS.index(coding)
    head = _HEAD.pack(MAGIC, MAJOR, MINOR, *kinds, 0, total, len(layout), len(section))
    payload = head + section + body
    return payload + zlib.crc32(payload).to_bytes(_CRC, "little")


def unseal(payload: bytes, limits: Limits) -> Envelope:
    """Check everything that the container states; nothing is allocated for the tensors.

    Raises:
        CodecError: a subclass for each way in which the bytes may be wrong.
    """
    if len(payload) > limits.payload_bytes:
        raise LimitExceeded(
            f"the payload has {len(payload)} bytes, above Limits.payload_bytes = "
            f"{limits.payload_bytes}"
        )
    if payload[: len(MAGIC)] != MAGIC[: len(payload)] or not payload:
        raise NotAPayload(
            f"the bytes start with {payload[:3]!r}, not {MAGIC!r}: not a payload of a scheme"
        )
    if len(payload) < _HEAD.size + _CRC:
        raise TruncatedPayload(f"the payload ends after {len(payload)} bytes; fetch it again")
    _, major, minor, scheme, coding, flags, total, count, size = _HEAD.unpack_from(payload)
    if major != MAJOR:
        raise UnsupportedVersion(
            f"the payload has format {major}.{minor}, this release reads {MAJOR}.x; "
            "use the same release of prunecast on both sides"
        )
    if flags or coding >= len(CODINGS):
        raise UnsupportedVersion(
            f"the payload has unknown flags {flags:#04x} or coding {coding}; update prunecast"
        )
    if not 0 < scheme < len(NAMES):
        raise UnsupportedVersion(f"the payload is of unknown scheme {scheme}; update prunecast")
    if total != len(payload):
        raise TruncatedPayload(
            f"the payload states {total} bytes but has {len(payload)}; fetch it again"
        )
    if zlib.crc32(payload[:-_CRC]) != int.from_bytes(payload[-_CRC:], "little"):
        raise ChecksumMismatch("the payload's checksum does not match; fetch it again")
    content = Reader(payload[_HEAD.size : -_CRC])
    _limit("tensors", count, limits.tensors)
    layout = _read_layout(Reader(content.take(size)), count, limits)
    _check_size(layout, limits, len(payload))
    return Envelope(
        NAMES[scheme], CODINGS[coding], layout, content.rest(), _HEAD.size + size + _CRC
    )


def _read_layout(reader: Reader, count: int, limits: Limits) -> dict[str, tuple[int, ...]]:
    layout: dict[str, tuple[int, ...]] = {}
    for _ in range(count):
        length = reader.unsigned(2)
        _limit("name_bytes", length, limits.name_bytes)
        try:
            name = reader.take(length).decode()
        except UnicodeDecodeError as error:
            raise MalformedPayload("a tensor's name is not UTF-8") from error
        if name in layout:
            raise MalformedPayload(f"tensor {name[:80]!r} appears twice")
        dimensions = reader.unsigned(1)
        _limit("dimensions", dimensions, limits.dimensions)
        shape = tuple(reader.unsigned(8) for _ in range(dimensions))
        if math.prod(d for d in shape if d) > _MOST:
            raise LimitExceeded(f"tensor {name[:80]!r} has a shape that no array can have")
        layout[name] = shape
    reader.end()
    return layout


def _limit(what: str, value: int, most: int) -> None:
    if value > most:
        raise LimitExceeded(f"the payload states {value} {what}, above Limits.{what} = {most}")


def _check_size(layout: Layout, limits: Limits, payload_bytes: int) -> None:
    elements = total_size(layout)
    _limit("elements", elements, limits.elements)
    _limit("decoded_bytes", _ITEM * elements, limits.decoded_bytes)
    if _ITEM * elements > limits.free_bytes + limits.expansion * payload_bytes:
        raise LimitExceeded(
            f"{payload_bytes} bytes of payload state {_ITEM * elements} decoded bytes, above "
            f"Limits.free_bytes = {limits.free_bytes} + Limits.expansion = {limits.expansion} "
            "for each; raise a limit if you trust the sender"
        )


def coded(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Arrays as a payload of the codec, their names, dtypes and shapes left out."""
    plain = {str(i): array for i, array in enumerate(arrays.values())}
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in plain.items()}
    return encode(plain, context=Context(layout=specs))


def decoded(data: bytes, layout: Layout, dtype: str, limits: Limits) -> dict[str, NDArray[Any]]:
    """Inverse of `coded`, for arrays of one dtype.

    Raises:
        MalformedPayload: the codec refuses the bytes.
        LimitExceeded: a limit of the codec is passed.
    """
    specs = {str(i): TensorSpec(np.dtype(dtype), shape) for i, shape in enumerate(layout.values())}
    try:
        arrays = decode(data, context=Context(layout=specs), limits=limits)
    except LimitExceeded:
        raise
    except CodecError as error:
        raise MalformedPayload(f"the codec cannot read the body: {error}") from error
    return dict(zip(layout, arrays.values(), strict=True))
