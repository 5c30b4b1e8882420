"""Every client is somebody: a user, a subject, a speaker, a role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.kinds import DataError
from prunecast.simulations.partitions import Partition

if TYPE_CHECKING:
    from prunecast.simulations.data import Examples
    from prunecast.simulations.tasks import Task

__all__ = ["Natural"]


@dataclass(frozen=True)
class Natural(Partition):
    """By the identity that the data set gives each example, see `Examples.identities`.

    With as many clients as identities, client k has the k-th identity; with fewer, each has several
    whole ones, drawn with the seed, as many as the others or one more.

    Attributes:
        alpha: means nothing here: a scenario may change `kind` alone.
        min_size: the same.
    """

    alpha: float = 0.3
    min_size: int = 10

    def groups(self, training: Examples, task: Task) -> NDArray[np.int64]:
        """Whose each example is, counted from 0."""
        if training.identities is None:
            raise DataError(
                "partition.kind = 'natural', but the data do not say whose an example is: name a "
                "data set that does (prunecast data list), or the array that does (data.identity)"
            )
        return np.unique(training.identities, return_inverse=True)[1].astype(np.int64)

    def split(
        self, groups: NDArray[np.int64], *, clients: int, seed: int
    ) -> list[NDArray[np.int64]]:
        """Indices of each client; `groups` are identities that count from 0."""
        count = int(groups.max(initial=-1)) + 1
        if count < clients:
            raise DataError(
                f"{count} identities cannot be spread over {clients} clients: lower clients.count"
            )
        if count > clients:
            # SeedSequence: not the draws of the split of the data
            order = np.random.default_rng([seed, 1]).permutation(count)
            holder = np.empty(count, np.int64)
            holder[order] = np.arange(count) % clients
            groups = holder[groups]
        return [np.flatnonzero(groups == client) for client in range(clients)]
