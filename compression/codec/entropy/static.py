"""Static coding of side information: one rANS state in plain Python integers.

Thousands of levels and table entries precede the symbols of a large payload. Each depends on
the one before, so that lanes do not help, and the adaptive coder takes several decisions for
each; one step of a static model is several times as fast in Python.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..errors import MalformedPayload
from .tables import MAX_LOG, bad_log, frequencies, predicted, quantised

__all__ = [
    "CONTEXTS",
    "LEVEL_CONTEXTS",
    "PRECISION",
    "StaticDecoder",
    "level_contexts",
    "static_encode",
    "static_tables",
]

PRECISION: Final = 12
LEVEL_CONTEXTS: Final = 8
CONTEXTS: Final = LEVEL_CONTEXTS + 8
"""Contexts of levels, then those of table entries."""
_MASK: Final = (1 << PRECISION) - 1
_LOW: Final = 1 << 16


def level_contexts(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Context of each of a field's levels (less the middle one): by the level before."""
    before = np.concatenate([[0], values[:-1]])
    return np.asarray(np.clip(before, -3, 4) + 3)


def static_tables(contexts: NDArray[np.int64], symbols: NDArray[np.int64]) -> dict[int, list[int]]:
    """Quarter-octave logarithms of each context's table."""
    tables: dict[int, list[int]] = {}
    last: list[int] = []
    for context in np.unique(contexts).tolist():
        last = quantised(np.bincount(symbols[contexts == context]), last)
        tables[context] = last
    return tables


def static_encode(
    contexts: NDArray[np.int64], symbols: NDArray[np.int64], tables: Mapping[int, Sequence[int]]
) -> tuple[int, bytes]:
    """Code symbols, each under its context's table; return the final state and the words."""
    size = 1 + max(len(logs) for logs in tables.values())
    freq = np.zeros((1 + max(tables), size), np.int64)
    for context, logs in tables.items():
        freq[context, : len(logs)] = frequencies(logs, PRECISION)
    start = np.cumsum(freq, axis=1) - freq
    f_of = freq[contexts, symbols].tolist()
    c_of = start[contexts, symbols].tolist()
    x, words = _LOW, []
    for f, c in zip(reversed(f_of), reversed(c_of), strict=True):
        if x >> (32 - PRECISION) >= f:
            words.append(x & (_LOW - 1))
            x >>= 16
        d, r = divmod(x, f)
        x = (d << PRECISION) + r + c
    words.reverse()
    return x, np.array(words, "<u2").tobytes()


class StaticDecoder:
    """Reads what :func:`static_encode` wrote."""

    def __init__(self, tables: Mapping[int, Sequence[int]], state: int, data: bytes) -> None:
        self._freq: dict[int, list[int]] = {}
        self._ends: dict[int, list[int]] = {}
        for context, logs in tables.items():
            f = frequencies(logs, PRECISION)
            self._freq[context] = f
            self._ends[context] = np.cumsum(f).tolist()
        self._x = state
        self._words: list[int] = np.frombuffer(data, "<u2").tolist()
        self._words.reverse()

    def table(self, size: int, last: Sequence[int]) -> list[int]:
        """Decode a frequency table of ``size`` tokens; ``last`` is the one before of its kind."""
        logs: list[int] = []
        x, words = self._x, self._words
        before, guess = 0, 0
        for i in range(size):
            context = LEVEL_CONTEXTS + 2 * min(i, 3) + before
            ends = self._ends.get(context)
            if ends is None:
                raise MalformedPayload(f"side information uses the absent table {context}")
            slot = x & _MASK
            symbol = bisect_right(ends, slot)
            f = self._freq[context][symbol]
            x = f * (x >> PRECISION) + slot - ends[symbol] + f
            if x < _LOW:
                if not words:
                    raise MalformedPayload("the side information ends too early")
                x = x << 16 | words.pop()
            # The nearest non-zero entry two or more before, as in `predicted`.
            if i > 1 and logs[-2]:
                guess = logs[-2]
            if symbol:
                z = symbol - 1
                k = guess if guess and i > 1 else predicted(last, logs, i)
                k += (z + 1 >> 1) if z & 1 else -(z >> 1)
                if not 0 < k <= MAX_LOG:
                    raise bad_log(k)
                logs.append(k)
                before = 0
            else:
                logs.append(0)
                before = 1
        if before:
            raise MalformedPayload("the last token of a frequency table is absent")
        self._x = x
        return logs

    def levels(self, middle: int, top: int, count: int) -> bytes:
        """Decode ``count`` levels in [0, top]: :meth:`read`, written out for speed."""
        out = bytearray()
        x, words, v = self._x, self._words, 0
        absent: list[int] = []
        ends_of = [self._ends.get(c, absent) for c in range(LEVEL_CONTEXTS)]
        freq_of = [self._freq.get(c, absent) for c in range(LEVEL_CONTEXTS)]
        low, high = -middle, top - middle
        for _ in range(count):
            context = 0 if v < -3 else 7 if v > 4 else v + 3
            ends = ends_of[context]
            if not ends:
                raise MalformedPayload(f"side information uses the absent table {context}")
            slot = x & _MASK
            symbol = bisect_right(ends, slot)
            f = freq_of[context][symbol]
            x = f * (x >> PRECISION) + slot - ends[symbol] + f
            if x < _LOW:
                if not words:
                    raise MalformedPayload("the side information ends too early")
                x = x << 16 | words.pop()
            v = -(symbol + 1 >> 1) if symbol & 1 else symbol >> 1
            if not low <= v <= high:
                raise MalformedPayload("a level is out of range")
            out.append(v + middle)
        self._x = x
        return bytes(out)

    def close(self) -> None:
        """MalformedPayload unless everything was read and the state is the encoder's first."""
        if self._words or self._x != _LOW:
            raise MalformedPayload("the side information does not end where it started")
