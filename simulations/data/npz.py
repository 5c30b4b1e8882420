"""Arrays of a file."""

from __future__ import annotations

import dataclasses
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np

from prunecast.simulations.data import DataError, DataSource, Examples
from prunecast.simulations.kinds import ScenarioError

__all__ = ["Npz"]


@dataclass(frozen=True)
class Npz(DataSource):
    """Arrays of an ``.npz`` file, examples first.

    Attributes:
        path: of the file.
        inputs: names of the arrays that the network takes, in its order.
        targets: name of the array of targets.
        dtype: of the inputs: "float32" converts them, "stored" leaves each as it is.
    """

    path: str = ""
    inputs: tuple[str, ...] = ("x",)
    targets: str = "y"
    dtype: Literal["float32", "stored"] = "float32"

    def check(self, key: str) -> None:
        """A file is named, and arrays in it."""
        if not self.path:
            raise ScenarioError(f"{key}.path", "is missing", "source = 'npz' reads a file: name it")
        if not self.inputs:
            raise ScenarioError(f"{key}.inputs", "names no array", "name at least one")

    def located(self, folder: Path) -> Self:
        """The file is looked for in the folder of the scenario file."""
        return dataclasses.replace(self, path=str(folder / self.path))

    def read(self) -> Examples:
        """The arrays that are named."""
        try:
            with np.load(Path(self.path), allow_pickle=False) as file:
                inputs = {name: np.atleast_1d(file[name]) for name in self.inputs}
                targets = np.atleast_1d(file[self.targets])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            names = " and ".join(repr(name) for name in (*self.inputs, self.targets))
            raise DataError(f"cannot read arrays {names} from {self.path}: {error}") from error
        if self.dtype == "float32":
            inputs = {name: np.asarray(v, dtype=np.float32) for name, v in inputs.items()}
        return Examples(inputs, targets)
