"""Random numbers as a function of key and tensor: the same everywhere, as no state is shared."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import CounterStream

from .errors import BadConfig

__all__ = ["Draws"]

_DOMAIN = b"prunecast scheme 1\0"


class Draws:
    """Uniform numbers for each tensor of a payload.

    Args:
        key: 0 to 2**64 - 1. Use another one for every message: two messages with one key share
            their rounding errors, and averaging no longer removes them.
        purpose: other purposes draw other numbers with the same key.

    Raises:
        BadConfig: the key is out of range.
    """

    def __init__(self, key: int, purpose: bytes = b"encode") -> None:
        if isinstance(key, bool) or not 0 <= key < 1 << 64:
            raise BadConfig(f"the key is {key!r}; give an integer from 0 to 2**64 - 1")
        self._label = _DOMAIN + purpose + b"\0" + struct.pack("<Q", key)

    def uniform(self, name: str, count: int) -> NDArray[np.float64]:
        """`count` numbers in [0, 1), multiples of 2**-53; tensors of other names get others."""
        numbers = np.empty(count, np.float64)
        for begin, words in self._stream(name).blocks(count):
            numbers[begin : begin + len(words)] = words >> np.uint64(11)
        numbers *= 2.0**-53
        return numbers

    def coins(self, name: str, count: int) -> NDArray[np.bool_]:
        """`count` fair coins; tensors of other names get others."""
        words = self._stream(name).words(0, count + 63 >> 6).astype("<u8")
        return np.unpackbits(words.view(np.uint8), count=count).view(np.bool_)

    def _stream(self, name: str) -> CounterStream:
        return CounterStream.of(self._label + name.encode("utf-8", "surrogatepass"))
