"""Data sets and their partitions over clients."""

from prunecast.simulations.data.datasets import Dataset, load_dataset
from prunecast.simulations.data.errors import DataError
from prunecast.simulations.data.partition import partition

__all__ = ["DataError", "Dataset", "load_dataset", "partition"]
