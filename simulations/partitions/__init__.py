"""Partitions: which examples each client holds."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.kinds import DataError, Kind, Registry

if TYPE_CHECKING:
    from prunecast.simulations.data import Examples
    from prunecast.simulations.tasks import Task

__all__ = ["PARTITIONS", "Partition"]


@dataclass(frozen=True)
class Partition(Kind):
    """``[partition]``: how the examples are spread over the clients.

    A subclass says which class of ``flwr_datasets.partitioner`` does it, by `partitioner`, or
    implements `split`.

    Attributes:
        shuffled: whether examples are shuffled with the seed before they are spread.
        remedy: what to do where the examples cannot be spread.
    """

    shuffled: ClassVar[bool] = False
    remedy: ClassVar[str] = "lower clients.count"

    def partitioner(self) -> tuple[str, Mapping[str, Any]]:
        """Name and arguments; the number of clients, the seed and the groups are filled in."""
        raise NotImplementedError

    def groups(self, training: Examples, task: Task) -> NDArray[np.int64]:
        """A small integer for each example, which `split` gets: the task's, such as the label.

        Raises:
            DataError: the examples lack what this partition goes by.
        """
        return task.groups(training.targets)

    def split(
        self, groups: NDArray[np.int64], *, clients: int, seed: int
    ) -> list[NDArray[np.int64]]:
        """Indices of the examples that each client holds; disjoint, together all of them.

        Args:
            groups: a small integer for each example, such as its label.
            clients: number of partitions.
            seed: of the draw.

        Raises:
            DataError: flwr-datasets is missing, or it cannot be met what was asked.
        """
        try:
            import datasets
            from flwr_datasets import partitioner
        except ImportError as error:
            raise DataError(
                "partitions are drawn by flwr-datasets: pip install 'prunecast[sim]'"
            ) from error
        # no network: a data set of the groups, in memory
        if len(groups) < clients:
            raise DataError(
                f"there are {len(groups)} examples to train on, for {clients} clients: lower "
                "clients.count or data.held_out"
            )
        table = datasets.Dataset.from_dict({"group": groups, "index": np.arange(len(groups))})
        if self.shuffled:
            table = table.shuffle(seed=seed, keep_in_memory=True)
        name, arguments = self.partitioner()
        try:
            if name not in partitioner.__all__:
                raise ValueError(f"there is no {name!r}, but {', '.join(partitioner.__all__)}")
            cls = getattr(partitioner, name)
            ours = {"num_partitions": clients, "partition_by": "group", "seed": seed}
            taken = inspect.signature(cls).parameters
            chosen = cls(**{k: v for k, v in ours.items() if k in taken} | dict(arguments))
            chosen.dataset = table
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of every draw that is repeated, as asked
                parts = [chosen.load_partition(number)["index"] for number in range(clients)]
        except (ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise DataError(
                f"{len(groups)} examples cannot be spread over {clients} clients as asked: "
                f"{self.remedy} ({error})"
            ) from error
        return [np.asarray(part, dtype=np.int64) for part in parts]

    def text(self) -> str:
        """Kind and parameters for people."""
        return self.kind()


PARTITIONS: Registry[Partition] = Registry(Partition, default="dirichlet")
"""The kinds of partition: the modules beside this one."""
