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
    def slots(self) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
        """Per slot of every table: its token; its frequency and slot - cumulative, as a pair."""
        tables, alphabet = self.frequencies.shape
        size = 1 << self.precision
        counts = self.frequencies.ravel()
        tokens = np.tile(np.arange(alphabet, dtype=np.uint8), tables)
        steps = np.empty((tables * size, 2), np.uint32)
        steps[:, 0] = np.repeat(counts, counts)
        steps[:, 1] = np.tile(np.arange(size, dtype=np.uint32), tables)
        steps[:, 1] -= np.repeat(self.cumulative.ravel(), counts)
        # One look-up of 64 bits is cheaper than two of 32.
        return np.repeat(tokens, counts), steps.view(np.uint64).ravel()


def rans_encode(
    keys: NDArray[Any], tables: RansTables, lanes: int, initial: NDArray[np.uint16]
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """Code symbols given as ``table * alphabet + token``; return final states and words.

    ``initial`` holds one 16-bit word for each lane, given back by :func:`rans_decode`.
    """
    freq = tables.frequencies.ravel()
    start = tables.cumulative.ravel()
    size = np.uint32(1 << tables.precision)
    # A state beyond (freq << (32 - precision)) - 1 would overflow; 2**32 - 1 stands for never.
    top = np.uint32(32 - tables.precision)
    x = initial.astype(np.uint32) | _ONE
    n = len(keys)
    words: list[NDArray[np.uint16]] = []
    over, quotient = np.empty(lanes, np.bool_), np.empty(lanes, np.uint32)
    chunk = max(lanes, _CHUNK // lanes * lanes)
    for first in range((max(n, 1) - 1) // chunk * chunk, -1, -chunk):
        k = keys[first : first + chunk]
        f, c = freq.take(k), start.take(k)
        most = f << top
        most -= np.uint32(1)
        rest = size - f
        out, p = np.empty(len(k), np.uint16), len(k)
        for s in range((max(len(k), 1) - 1) // lanes * lanes, -1, -lanes):
            fs = f[s : s + lanes]
            m = len(fs)
            xs, d = x[:m], quotient[:m]
            at = np.greater(xs, most[s : s + lanes], out=over[:m]).nonzero()[0]
            j = len(at)
            if j:
                part = xs[at]
                out[p - j : p] = part
                p -= j
                part >>= _U16
                xs[at] = part
            # x becomes (x // f << precision) + x % f + c.
            np.floor_divide(xs, fs, out=d)
            d *= rest[s : s + lanes]
            xs += d
            xs += c[s : s + lanes]
        words.append(out[p:])
    return x, np.concatenate(words[::-1])


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
    n, lanes, p, available = len(contexts), len(states), 0, len(words)
    out = np.empty(n, np.uint8)
    x = states.copy()
    wide = words.astype(np.uint32)
    # Slots are kept for a chunk of steps and turned into tokens at once.
    chunk = max(lanes, _CHUNK // lanes * lanes)
    # Arrays for constants and results: with so few elements, what a call costs is its overhead.
    pb = np.full(lanes, tables.precision, np.uint32)
    mask = np.full(lanes, (1 << tables.precision) - 1, np.uint32)
    one, half = np.full(lanes, 1 << 16, np.uint32), np.full(lanes, 16, np.uint32)
    is_low, slot = np.empty(lanes, np.bool_), np.empty(lanes, np.uint32)
    step = np.empty(lanes, np.uint64)
    f, bias = step.view(np.uint32)[0::2], step.view(np.uint32)[1::2]
    xs = x
    for first in range(0, n, chunk):
        slots = contexts[first : first + chunk].astype(np.uint32)
        slots <<= np.uint32(tables.precision)
        for s in range(0, len(slots), lanes):
            i = slots[s : s + lanes]
            m = len(i)
            if m < lanes:
                xs, pb, mask, one = x[:m], pb[:m], mask[:m], one[:m]
                is_low, slot, step, f, bias = is_low[:m], slot[:m], step[:m], f[:m], bias[:m]
            np.bitwise_and(xs, mask, slot)
            np.bitwise_or(i, slot, i)
            step_of.take(i, None, step, "clip")
            np.right_shift(xs, pb, xs)
            np.multiply(xs, f, xs)
            np.add(xs, bias, xs)
            low = np.less(xs, one, is_low).nonzero()[0]
            k = len(low)
            if k:
                if p + k > available:
                    raise MalformedPayload("a segment has too few words for its symbols")
                part = xs[low]
                part <<= half[:k]
                part |= wide[p : p + k]
                xs[low] = part
                p += k
        token_of.take(slots, out=out[first : first + chunk], mode="clip")
    if p != available:
        raise MalformedPayload(f"a segment has {available - p} words left over")
    if (x >> _U16 != 1).any():
        raise MalformedPayload("a segment's coder states do not end where they started")
    return out, x.astype(np.uint16)
