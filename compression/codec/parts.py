"""The encoder's view of a field: one part for each phase, with its values and positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .classes import Classifier, FieldCode, flip_signs, neighbour_sums, phase_slice
from .fields import Field
from .symbols import Placement, Symbols, collect

__all__ = ["Part", "split_phases", "symbols_of"]


@dataclass
class Part:
    """One phase of one field."""

    look: Classifier
    z: NDArray[Any]
    around: NDArray[np.int64] | None
    placement: Placement | None = None

    @property
    def work(self) -> int:
        """Symbols to code, about."""
        assert self.placement is not None
        sparse = int(np.count_nonzero(self.z)) if len(self.placement.order) else 0
        return len(self.placement.dense_cluster) + 2 * sparse


def split_phases(f: Field, code: FieldCode, z: NDArray[Any]) -> list[Part]:
    """Split a field's values by phase, signs aligned with the neighbours' sums."""
    look = Classifier(f, code)
    parts = []
    for phase in range(1 + code.depth):
        part = z[phase_slice(code.depth, phase)]
        around = None
        if phase:
            around = neighbour_sums(z, code.depth, phase)
            part = flip_signs(part, around, f.width)
        parts.append(Part(look, np.ascontiguousarray(part), around))
    return parts


def symbols_of(parts: Sequence[Part]) -> tuple[Symbols, NDArray[np.uint8]]:
    """Return the symbols of a segment and the clusters of its dense ones."""
    placements = [p.placement for p in parts if p.placement is not None]
    dense = np.concatenate([p.dense_cluster for p in placements])
    return collect(placements, [p.z for p in parts]), dense
