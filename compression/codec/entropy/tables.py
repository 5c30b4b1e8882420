"""Frequency tables: quantised to quarter-octaves, normalised by integer arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MalformedPayload
from .adaptive import UINT_CONTEXTS, AdaptiveDecoder, AdaptiveEncoder

__all__ = ["TableModel", "frequencies", "quantised"]

_MAX_LOG = 63
_QUARTERS = (64, 76, 91, 108)  # 64 * 2**(i / 4)


def predicted(last: Sequence[int], logs: Sequence[int], i: int) -> int:
    """What token ``i`` is expected to have: the one two before, or the table before (normative)."""
    if i < 2:
        return next((k for k in last[i:] if k), _MAX_LOG)
    return next((k for k in reversed(logs[: i - 1]) if k), logs[i - 1] or _MAX_LOG)


def quantised(counts: NDArray[Any], last: Sequence[int]) -> list[int]:
    """Quarter-octave logarithms (0: absent) of token counts, trailing zeros dropped.

    A rare token takes the predicted value where the few bits lost are fewer than those saved.
    """
    used = np.flatnonzero(counts)
    top = int(counts.max())
    logs: list[int] = []
    for i, c in enumerate(counts[: int(used[-1]) + 1].tolist()):
        if not c:
            logs.append(0)
            continue
        exact = max(1.0, _MAX_LOG + 4 * math.log2(c / top))
        guess = predicted(last, logs, i)
        near = max(round(exact), 1)
        best, least = near, math.inf
        for k in (near, min(max(guess, 1), _MAX_LOG), max((near + guess) // 2, 1)):
            price = 0.0217 * c * (k - exact) ** 2
            price += 2 * math.log2(1 + abs(k - guess)) + 1 if k != guess else 0.5
            if price < least:
                best, least = k, price
        logs.append(best)
    return logs


def frequencies(logs: Sequence[int], precision: int) -> list[int]:
    """Frequencies that sum to ``2**precision`` from quarter-octave logarithms (normative)."""
    weights = [_QUARTERS[k & 3] << (k >> 2) if k else 0 for k in logs]
    total = sum(weights)
    if not total:
        raise MalformedPayload("a frequency table is empty")
    size = 1 << precision
    f = [max(1, w * size // total) if w else 0 for w in weights]
    while (excess := sum(f) - size) != 0:
        i = f.index(max(f))
        f[i] -= min(excess, f[i] - 1)
    return f


class TableModel:
    """Contexts for the tables of one kind, and the prediction from the table before."""

    def __init__(self, coder: AdaptiveEncoder | AdaptiveDecoder) -> None:
        self._size = coder.contexts(UINT_CONTEXTS)
        self._absent = coder.contexts(2)
        self._log = [coder.contexts(UINT_CONTEXTS) for _ in range(4)]
        self._last: list[int] = []

    def write(self, coder: AdaptiveEncoder, logs: list[int]) -> None:
        """Write one table."""
        coder.uint(self._size, len(logs) - 1)
        before = 0
        for i, k in enumerate(logs):
            if i + 1 < len(logs):
                coder.bit(self._absent + before, not k)
            before = not k
            if k:
                coder.sint(self._log[min(i, 3)], predicted(self._last, logs, i) - k)
        self._last = logs

    def read(self, coder: AdaptiveDecoder) -> list[int]:
        """Read one table."""
        size = coder.uint(self._size) + 1
        if size > 256:
            raise MalformedPayload(f"a frequency table has {size} tokens, of at most 256")
        logs: list[int] = []
        before = 0
        for i in range(size):
            # The last token of a table is never absent.
            before = coder.bit(self._absent + before) if i + 1 < size else 0
            k = 0
            if not before:
                k = predicted(self._last, logs, i) - coder.sint(self._log[min(i, 3)])
                if not 0 < k <= _MAX_LOG:
                    raise MalformedPayload(f"a frequency table holds {k}, outside [1, {_MAX_LOG}]")
            logs.append(k)
        self._last = logs
        return logs
