"""Spread the examples over clients."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.data.errors import DataError
from prunecast.simulations.scenarios import PartitionSpec

__all__ = ["partition"]


def partition(
    labels: NDArray[np.int64], spec: PartitionSpec, *, clients: int, seed: int
) -> list[NDArray[np.int64]]:
    """Indices of the examples that each client holds; disjoint, together all of them.

    Flower's partitioners do the work, on a data set of labels in memory.

    Args:
        labels: one label per example.
        spec: kind and parameters.
        clients: number of partitions.
        seed: of the draw.

    Raises:
        DataError: flwr-datasets is missing, or the draw never reaches the minimum size.
    """
    try:
        import datasets
        from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, Partitioner
    except ImportError as error:
        raise DataError(
            "partitions are drawn by flwr-datasets: pip install 'prunecast[sim]'"
        ) from error
    columns = {"label": labels, "index": np.arange(len(labels))}
    table = datasets.Dataset.from_dict(columns)
    chosen: Partitioner
    if spec.kind == "iid":
        table = table.shuffle(seed=seed, keep_in_memory=True)
        chosen = IidPartitioner(num_partitions=clients)
    else:
        chosen = DirichletPartitioner(
            num_partitions=clients,
            partition_by="label",
            alpha=spec.alpha,
            min_partition_size=spec.min_size,
            seed=seed,
        )
    chosen.dataset = table
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of every draw that is repeated, as asked
            return [
                np.asarray(chosen.load_partition(number)["index"], dtype=np.int64)
                for number in range(clients)
            ]
    except ValueError as error:
        raise DataError(
            f"{len(labels)} examples cannot be spread over {clients} clients with at least "
            f"{spec.min_size} each: lower partition.min_size or clients.count, or raise "
            f"partition.alpha ({error})"
        ) from error
