"""Fields of 1 to 56 bits in a string of bits, bit 7 of a byte first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_FIELD", "BitView", "orbit", "pack_fields"]

MAX_FIELD = 56
_PAD = 16
_U64 = np.uint64


def pack_fields(values: NDArray[np.uint64], widths: NDArray[np.int64]) -> bytes:
    """Concatenate the ``widths[i]`` low bits (1 to 64) of each ``values[i]``.

    Upper bits must be zero; the last byte is filled with zeros.

    >>> pack_fields(np.array([1, 2], np.uint64), np.array([1, 3])).hex()
    'a0'
    """
    if not len(values):
        return b""
    end = np.cumsum(widths)
    start = end - widths
    word = start >> 6
    spare = 64 - (start & 63) - widths  # bits left in the word; negative: as many spill over
    fits = np.maximum(spare, 0).astype(np.uint64)
    spill = np.maximum(-spare, 0).astype(np.uint64)
    out = np.zeros((int(end[-1]) + 63 >> 6) + 1, np.uint64)
    first = np.flatnonzero(np.diff(word, prepend=-1))
    # Fields that start in one word do not overlap there, so their sum is their union.
    out[word[first]] = np.add.reduceat((values >> spill) << fits, first)
    over = np.flatnonzero(spare < 0)
    out[word[over] + 1] += values[over] << (_U64(64) - spill[over])
    return out.astype(">u8").tobytes()[: int(end[-1]) + 7 >> 3]


class BitView:
    """Random access to the bits of a byte string; beyond its end, all bits are zero."""

    def __init__(self, data: bytes) -> None:
        self.size = 8 * len(data)
        self._bytes = np.frombuffer(data + bytes(_PAD), np.uint8)
        # An overlapping view: the eight bytes that start at each byte, as one number.
        self._words: NDArray[Any] = np.ndarray(
            (len(data) + _PAD - 7,), ">u8", self._bytes, strides=(1,)
        )

    def fields(self, at: NDArray[np.int64], width: int | NDArray[np.int64]) -> NDArray[np.uint64]:
        """The `width` bits (1 to 56) that start at each bit number of `at` (0 to size)."""
        words = self._words[np.minimum(at, self.size) >> 3].astype(np.uint64)
        shift = np.asarray(64 - np.asarray(width), np.uint64)
        return np.asarray((words << (at & 7).astype(np.uint64)) >> shift, np.uint64)

    def windows(self, first: int, stop: int) -> NDArray[np.uint16]:
        """The 16 bits that start at each of the bits `first` to `stop`."""
        low, high = first >> 3, (stop >> 3) + 1
        b = self._bytes[low : high + 2].astype(np.uint32)
        b = np.concatenate([b, np.zeros(max(0, high + 2 - low - len(b)), np.uint32)])
        three = (b[:-2] << 16) | (b[1:-1] << 8) | b[2:]
        shifts = np.arange(8, 0, -1, dtype=np.uint32)
        wide = (three[:, None] >> shifts).astype(np.uint16)
        return wide.reshape(-1)[first - 8 * low : stop - 8 * low]

    def padding_is_zero(self, used: int) -> bool:
        """Whether `used` bits end in the last byte and zeros fill it."""
        if used > self.size or self.size - used >= 8:
            return False
        last = int(self._bytes[self.size // 8 - 1]) if self.size else 0
        return not last & (1 << self.size - used) - 1


def orbit(following: NDArray[np.int64], first: int, most: int) -> tuple[NDArray[np.int64], int]:
    """``first, following[first], ...`` while inside the array and at most `most` of them.

    Returns:
        What was visited, and what would have come next.
    """
    # A memoryview's items are read three times as fast as an array's.
    steps: Any = memoryview(np.ascontiguousarray(following))  # type: ignore[arg-type]
    seen: list[int] = []
    size, at = len(steps), first
    while at < size and len(seen) < most:
        seen.append(at)
        at = steps[at]
    return np.array(seen, np.int64), at
