"""Examples spread evenly and at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunecast.simulations.partitions import Partition

__all__ = ["Iid"]


@dataclass(frozen=True)
class Iid(Partition):
    """Every client gets as many examples of the same distribution.

    Attributes:
        alpha: means nothing here: a scenario may change `kind` alone.
        min_size: the same.
    """

    alpha: float = 0.3
    min_size: int = 10

    shuffled = True

    def partitioner(self) -> tuple[str, Mapping[str, Any]]:
        """``IidPartitioner``."""
        return "IidPartitioner", {}
