"""One rANS stream as bytes: states, words, and a *rest* that starts in the lanes' first words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MalformedPayload
from .rans import RansTables, rans_decode, rans_encode
from .states import pack_states, unpack_states

__all__ = ["LaneStream", "read_stream", "write_stream"]


@dataclass
class LaneStream:
    """What a directory says of a stream."""

    lanes: int = 0
    state_bytes: int = 0
    words: int = 0

    def nbytes(self, rest: int) -> int:
        """Bytes of the stream with a rest of so many bytes."""
        return self.state_bytes + 2 * self.words + max(0, rest - 2 * self.lanes)


def write_stream(
    keys: NDArray[Any], tables: RansTables, lanes: int, rest: bytes
) -> tuple[LaneStream, bytes]:
    """Code symbols given as ``table * alphabet + token``, with ``rest`` from the first words on."""
    # the lanes start from the first bytes of the rest, padded with zeros
    first = np.frombuffer(rest[: 2 * lanes].ljust(2 * lanes, b"\0"), "<u2").astype(np.uint16)
    states, words = rans_encode(keys, tables, lanes, first)
    packed = pack_states(states)
    entry = LaneStream(lanes, len(packed), len(words))
    return entry, packed + words.astype("<u2").tobytes() + rest[2 * lanes :]


def read_stream(
    contexts: NDArray[Any], tables: RansTables, entry: LaneStream, data: bytes, rest: int
) -> tuple[NDArray[np.uint8], bytes]:
    """Decode one token per entry of ``contexts``; return tokens and the rest (``rest`` bytes).

    Raises:
        MalformedPayload: the bytes do not hold these symbols, or not so long a rest.
    """
    at, end = entry.state_bytes, entry.state_bytes + 2 * entry.words
    states = unpack_states(data[:at], entry.lanes)
    words = np.frombuffer(data[at:end], "<u2").astype(np.uint16)
    tokens, initial = rans_decode(contexts, tables, states, words)
    first = initial.astype("<u2").tobytes()
    if any(first[rest:]):
        raise MalformedPayload("padding of the lanes' first words is not zero")
    return tokens, first[:rest] + data[end:]
