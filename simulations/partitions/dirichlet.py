"""Label skew, drawn from a Dirichlet distribution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from prunecast.simulations.kinds import Range
from prunecast.simulations.partitions import Partition

__all__ = ["Dirichlet"]


@dataclass(frozen=True)
class Dirichlet(Partition):
    """Skewed by label, or by what the task groups examples by (Hsu et al. 2019).

    Attributes:
        alpha: concentration of the Dirichlet distribution; the smaller, the more skewed.
        min_size: draw again until every client has as many examples.
    """

    alpha: Annotated[float, Range(0, above=True)] = 0.3
    min_size: Annotated[int, Range(1)] = 10

    remedy = "lower partition.min_size or clients.count, or raise partition.alpha"

    def partitioner(self) -> tuple[str, Mapping[str, Any]]:
        """``DirichletPartitioner``."""
        return "DirichletPartitioner", {"alpha": self.alpha, "min_partition_size": self.min_size}

    def text(self) -> str:
        """The kind and its concentration."""
        return f"dirichlet, α = {self.alpha:g}"
