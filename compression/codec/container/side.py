"""Side information of large payloads: levels and tables by the static coder, after the head."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..entropy.adaptive import UINT_CONTEXTS, AdaptiveDecoder, AdaptiveEncoder
from ..entropy.static import (
    CONTEXTS,
    LEVEL_CONTEXTS,
    StaticDecoder,
    level_contexts,
    static_encode,
    static_tables,
)
from ..entropy.tables import TableModel
from ..errors import MalformedPayload

__all__ = ["SideModel", "SideWriter", "open_side"]


class SideModel:
    """Adaptive contexts of what the head says about static side information."""

    def __init__(self, coder: AdaptiveEncoder | AdaptiveDecoder) -> None:
        self.present = coder.contexts(1)
        self.words = coder.contexts(UINT_CONTEXTS)
        self.table = TableModel(coder)


class SideWriter:
    """Gathers (context, symbol) pairs in the order in which the decoder will ask for them."""

    def __init__(self) -> None:
        self._contexts: list[NDArray[np.int64]] = []
        self._symbols: list[NDArray[np.int64]] = []

    def add_levels(self, values: NDArray[np.int64]) -> None:
        """Add one axis's levels, less the middle one."""
        self._contexts.append(level_contexts(values))
        self._symbols.append(np.where(values < 0, -2 * values - 1, 2 * values))

    def add_table(self, model: TableModel, logs: list[int]) -> None:
        """Add one frequency table."""
        pairs = np.array(list(model.symbols(logs)), np.int64).reshape(-1, 2)
        self._contexts.append(pairs[:, 0] + LEVEL_CONTEXTS)
        self._symbols.append(pairs[:, 1])

    def bits(self) -> list[float]:
        """Ideal code length of everything added, one number for each call."""
        if not self._symbols:
            return []
        contexts, symbols = np.concatenate(self._contexts), np.concatenate(self._symbols)
        counts = np.zeros((CONTEXTS, 1 + int(symbols.max())))
        np.add.at(counts, (contexts, symbols), 1)
        cost = np.log2(counts.sum(1)[contexts]) - np.log2(counts[contexts, symbols])
        ends = np.cumsum([len(x) for x in self._symbols])
        return [float(part.sum()) for part in np.split(cost, ends[:-1])]

    def finish(self, coder: AdaptiveEncoder, m: SideModel) -> bytes:
        """Write tables, state and number of words to the head; return the words."""
        contexts, symbols = np.concatenate(self._contexts), np.concatenate(self._symbols)
        tables = static_tables(contexts, symbols)
        for context in range(CONTEXTS):
            coder.bit(m.present, context in tables)
            if context in tables:
                m.table.write(coder, tables[context])
        state, words = static_encode(contexts, symbols, tables)
        coder.bits(state, 32)
        coder.uint(m.words, len(words) // 2)
        return words


def open_side(coder: AdaptiveDecoder, m: SideModel, rest: bytes) -> tuple[StaticDecoder, int]:
    """Return a decoder of the words at the start of ``rest``, and their number of bytes."""
    tables = {}
    for context in range(CONTEXTS):
        if coder.bit(m.present):
            tables[context] = m.table.read(coder)
    state = coder.bits(32)
    nbytes = 2 * coder.uint(m.words)
    if nbytes > len(rest):
        raise MalformedPayload("the side information is longer than the payload")
    return StaticDecoder(tables, state, rest[:nbytes]), nbytes
