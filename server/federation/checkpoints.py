"""Checkpoints: the master weights and where their stream of versions stands, in one file.

The file is an ordinary safetensors file of the master weights, so every tool reads it; what a
resumed run needs beside them is in its metadata. Nodes of a resumed run start with a keyframe,
since Flower gives it a new run id.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.common.files import replacing
from prunecast.server.federation.errors import CheckpointError

__all__ = ["Checkpoint"]

_METADATA = "prunecast"
_SCHEMA = 1
_UNUSABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """State of one stream.

    Attributes:
        arrays: master weights, name to array.
        counter: number of the version last published, which the pruning schedule goes on from.
        steps: lattice step per tensor.
        key: record key of the stream.
    """

    arrays: Mapping[str, NDArray[Any]]
    counter: int
    steps: Mapping[str, float]
    key: str = "arrays"

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            StorageError: the file system refuses; an old file is untouched.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        meta = {
            "schema": _SCHEMA,
            "counter": self.counter,
            "steps": dict(self.steps),
            "key": self.key,
            "order": list(self.arrays),
        }
        arrays = {name: np.asarray(array, order="C") for name, array in self.arrays.items()}
        with replacing(Path(path)) as temporary:
            try:
                save_file(arrays, temporary, metadata={_METADATA: json.dumps(meta)})
            except SafetensorError as error:
                raise OSError(str(error)) from error

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a file that `save` wrote.

        Raises:
            CheckpointError: missing, damaged, or a safetensors file without our metadata.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                meta = json.loads((file.metadata() or {})[_METADATA])
                arrays = {name: file.get_tensor(name) for name in meta["order"]}
            steps = {str(name): float(step) for name, step in meta["steps"].items()}
            counter = int(meta["counter"])
            if meta["schema"] != _SCHEMA or counter < 0:
                raise ValueError(f"schema {meta['schema']!r} or counter {counter} is not supported")
            if not all(math.isfinite(step) and step > 0 for step in steps.values()):
                raise ValueError("a lattice step is not a positive number")
            return cls(arrays, counter, steps, str(meta["key"]))
        except (*_UNUSABLE, SafetensorError) as error:
            raise CheckpointError(
                f"{path} is not a usable checkpoint ({error}): give a file that "
                "Checkpoint.save wrote"
            ) from error
