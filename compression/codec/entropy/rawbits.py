"""Fields of 0 to 64 bits, packed one after the other (bit 0 of a byte first)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MalformedPayload

__all__ = ["pack_bits", "unpack_bits"]

_U64 = np.uint64
_CHUNK = 1 << 16


def pack_bits(values: NDArray[np.uint64], widths: NDArray[Any]) -> bytes:
    """Concatenate the ``widths[i]`` low bits of each ``values[i]`` (upper bits must be zero)."""
    if not len(values):
        return b""
    w = widths.astype(np.int64)
    end = np.cumsum(w)
    start = end - w
    word = start >> 6
    shift = (start & 63).astype(np.uint64)
    out = np.zeros((int(end[-1]) + 63 >> 6) + 1, np.uint64)
    first = np.flatnonzero(np.diff(word, prepend=-1))
    # Fields that start in one word do not overlap there, so their sum is their union.
    out[word[first]] = np.add.reduceat(values << shift, first)
    over = np.flatnonzero((start & 63) + w > 64)
    out[word[over] + 1] += values[over] >> (_U64(64) - shift[over])
    return out.astype("<u8").tobytes()[: int(end[-1]) + 7 >> 3]


def unpack_bits(data: bytes, widths: NDArray[Any]) -> NDArray[np.uint64]:
    """Split ``data`` into fields; MalformedPayload unless it holds exactly that many bits."""
    total = int(widths.sum(dtype=np.int64))
    if total + 7 >> 3 != len(data):
        raise MalformedPayload(f"{len(data)} bytes of raw bits, but tokens ask for {total} bits")
    words = np.frombuffer(data + bytes(-len(data) % 8 + 8), "<u8")
    out = np.empty(len(widths), np.uint64)
    at = 0
    for s in range(0, len(widths), _CHUNK):  # in chunks, to bound the temporary arrays
        w = widths[s : s + _CHUNK].astype(np.int64)
        end = at + np.cumsum(w)
        start = end - w
        word = start >> 6
        shift = (start & 63).astype(np.uint64)
        low = words[word] >> shift
        # Two shifts, because shifting a 64-bit word by 64 is undefined.
        high = (words[word + 1] << (_U64(63) - shift)) << _U64(1)
        keep = (_U64(1) << (w & 63).astype(np.uint64)) - _U64(1)
        keep[w == 64] = ~_U64(0)
        np.bitwise_and(low | high, keep, out=out[s : s + _CHUNK])
        at = int(end[-1])
    return out
