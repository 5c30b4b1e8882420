"""Frequency tables: quantised to quarter-octaves, normalised by integer arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .adaptive import UINT_CONTEXTS, AdaptiveDecoder, AdaptiveEncoder
from .errors import MalformedPayload

__all__ = ["TableModel", "frequencies", "quantised"]

_MAX_LOG = 63
_QUARTERS = (64, 76, 91, 108)  # 64 * 2**(i / 4)


def quantised(counts: NDArray[Any]) -> list[int]:
    """Quarter-octave logarithms (0: absent) of token counts, trailing zeros dropped."""
    top = int(counts.max(initial=0))
    logs = [0] * len(counts)
    for i in np.flatnonzero(counts):
        ratio = float(counts[i]) / top
        logs[i] = max(1, _MAX_LOG + round(4 * float(np.log2(ratio))))
    while logs and not logs[-1]:
        logs.pop()
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
        self._log = [coder.contexts(UINT_CONTEXTS) for _ in range(4)]
        self._last: list[int] = []

    def _predict(self, logs: list[int], i: int) -> int:
        if i >= 2:
            return logs[i - 2]
        return self._last[i] if i < len(self._last) else _MAX_LOG

    def write(self, coder: AdaptiveEncoder, logs: list[int]) -> None:
        """Write one table."""
        coder.uint(self._size, len(logs) - 1)
        for i, k in enumerate(logs):
            coder.sint(self._log[min(i, 3)], self._predict(logs, i) - k)
        self._last = logs

    def read(self, coder: AdaptiveDecoder) -> list[int]:
        """Read one table."""
        size = coder.uint(self._size) + 1
        if size > 256:
            raise MalformedPayload(f"a frequency table has {size} tokens, of at most 256")
        logs: list[int] = []
        for i in range(size):
            k = self._predict(logs, i) - coder.sint(self._log[min(i, 3)])
            if not 0 <= k <= _MAX_LOG:
                raise MalformedPayload(f"a frequency table holds {k}, outside [0, {_MAX_LOG}]")
            logs.append(k)
        self._last = logs
        return logs
