"""Arrays of a file, or of a folder with one file to train on and one to measure with."""

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
        path: of the file, or of a folder that holds ``train.npz`` and, to measure with,
            ``test.npz``.
        inputs: names of the arrays that the network takes, in its order.
        targets: name of the array of targets.
        identity: name of the array that says whose each example is; empty for none.
        dtype: of the inputs: "float32" converts them, "stored" leaves each as it is.
        max_bytes: most bytes that the arrays may take; by default 1 GiB, or 64 times the file.
    """

    path: str = ""
    inputs: tuple[str, ...] = ("x",)
    targets: str = "y"
    identity: str = ""
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
        """The arrays that are named, of the file or of ``train.npz``."""
        path = Path(self.path)
        return self._file(path / "train.npz" if path.is_dir() else path)

    def read_test(self) -> Examples | None:
        """Those of ``test.npz``; None where `path` is a file."""
        path = Path(self.path)
        return self._file(path / "test.npz") if path.is_dir() else None

    def _file(self, path: Path) -> Examples:
        try:
            archive = NpzArchive(path, max_bytes=self.max_bytes)
            inputs = {name: np.atleast_1d(archive.read(name)) for name in self.inputs}
            targets = np.atleast_1d(archive.read(self.targets))
            whose = archive.read(self.identity) if self.identity else None
        except NpzTooLarge as error:
            remedy = str(error).replace("--max-bytes", "data.max_bytes in the scenario")
            raise DataError(remedy) from error
        except NpzError as error:
            told = f"data.path: cannot read the data: {error}"
            if isinstance(error.__cause__, OSError):
                told += "; name an .npz file, by its path from the folder of the scenario's file"
            raise DataError(told) from error
        except KeyError as error:
            held = ", ".join(map(repr, archive.members)) or "nothing"
            raise DataError(
                f"{path} has no array {error}, it holds {held}: name them by data.inputs, "
                "data.targets and data.identity"
            ) from error
        if whose is not None and (whose.ndim != 1 or whose.dtype.kind not in "iu"):
            raise DataError(
                f"{self.identity!r} is {whose.dtype}{list(whose.shape)}: an identity is a whole "
                "number for each example, numpy.unique(names, return_inverse=True)[1]"
            )
        if self.dtype == "float32":
            inputs = {name: np.asarray(v, dtype=np.float32) for name, v in inputs.items()}
        return Examples(inputs, targets, None if whose is None else whose.astype(np.int64))
