"""Fields of 0 to 64 bits, packed one after the other (bit 0 of a byte first)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MalformedPayload

__all__ = ["BitReader", "BitWriter", "pack_bits", "unpack_bits"]

_U64 = np.uint64


class BitWriter:
    """Concatenates fields, part by part."""

    def __init__(self) -> None:
        self.bits = 0
        """Bits written so far."""
        self._words: list[NDArray[np.uint64]] = []
        self._last = _U64(0)

    def write(self, values: NDArray[np.uint64], widths: NDArray[Any]) -> None:
        """Append the ``widths[i]`` low bits of each ``values[i]`` (upper bits must be zero)."""
        if not len(values):
            return
        w = widths.astype(np.int64)
        end = np.cumsum(w)
        end += self.bits & 63
        start = end - w
        word = start >> 6
        start &= 63
        shift = start.astype(np.uint64)
        out = np.zeros((int(end[-1]) >> 6) + 2, np.uint64)
        first = np.flatnonzero(np.diff(word, prepend=-1))
        # Fields that start in one word do not overlap there, so their sum is their union.
        out[word[first]] = np.add.reduceat(values << shift, first)
        over = np.flatnonzero(start + w > 64)
        out[word[over] + 1] += values[over] >> (_U64(64) - shift[over])
        out[0] |= self._last
        full = int(end[-1]) >> 6
        self._words.append(out[:full])
        self._last = out[full]
        self.bits += int(end[-1]) - (self.bits & 63)

    def finish(self) -> bytes:
        """Return all bits, padded with zeros to a byte."""
        words = np.concatenate([*self._words, [self._last]]).astype("<u8")
        return words.tobytes()[: self.bits + 7 >> 3]


class BitReader:
    """Splits bytes into fields, part by part."""

    def __init__(self, data: bytes) -> None:
        # Two words more: a field of no bits may start right behind the last one.
        self._words = np.frombuffer(data + bytes(-len(data) % 8 + 16), "<u8")
        self._nbytes = len(data)
        self._at = 0

    def read(self, widths: NDArray[Any]) -> NDArray[np.uint64]:
        """Return the next fields; MalformedPayload beyond the end."""
        w = widths.astype(np.int64)
        end = np.cumsum(w)
        end += self._at
        if not len(w):
            return np.zeros(0, np.uint64)
        if int(end[-1]) > 8 * self._nbytes:
            raise self._mismatch("more")
        start = end - w
        word = start >> 6
        shift = (start & 63).astype(np.uint64)
        low = self._words[word] >> shift
        # Two shifts, because shifting a 64-bit word by 64 is undefined.
        low |= (self._words[word + 1] << (_U64(63) - shift)) << _U64(1)
        keep = (_U64(1) << (w & 63).astype(np.uint64)) - _U64(1)
        keep[w == 64] = ~_U64(0)
        low &= keep
        self._at = int(end[-1])
        return np.asarray(low, np.uint64)

    def close(self) -> None:
        """MalformedPayload unless all bytes were needed."""
        if self._at + 7 >> 3 != self._nbytes:
            raise self._mismatch("fewer")

    def _mismatch(self, how: str) -> MalformedPayload:
        return MalformedPayload(f"{self._nbytes} bytes of raw bits, but tokens ask for {how}")


def pack_bits(values: NDArray[np.uint64], widths: NDArray[Any]) -> bytes:
    """Return one array's fields as bytes."""
    writer = BitWriter()
    writer.write(values, widths)
    return writer.finish()


def unpack_bits(data: bytes, widths: NDArray[Any]) -> NDArray[np.uint64]:
    """Split ``data`` into fields; MalformedPayload unless it holds exactly that many bits."""
    reader = BitReader(data)
    values = reader.read(widths)
    reader.close()
    return values
