"""One rANS stream as bytes: states, words, and a *rest* that starts in the lanes' first words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MalformedPayload
from .rans import RansTables, rans_decode, rans_encode
from .states import pack_states, unpack_states

__all__ = [
    "LaneStream",
    "finished",
    "first_words",
    "opened",
    "read_stream",
    "rest_of",
    "write_stream",
]


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
    states, words = rans_encode(keys, tables, lanes, first_words(lanes, rest))
    return finished(states, words, rest)


def first_words(lanes: int, rest: bytes) -> NDArray[np.uint16]:
    """What the lanes start from: the first bytes of the rest, padded with zeros."""
    first = rest[: 2 * lanes].ljust(2 * lanes, b"\0")
    return np.frombuffer(first, "<u2").astype(np.uint16)


def finished(
    states: NDArray[np.uint32], words: NDArray[np.uint16], rest: bytes
) -> tuple[LaneStream, bytes]:
    """Directory entry and bytes of a stream."""
    packed = pack_states(states)
    entry = LaneStream(len(states), len(packed), len(words))
    return entry, packed + words.astype("<u2").tobytes() + rest[2 * len(states) :]


def read_stream(
    contexts: NDArray[Any], tables: RansTables, entry: LaneStream, data: bytes, rest: int
) -> tuple[NDArray[np.uint8], bytes]:
    """Decode one token per entry of ``contexts``; return tokens and the rest (``rest`` bytes).

    Raises:
        MalformedPayload: the bytes do not hold these symbols, or not so long a rest.
    """
    tokens, initial = rans_decode(contexts, tables, *opened(entry, data))
    return tokens, rest_of(entry, data, initial, rest)


def opened(entry: LaneStream, data: bytes) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """States and words of a stream."""
    at = entry.state_bytes
    states = unpack_states(data[:at], entry.lanes)
    return states, np.frombuffer(data[at : at + 2 * entry.words], "<u2").astype(np.uint16)


def rest_of(entry: LaneStream, data: bytes, initial: NDArray[np.uint16], rest: int) -> bytes:
    """Return what the lanes started from and what follows the words, ``rest`` bytes."""
    first = initial.astype("<u2").tobytes()
    if any(first[rest:]):
        raise MalformedPayload("padding of the lanes' first words is not zero")
    return first[:rest] + data[entry.state_bytes + 2 * entry.words :]
