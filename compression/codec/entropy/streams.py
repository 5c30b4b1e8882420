"""One rANS stream as bytes: states, words, and a *rest* that starts in the lanes' first words.

A lane's final state is as likely to lie in any octave of [2**16, 2**32): four bits say which, and
the bits below its leading one follow, so it takes about 27 bits instead of 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MalformedPayload
from .rans import RansTables, rans_decode, rans_encode
from .rawbits import pack_bits, unpack_bits
from .tokens import bit_length_minus_one

__all__ = ["FEWEST_PACKED", "LaneStream", "read_stream", "write_stream"]

FEWEST_PACKED = 8
"""Below so many lanes, states are four bytes each."""


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
    packed = _pack_states(states)
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
    states = _unpack_states(data[:at], entry.lanes)
    words = np.frombuffer(data[at:end], "<u2").astype(np.uint16)
    tokens, initial = rans_decode(contexts, tables, states, words)
    first = initial.astype("<u2").tobytes()
    if any(first[rest:]):
        raise MalformedPayload("padding of the lanes' first words is not zero")
    return tokens, first[:rest] + data[end:]


def _pack_states(states: NDArray[np.uint32]) -> bytes:
    """Return the bytes of final states in [2**16, 2**32)."""
    if len(states) < FEWEST_PACKED:
        return states.astype("<u4").tobytes()
    octave = bit_length_minus_one(states)
    low = states.astype(np.uint64) - (np.uint64(1) << octave.astype(np.uint64))
    fours = np.full(len(states), 4)
    return pack_bits((octave - 16).astype(np.uint64), fours) + pack_bits(low, octave)


def _unpack_states(data: bytes, lanes: int) -> NDArray[np.uint32]:
    """Inverse of :func:`_pack_states`; MalformedPayload unless ``data`` has the right length."""
    if lanes < FEWEST_PACKED:
        if len(data) != 4 * lanes:
            raise MalformedPayload(f"{len(data)} bytes of states for {lanes} lanes")
        return np.frombuffer(data, "<u4").astype(np.uint32)
    cut = lanes + 1 >> 1
    octave = unpack_bits(data[:cut], np.full(lanes, 4)) + np.uint64(16)
    low = unpack_bits(data[cut:], octave)
    return ((np.uint64(1) << octave) | low).astype(np.uint32)
