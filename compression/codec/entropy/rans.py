"""Lane-interleaved range asymmetric numeral systems, vectorised over the lanes.

rANS (Duda, "Asymmetric numeral systems", arXiv:1311.2540) with 32-bit states in
[2**16, 2**32) and 16-bit renormalisation; symbol i belongs to lane i mod lanes (interleaving
after Giesen, arXiv:1402.3392). A lane starts from ``2**16 + word``: 16 bits of payload for free.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MalformedPayload

__all__ = ["RansTables", "rans_decode", "rans_encode"]

_CHUNK = 1 << 16
_U16 = np.uint32(16)
_LOW = np.uint32(0xFFFF)
_ONE = np.uint32(1 << 16)


@dataclass(frozen=True)
class RansTables:
    """Frequencies of every table, [tables, alphabet], each row summing to ``1 << precision``."""

    frequencies: NDArray[np.uint32]
    precision: int

    @cached_property
    def cumulative(self) -> NDArray[np.uint32]:
        """Sum of the frequencies below each token."""
        c = np.zeros_like(self.frequencies)
        np.cumsum(self.frequencies[:, :-1], axis=1, out=c[:, 1:])
        return c

    @cached_property
    def slots(self) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """Per slot of every table: its token, and frequency << 16 | (slot - cumulative)."""
        tables, alphabet = self.frequencies.shape
        size = 1 << self.precision
        counts = self.frequencies.ravel()
        tokens = np.tile(np.arange(alphabet, dtype=np.uint8), tables)
        bias = np.tile(np.arange(size, dtype=np.uint32), tables)
        bias -= np.repeat(self.cumulative.ravel(), counts)
        bias |= np.repeat(counts << _U16, counts)
        return np.repeat(tokens, counts), bias


def rans_encode(
    keys: NDArray[Any], tables: RansTables, lanes: int, initial: NDArray[np.uint16]
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """Code symbols given as ``table * alphabet + token``; return final states and words.

    ``initial`` holds one 16-bit word for each lane, given back by :func:`rans_decode`.
    """
    freq = tables.frequencies.ravel()
    start = tables.cumulative.ravel()
    pb = np.uint32(tables.precision)
    # A state >= freq << (32 - precision) would overflow; compared shifted, as 2**32 has no u32.
    top = np.uint32(32 - tables.precision)
    x = initial.astype(np.uint32) | _ONE
    n = len(keys)
    words: list[NDArray[np.uint16]] = []
    for s in range((max(n, 1) - 1) // lanes * lanes, -1, -lanes):
        k = keys[s : s + lanes]
        m = len(k)
        if not m:
            break
        f = freq.take(k)
        xs = x[:m]
        out = (xs >> top) >= f
        words.append(xs[out].astype(np.uint16))
        xs >>= np.multiply(out, _U16, dtype=np.uint32)
        d = xs // f
        xs -= d * f
        xs += d << pb
        xs += start.take(k)
    joined = np.concatenate(words[::-1]) if words else np.zeros(0, np.uint16)
    return x, joined


def rans_decode(
    contexts: NDArray[Any],
    tables: RansTables,
    states: NDArray[np.uint32],
    words: NDArray[np.uint16],
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Decode one token per entry of ``contexts``; return tokens and the initial words.

    Raises:
        MalformedPayload: the words run out, are left over, or the states do not end in
            [2**16, 2**17).
    """
    token_of, step_of = tables.slots
    pb = np.uint32(tables.precision)
    mask = np.uint32((1 << tables.precision) - 1)
    n, lanes, p, available = len(contexts), len(states), 0, len(words)
    out = np.empty(n, np.uint8)
    x = states.copy()
    wide = words.astype(np.uint32)
    # Slots are kept for a chunk of steps and turned into tokens at once.
    chunk = max(lanes, _CHUNK // lanes * lanes)
    step = np.empty(lanes, np.uint32)
    high = np.empty(lanes, np.uint32)
    for first in range(0, n, chunk):
        slots = contexts[first : first + chunk].astype(np.uint32)
        slots <<= pb
        for s in range(0, len(slots), lanes):
            i = slots[s : s + lanes]
            if len(i) < lanes:
                step, high = step[: len(i)], high[: len(i)]
            xs = x[: len(i)]
            i |= xs & mask
            step_of.take(i, out=step, mode="clip")
            xs >>= pb
            np.right_shift(step, _U16, out=high)
            xs *= high
            step &= _LOW
            xs += step
            low = (xs < _ONE).nonzero()[0]
            k = len(low)
            if k:
                if p + k > available:
                    raise MalformedPayload("a segment has too few words for its symbols")
                part = xs[low]
                part <<= _U16
                part |= wide[p : p + k]
                xs[low] = part
                p += k
        token_of.take(slots, out=out[first : first + chunk], mode="clip")
    if p != available:
        raise MalformedPayload(f"a segment has {available - p} words left over")
    if (x >> _U16 != 1).any():
        raise MalformedPayload("a segment's coder states do not end where they started")
    return out, x.astype(np.uint16)
