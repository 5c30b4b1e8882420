"""The encoder's view of a field: one part for each phase, with its values and positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..entropy.symbols import Placement, Symbols, collect
from ..entropy.tokens import TokenScheme
from .classes import (
    ACTIVITIES,
    Classifier,
    FieldCode,
    flip_signs,
    neighbour_sums,
    phase_slice,
)
from .fields import CHUNK, PREVIOUS_CLASSES, Field, look_up

__all__ = ["Phase", "histogram", "split_phases", "symbols_of"]


_TABLE = np.arange(PREVIOUS_CLASSES * ACTIVITIES, dtype=np.uint16)


@dataclass
class Phase:
    """One phase of one field: values (as zigzag) and raw contexts (class * 64 + activity)."""

    z: NDArray[Any]
    raw: NDArray[np.uint16]
    placement: Placement | None = None

    def place(self, table: NDArray[np.uint8], sparse: NDArray[np.bool_]) -> None:
        """Look up clusters and let go of the raw contexts."""
        self.placement = Placement.of(look_up(table, self.raw), sparse)
        self.raw = np.zeros(0, np.uint16)

    @property
    def work(self) -> int:
        """Symbols to code, about."""
        assert self.placement is not None
        sparse = int(np.count_nonzero(self.z)) if len(self.placement.order) else 0
        return len(self.placement.dense_cluster) + 2 * sparse

    def release(self) -> None:
        """Let go of the arrays."""
        self.z = np.zeros(0, self.z.dtype)
        self.placement = None


def split_phases(f: Field, code: FieldCode, z: NDArray[Any]) -> list[Phase]:
    """Split a field's values by phase, signs aligned with the neighbours' sums."""
    look = Classifier(f, code)
    table = _TABLE.reshape(PREVIOUS_CLASSES, ACTIVITIES)
    parts = []
    for phase in range(1 + code.depth):
        part = z[phase_slice(code.depth, phase)]
        around = None
        if phase:
            around = neighbour_sums(z, code.depth, phase)
            part = flip_signs(part, around, f.width)
        parts.append(Phase(np.ascontiguousarray(part), look.look_up(table, phase, around)))
    return parts


def histogram(parts: Sequence[Phase], scheme: TokenScheme) -> NDArray[np.int64]:
    """Count tokens by raw context, [16 * 64, tokens]."""
    largest = max(int(part.z.max(initial=0)) for part in parts)
    shift = (scheme.alphabet(largest) - 1).bit_length()
    h = np.zeros(len(_TABLE) << shift, np.int64)
    waiting: list[NDArray[Any]] = []
    held = 0
    for part in parts:
        for s in range(0, len(part.z), CHUNK):
            key = part.raw[s : s + CHUNK].astype(np.int64) << shift
            key |= scheme.tokens(part.z[s : s + CHUNK])
            waiting.append(key)
            held += len(key)
            if held >= CHUNK:
                h += np.bincount(np.concatenate(waiting), minlength=len(h))
                waiting, held = [], 0
    if waiting:
        h += np.bincount(np.concatenate(waiting), minlength=len(h))
    return h.reshape(len(_TABLE), -1)


def symbols_of(parts: Sequence[Phase]) -> tuple[Symbols, NDArray[np.uint8]]:
    """Return the symbols of a segment and the clusters of its dense ones."""
    placements = [p.placement for p in parts if p.placement is not None]
    clusters = [p.dense_cluster for p in placements]
    dense = clusters[0] if len(clusters) == 1 else np.concatenate(clusters)
    return collect(placements, [p.z for p in parts]), dense
