"""Data sets of the Hugging Face Hub through flwr-datasets, where there is a network."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from prunecast.common.text import first_line, quiet
from prunecast.simulations.data import DataError, DataSource, Examples
from prunecast.simulations.data.idx import pictures
from prunecast.simulations.kinds import ScenarioError

__all__ = ["FlowerDatasets"]


@dataclass(frozen=True)
class FlowerDatasets(DataSource):
    """Columns of a data set that `flwr_datasets.FederatedDataset` loads.

    It is fetched when a scenario is checked, once, into the cache of the library `datasets`; the
    processes that train fetch nothing. Images become (channels, height, width) float32 in [0, 1].

    Attributes:
        name: of the data set, such as "ylecun/mnist", or a folder that `datasets` can read.
        subset: of the data set; empty for its default.
        inputs: columns that the network takes, in its order.
        targets: column of targets.
        identity: column that says whose each example is, of texts or whole numbers; empty for none.
        split: to train on.
        test_split: that measures with ``held_out = "test"``; empty for none.
    """

    name: str = ""
    subset: str = ""
    inputs: tuple[str, ...] = ("image",)
    targets: str = "label"
    identity: str = ""
    split: str = "train"
    test_split: str = "test"

    fetches = True

    def check(self, key: str) -> None:
        """A data set is named, and columns of it."""
        if not self.name:
            remedy = 'source = "flower-datasets" loads one: name it, such as "ylecun/mnist"'
            raise ScenarioError(f"{key}.name", "is missing", remedy)
        if not self.inputs:
            raise ScenarioError(f"{key}.inputs", "names no column", "name at least one")

    def located(self, folder: Path) -> Self:
        """A folder is looked for in that of the scenario file."""
        beside = folder / self.name
        return dataclasses.replace(self, name=str(beside)) if beside.is_dir() else self

    def read(self) -> Examples:
        """The columns of `split`."""
        return self._part(self.split)

    def read_test(self) -> Examples | None:
        """Those of `test_split`; None where none is named."""
        return self._part(self.test_split) if self.test_split else None

    def _part(self, split: str) -> Examples:
        table = self._loaded(split)
        wanted = [*self.inputs, self.targets, *([self.identity] if self.identity else [])]
        for column in wanted:
            if column not in table.column_names:
                held = ", ".join(map(repr, table.column_names))
                raise DataError(
                    f"{self.name} has no column {column!r}, it has {held}: name them by "
                    "data.inputs, data.targets and data.identity"
                )
        inputs = {column: _input(table, column, self.name) for column in self.inputs}
        whose = None
        if self.identity:
            names = np.asarray(table.with_format("numpy")[self.identity][:])
            whose = np.unique(names, return_inverse=True)[1].astype(np.int64)
        return Examples(inputs, np.asarray(table.with_format("numpy")[self.targets][:]), whose)

    def _loaded(self, split: str) -> Any:
        try:
            from flwr_datasets import FederatedDataset
        except ImportError as error:
            raise DataError(
                "flwr-datasets is not installed: pip install 'prunecast[sim]'"
            ) from error
        try:
            with quiet("datasets"):
                whole = FederatedDataset(
                    dataset=self.name, subset=self.subset or None, partitioners={}, shuffle=False
                )
                return whole.load_split(split)
        except Exception as error:  # each library of the way raises its own
            raise DataError(
                f"{self.name!r} ({split}) cannot be loaded by flwr-datasets "
                f"({type(error).__name__}: {first_line(error)}): without a network that reaches "
                "huggingface.co use source = 'npz' or 'named'; with one, mend data.name, "
                "data.subset or data.split"
            ) from error


def _input(table: Any, column: str, name: str) -> NDArray[Any]:
    """A column as an array for a network."""
    import datasets

    values = np.asarray(table.with_format("numpy")[column][:])
    if values.dtype == object:
        raise DataError(
            f"column {column!r} of {name} has examples of different sizes: choose another, or "
            "bring them to one size yourself (source = 'function')"
        )
    if isinstance(table.features[column], datasets.Image) and values.dtype == np.uint8:
        if values.ndim == 3:
            return pictures(values)
        return np.asarray(np.moveaxis(values, -1, 1), np.float32) / np.float32(255)
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    return values.astype(np.int64) if values.dtype.kind in "iu" else values
