"""The frame around every payload of this layer: kind, stream, version, base, layout.

All integers are little-endian::

    magic     3  b"PCM"
    major     1  2; another major is refused
    kind      1  see `Kind`
    flags     1  0; a set bit is refused
    stream    8  first bytes of SHA-256(stream identifier)
    counter   4  number of the version this payload makes or, for an update, was trained from
    digest   16  first bytes of that version's digest
    base     16  first bytes of the digest of the version that must be held; zero where none
    layout    4  length of the layout section, in bytes
    crc       4  CRC-32 of everything before this field and of the layout section
    layout       zlib stream, see `prunecast.compression.versions.layout`
    body         one codec payload; before it, in a seeded keyframe, the seed section
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

from prunecast.compression.versions.errors import BadPayload, WrongStream

__all__ = ["SHORT_DIGEST", "Frame", "Kind", "inflate", "pack", "short", "stream_tag", "unpack"]

SHORT_DIGEST = 16
_MAGIC = b"PCM"
_MAJOR = 2
_HEAD = struct.Struct("<3sBBB8sI16s16sI")
_CRC = struct.Struct("<I")
_MAX_LAYOUT = 1 << 24  # bytes, inflated


class Kind(IntEnum):
    """What a payload is."""

    KEYFRAME = 1
    DELTA = 2
    UPDATE = 3
    PLAIN = 4
    SEEDED = 5
    SCHEME = 6


@dataclass(frozen=True)
class Frame:
    """A parsed frame; `layout` is already inflated."""

    kind: Kind
    stream: bytes
    counter: int
    digest: bytes
    base: bytes
    layout: bytes
    body: bytes
    size: int


def short(digest: bytes) -> bytes:
    """The part of a SHA-256 digest that travels in frames."""
    return digest[:SHORT_DIGEST]


def stream_tag(stream: bytes) -> bytes:
    """What a frame says of the stream it belongs to; 8 bytes."""
    return hashlib.sha256(b"prunecast stream\0" + stream).digest()[:8]


def pack(
    kind: Kind,
    stream: bytes,
    counter: int,
    digest: bytes,
    *,
    base: bytes = b"",
    layout: bytes = b"",
    body: bytes = b"",
) -> bytes:
    """Build the bytes of one payload."""
    deflated = zlib.compress(layout, 9) if layout else b""
    head = _HEAD.pack(
        _MAGIC,
        _MAJOR,
        kind,
        0,
        stream_tag(stream),
        counter,
        short(digest),
        short(base),
        len(deflated),
    )
    return head + _CRC.pack(zlib.crc32(head + deflated)) + deflated + body


def unpack(payload: bytes, *, stream: bytes | None) -> Frame:
    """Parse and check a frame; `stream=None` skips the stream check.

    Raises:
        BadPayload: not a payload, damaged, of another major version, or with unknown flags.
        WrongStream: made for another stream.
    """
    payload = bytes(payload)
    fixed = _HEAD.size + _CRC.size
    if len(payload) < fixed or payload[:3] != _MAGIC:
        raise BadPayload(f"{len(payload)} bytes that do not start with a Prunecast payload header")
    head = payload[: _HEAD.size]
    _, major, kind, flags, tag, counter, digest, base, layout_size = _HEAD.unpack(head)
    if major != _MAJOR:
        older = "make it again with this version" if major < _MAJOR else "update this side"
        raise BadPayload(
            f"payload format {major} is not supported (this side reads {_MAJOR}): {older}"
        )
    if flags:
        raise BadPayload(f"unknown payload flags {flags:#04x}: update Prunecast on this side")
    if layout_size > len(payload) - fixed:
        raise BadPayload(f"payload is truncated: layout of {layout_size} bytes is not all there")
    deflated = payload[fixed : fixed + layout_size]
    if _CRC.unpack_from(payload, _HEAD.size)[0] != zlib.crc32(head + deflated):
        raise BadPayload("payload header is damaged (checksum mismatch)")
    try:
        kind = Kind(kind)
    except ValueError:
        raise BadPayload(f"unknown payload kind {kind}: update Prunecast on this side") from None
    if stream is not None and tag != stream_tag(stream):
        raise WrongStream(
            "payload belongs to another run, record or release; it was refused and nothing changed"
        )
    return Frame(
        kind,
        tag,
        counter,
        digest,
        base,
        inflate(deflated),
        payload[fixed + layout_size :],
        len(payload),
    )


def inflate(deflated: bytes, most: int = _MAX_LAYOUT) -> bytes:
    """Inverse of zlib's compression, within a bound; nothing is made of nothing.

    Args:
        deflated: a layout section, or other text that travels.
        most: bytes that it may come to; as many as a layout may have, unless told otherwise.

    Raises:
        BadPayload: damaged, or longer than that.
    """
    if not deflated:
        return b""
    inflater = zlib.decompressobj()
    try:
        inflated = inflater.decompress(deflated, most + 1)
    except zlib.error as error:
        raise BadPayload(f"what was deflated is damaged: {error}") from error
    if len(inflated) > most:
        raise BadPayload(f"what was deflated comes to more than {most} bytes")
    if not inflater.eof or inflater.unused_data:
        raise BadPayload("what was deflated ends too early or has trailing bytes")
    return inflated
