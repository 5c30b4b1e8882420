"""Frequency tables: quantised to quarter-octaves, normalised by integer arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MalformedPayload
from .adaptive import UINT_CONTEXTS, AdaptiveDecoder, AdaptiveEncoder

__all__ = ["MAX_LOG", "TableModel", "bad_log", "frequencies", "predicted", "quantised"]

MAX_LOG = 63
_QUARTERS = (64, 76, 91, 108)  # 64 * 2**(i / 4)


def predicted(last: Sequence[int], logs: Sequence[int], i: int) -> int:
    """What token ``i`` is expected to have: the one two before, or the table before (normative)."""
    if i < 2:
        return next((k for k in last[i:] if k), MAX_LOG)
    for j in range(i - 2, -1, -1):
        if logs[j]:
            return logs[j]
    return logs[i - 1] or MAX_LOG


def quantised(counts: NDArray[Any], last: Sequence[int]) -> list[int]:
    """Quarter-octave logarithms (0: absent) of token counts, trailing zeros dropped.

    A rare token takes the predicted value where the few bits lost are fewer than those saved.
    """
    used = np.flatnonzero(counts)
    counts = counts[: int(used[-1]) + 1]
    exact_logs = np.maximum(1.0, MAX_LOG + 4 * np.log2(np.maximum(counts, 1) / int(counts.max())))
    logs: list[int] = []
    for i, (c, exact) in enumerate(zip(counts.tolist(), exact_logs.tolist(), strict=True)):
        if not c:
            logs.append(0)
            continue
        guess = predicted(last, logs, i)
        best = max(round(exact), 1)
        near = best
        # What a wrong logarithm costs grows with its square: most tokens are settled at once.
        if guess != near and 0.0217 * c * ((guess + near) / 2 - exact) ** 2 < 16:
            least = math.inf
            for k in (near, min(max(guess, 1), MAX_LOG), max((near + guess) // 2, 1)):
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
        self.last: list[int] = []

    def write(self, coder: AdaptiveEncoder, logs: list[int]) -> None:
        """Write one table."""
        self.write_size(coder, logs)
        before = 0
        for i, k in enumerate(logs):
            if i + 1 < len(logs):
                coder.bit(self._absent + before, not k)
            before = not k
            if k:
                coder.sint(self._log[min(i, 3)], predicted(self.last, logs, i) - k)
        self.last = logs

    def read(self, coder: AdaptiveDecoder) -> list[int]:
        """Read one table."""
        size = self.read_size(coder)
        logs: list[int] = []
        before = 0
        for i in range(size):
            # The last token of a table is never absent.
            before = coder.bit(self._absent + before) if i + 1 < size else 0
            k = 0
            if not before:
                k = predicted(self.last, logs, i) - coder.sint(self._log[min(i, 3)])
                if not 0 < k <= MAX_LOG:
                    raise bad_log(k)
            logs.append(k)
        self.last = logs
        return logs

    def write_size(self, coder: AdaptiveEncoder, logs: list[int]) -> None:
        """Write the number of tokens alone (the rest follows as static symbols)."""
        coder.uint(self._size, len(logs) - 1)

    def read_size(self, coder: AdaptiveDecoder) -> int:
        """Read the number of tokens alone."""
        size = coder.uint(self._size) + 1
        if size > 256:
            raise MalformedPayload(f"a frequency table has {size} tokens, of at most 256")
        return size

    def symbols(self, logs: list[int]) -> Iterator[tuple[int, int]]:
        """Yield a table as (context, symbol): 0 for an absent token, else zigzag + 1."""
        before = 0
        for i, k in enumerate(logs):
            context = 2 * min(i, 3) + before
            before = not k
            if not k:
                yield context, 0
                continue
            off = predicted(self.last, logs, i) - k
            yield context, (2 * off if off >= 0 else -2 * off - 1) + 1
        self.last = logs


def bad_log(k: int) -> MalformedPayload:
    """Return the error for a logarithm that does not exist."""
    return MalformedPayload(f"a frequency table holds {k}, outside [1, {MAX_LOG}]")
