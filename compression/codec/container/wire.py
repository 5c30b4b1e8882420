"""The outermost layer: magic, version, flags, total length, context tag, checksum."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from ..context import Context, Limits
from ..errors import (
    ChecksumMismatch,
    ContextMismatch,
    LimitExceeded,
    MalformedPayload,
    NotAPayload,
    TruncatedPayload,
    UnsupportedVersion,
)

__all__ = [
    "CONTEXT_PARTS",
    "FORMS",
    "MAGIC",
    "Envelope",
    "Outline",
    "outline_payload",
    "payload_length",
    "seal",
    "unseal",
]

MAGIC = b"PCC"
MAJOR, MINOR = 2, 1
_CONTEXT_FLAGS = 0b111
FORMS = 0b10000
"""The flag of a head that says of each tensor what it is coded as."""
_KNOWN_FLAGS = _CONTEXT_FLAGS | FORMS
CONTEXT_PARTS = ("layout", "mask", "previous")
"""What each flag, from bit 0 on, says that the context holds."""


@dataclass(frozen=True)
class Outline:
    """What the outer layer states of itself, whatever the context.

    Attributes:
        version: major and minor.
        flags: bit 0: layout, bit 1: mask, bit 2: previous, bit 4: forms.
        nbytes: total length, which is that of the payload.
        context_tag: first bytes of the context's digest; empty without a context.
        head_at: where the head's length lies.
    """

    version: tuple[int, int]
    flags: int
    nbytes: int
    context_tag: bytes
    head_at: int

    @property
    def needs(self) -> tuple[str, ...]:
        """Parts of the context without which it cannot be decoded."""
        return tuple(name for i, name in enumerate(CONTEXT_PARTS) if self.flags >> i & 1)


@dataclass(frozen=True)
class Envelope:
    """What lies inside: the adaptive section, then the sections whose lengths it holds."""

    head: bytes
    rest: bytes
    forms: bool = False
    """Whether the head says of each tensor what it is coded as."""


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 63, 7):
        if at >= len(data):
            raise TruncatedPayload("the payload ends inside a length; fetch it again")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if byte == 0 and shift:
                raise MalformedPayload("a length is not written in its shortest form")
            return value, at
    raise MalformedPayload("a length takes more than nine bytes")


def seal(context: Context, head: bytes, rest: bytes, *, forms: bool = False) -> bytes:
    """Return the finished payload; of the minor version that brought what it uses."""
    flags = context.flags
    start = MAGIC + bytes([MAJOR, MINOR if forms else 0, flags | FORMS * forms])
    body = (context.digest[:4] if flags else b"") + _varint(len(head)) + head + rest
    fixed = len(start) + len(body) + 4
    total = fixed + 1
    while total != fixed + len(_varint(total)):
        total = fixed + len(_varint(total))
    payload = start + _varint(total) + body
    return payload + zlib.crc32(payload).to_bytes(4, "little")


def payload_length(start: bytes) -> int:
    """Return the total length that a payload's first bytes (16 suffice) state.

    Raises:
        NotAPayload, TruncatedPayload, MalformedPayload: there is no such length.
    """
    return _preamble(start)[0]


def _preamble(payload: bytes) -> tuple[int, int]:
    """Total length, and where it ends."""
    if payload[: len(MAGIC)] != MAGIC[: len(payload)] or not payload:
        raise NotAPayload(
            f"the bytes start with {payload[:3]!r}, not {MAGIC!r}: not a payload of this codec"
        )
    if len(payload) < 7:
        raise TruncatedPayload(f"the payload ends after {len(payload)} bytes; fetch it again")
    major, minor, flags = payload[3:6]
    if major != MAJOR:
        raise UnsupportedVersion(
            f"the payload has format {major}.{minor}, this release reads {MAJOR}.x; "
            "use the same release of prunecast on both sides"
        )
    if flags & ~_KNOWN_FLAGS:
        raise UnsupportedVersion(
            f"the payload has unknown flags {flags & ~_KNOWN_FLAGS:#04x}; update prunecast"
        )
    return _read_varint(payload, 6)


def outline_payload(payload: bytes, limits: Limits | None = None) -> Outline:
    """Check what needs no context, checksum included, and return what the payload says of itself.

    Raises:
        NotAPayload, UnsupportedVersion, TruncatedPayload, ChecksumMismatch, LimitExceeded,
        MalformedPayload: it is not a payload that this release could decode.
    """
    limits = limits or Limits()
    if len(payload) > limits.payload_bytes:
        raise LimitExceeded(
            f"the payload has {len(payload)} bytes, above Limits.payload_bytes = "
            f"{limits.payload_bytes}"
        )
    total, at = _preamble(payload)
    if total != len(payload):
        raise TruncatedPayload(
            f"the payload states {total} bytes but has {len(payload)}; fetch it again"
        )
    end = len(payload) - 4
    if end < at:
        raise MalformedPayload("the payload is too short for its checksum")
    if zlib.crc32(payload[:end]) != int.from_bytes(payload[end:], "little"):
        raise ChecksumMismatch("the payload's checksum does not match; fetch it again")
    major, minor, flags = payload[3:6]
    tag = payload[at : min(at + 4, end)] if flags & _CONTEXT_FLAGS else b""
    return Outline((major, minor), flags, total, tag, at + len(tag))


def unseal(payload: bytes, context: Context, limits: Limits) -> Envelope:
    """Check everything that the outer layer states and return what it holds."""
    stated = outline_payload(payload, limits)
    if stated.flags & _CONTEXT_FLAGS != context.flags:
        has = [n for i, n in enumerate(CONTEXT_PARTS) if context.flags >> i & 1] or ["nothing"]
        raise ContextMismatch(
            f"the payload was coded with {' + '.join(stated.needs) or 'nothing'} as context, "
            f"but {' + '.join(has)} was given"
        )
    if context.flags and stated.context_tag != context.digest[:4]:
        raise ContextMismatch(
            "the payload was coded against another context; give the layout, mask and "
            "previous values that its sender used"
        )
    end = len(payload) - 4
    length, at = _read_varint(payload[:end], stated.head_at)
    if length > end - at:
        raise MalformedPayload("the head is longer than the payload")
    forms = bool(stated.flags & FORMS)
    return Envelope(payload[at : at + length], payload[at + length : end], forms)
