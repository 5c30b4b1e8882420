"""Before a scheme's payload: what the arrays of a reply are, where they are not what was sent.

The bytes are ``PCT``, the length of a record's key (2) and the key, the length (4) and the bytes of
a zlib stream: the layout of an update against that record, see docs/payloads.md. In it 0 is a
change of what was sent, 4 the values themselves, 5 an array beside the payload.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping

from prunecast.compression.codec import TensorSpec
from prunecast.compression.versions.errors import BadPayload
from prunecast.compression.versions.frame import inflate
from prunecast.compression.versions.layout import (
    Coding,
    UpdateHead,
    pack_update_heads,
    unpack_update_heads,
)

__all__ = ["describe", "read_description"]

_MAGIC = b"PCT"
_CODINGS = (Coding.UNCHANGED, Coding.ZERO, Coding.VERBATIM)


def describe(key: str, heads: Mapping[str, UpdateHead], base: Mapping[str, TensorSpec]) -> bytes:
    """What goes before a payload.

    Args:
        key: of the record that was sent and that the reply answers.
        heads: of the reply's arrays, in its order; without steps.
        base: specs of that record's arrays, as far as the codec knows them.
    """
    named, deflated = key.encode(), zlib.compress(pack_update_heads(heads, base), 9)
    sizes = struct.pack("<H", len(named)) + named + struct.pack("<I", len(deflated))
    return _MAGIC + sizes + deflated


def read_description(
    payload: bytes, base_of: Callable[[str], Mapping[str, TensorSpec]]
) -> tuple[str, dict[str, UpdateHead], bytes] | None:
    """The key, the heads and the payload itself; None where nothing goes before it.

    Args:
        payload: what came.
        base_of: specs of the record that was sent under a key; raises BadPayload for no such one.

    Raises:
        BadPayload: damaged.
    """
    if payload[: len(_MAGIC)] != _MAGIC:
        return None
    try:
        (length,) = struct.unpack_from("<H", payload, 3)
        key = payload[5 : 5 + length].decode()
        (size,) = struct.unpack_from("<I", payload, 5 + length)
    except (struct.error, UnicodeDecodeError) as error:
        raise BadPayload("the description before a payload is damaged") from error
    begin = 9 + length
    if size > len(payload) - begin:
        raise BadPayload("the description before a payload is not all there")
    heads = unpack_update_heads(inflate(payload[begin : begin + size]), base_of(key))
    if any(head.coding not in _CODINGS for head in heads.values()):
        raise BadPayload("the description before a payload has a coding that no scheme has")
    return key, heads, payload[begin + size :]
