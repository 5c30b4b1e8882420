"""Label skew as NIID-Bench draws it, so that its published figures can be met on its partition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.kinds import DataError, Range
from prunecast.simulations.partitions import Partition

__all__ = ["NiidBench"]

_TRIES = 1000


@dataclass(frozen=True)
class NiidBench(Partition):
    """A Dirichlet draw per class, of which a client that has the average already gets nothing.

    After Li, Diao, Chen & He 2022 ("Federated Learning on Non-IID Data Silos", section IV.A) and
    Flower's baseline ``niid_bench``. Draws follow that baseline's generator, so that with its seed,
    and as many examples of each class, clients have as many of each as there; which ones the
    order of the examples decides.

    Attributes:
        alpha: concentration of the Dirichlet distribution.
        min_size: draw again until every client has as many examples.
        partition_seed: of the draw, whatever the scenario's seed is; the baseline has 42 always.
    """

    alpha: Annotated[float, Range(0, above=True)] = 0.5
    min_size: Annotated[int, Range(1)] = 10
    partition_seed: Annotated[int, Range(0)] = 42

    remedy = "lower partition.min_size or clients.count, or raise partition.alpha"

    def split(
        self, groups: NDArray[np.int64], *, clients: int, seed: int
    ) -> list[NDArray[np.int64]]:
        """See `Partition.split`; `seed` means nothing here."""
        rng = np.random.default_rng(self.partition_seed)
        for _ in range(_TRIES):
            parts = [np.zeros(0, np.int64) for _ in range(clients)]
            for group in np.unique(groups):
                members = np.flatnonzero(groups == group)
                rng.shuffle(members)
                shares = rng.dirichlet(np.full(clients, self.alpha))
                shares *= [len(part) * clients < len(groups) for part in parts]
                cuts = (np.cumsum(shares / shares.sum()) * len(members)).astype(np.int64)[:-1]
                pieces = np.split(members, cuts)
                parts = [np.concatenate(pair) for pair in zip(parts, pieces, strict=True)]
            if min(map(len, parts)) >= self.min_size:
                return parts
        raise DataError(
            f"{len(groups)} examples cannot be spread over {clients} clients as asked, in {_TRIES} "
            f"draws: {self.remedy}"
        )

    def text(self) -> str:
        """The kind and its concentration."""
        return f"dirichlet, α = {self.alpha:g}, as NIID-Bench draws it"
