"""Numbers that every machine draws alike: SplitMix64 on a counter.

Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", figure 16. Number
``i`` depends on the origin and on ``i`` alone, so any part of a stream can be drawn by itself, and
with integers alone, so every machine draws the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CounterStream"]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 1 << 20


@dataclass(frozen=True)
class CounterStream:
    """One stream of 64-bit words.

    Attributes:
        origin: where the counter starts, 0 to 2**64 - 1; `of` makes one from a label.
    """

    origin: int

    @classmethod
    def of(cls, label: bytes) -> CounterStream:
        """Return the stream of a label; other labels give independent streams (by SHA-256)."""
        return cls(int.from_bytes(hashlib.sha256(label).digest()[:8], "little"))

    def words(self, begin: int, end: int) -> NDArray[np.uint64]:
        """Return words ``begin`` to ``end - 1``, uint64.

        >>> CounterStream(0).words(0, 2).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
        True
        """
        z = np.arange(begin + 1, end + 1, dtype=np.uint64)
        z *= _GAMMA
        z += np.uint64(self.origin)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        return z

    def blocks(self, count: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """Yield the first ``count`` words in blocks, each with its start, to bound memory."""
        for begin in range(0, count, _BLOCK):
            yield begin, self.words(begin, min(begin + _BLOCK, count))
