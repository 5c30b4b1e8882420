"""Any partitioner of Flower Datasets, by the name of its class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prunecast.simulations.partitions import Partition

__all__ = ["Flower"]


@dataclass(frozen=True)
class Flower(Partition):
    """One of ``flwr_datasets.partitioner``.

    Attributes:
        name: of its class.
        options: ``[partition.options]``, its keyword arguments; the number of clients, the seed
            and the column of labels are filled in.
    """

    name: str = "PathologicalPartitioner"
    options: Mapping[str, Any] = field(default_factory=dict)

    shuffled = True
    remedy = "change partition.name, partition.options or clients.count"

    def partitioner(self) -> tuple[str, Mapping[str, Any]]:
        """The class that is named."""
        return self.name, self.options

    def text(self) -> str:
        """The class."""
        return self.name
