"""Arrays of a file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np

from prunecast.common.npz import NpzArchive, NpzError, NpzTooLarge
from prunecast.simulations.data import DataError, DataSource, Examples
from prunecast.simulations.kinds import Range, ScenarioError

__all__ = ["Npz"]


@dataclass(frozen=True)
class Npz(DataSource):
    """Arrays of an ``.npz`` file, examples first.

    Attributes:
        path: of the file.
        inputs: names of the arrays that the network takes, in its order.
        targets: name of the array of targets.
        dtype: of the inputs: "float32" converts them, "stored" leaves each as it is.
        max_bytes: most bytes that the arrays may take; by default 1 GiB, or 64 times the file.
    """

    path: str = ""
    inputs: tuple[str, ...] = ("x",)
    targets: str = "y"
    dtype: Literal["float32", "stored"] = "float32"
    max_bytes: Annotated[int | None, Range(1)] = None

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
            archive = NpzArchive(Path(self.path), max_bytes=self.max_bytes)
            inputs = {name: np.atleast_1d(archive.read(name)) for name in self.inputs}
            targets = np.atleast_1d(archive.read(self.targets))
        except NpzTooLarge as error:
            remedy = str(error).replace("--max-bytes", "data.max_bytes in the scenario")
            raise DataError(remedy) from error
        except NpzError as error:
            raise DataError(f"cannot read the data: {error}") from error
        except KeyError as error:
            held = ", ".join(map(repr, archive.members)) or "nothing"
            raise DataError(
                f"{self.path} has no array {error}, it holds {held}: name them by data.inputs and "
                "data.targets"
            ) from error
        if self.dtype == "float32":
            inputs = {name: np.asarray(v, dtype=np.float32) for name, v in inputs.items()}
        return Examples(inputs, targets)
