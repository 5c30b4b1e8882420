"""Where trained tensors lie: one .npz for each model, in a folder that is kept."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MODELS", "default_folder", "load", "missing", "save"]

MODELS = ("lenet", "lstm", "transformer", "recommender", "cnn", "resnet")
"""Names of the trained models, smallest effort first."""

# Raised when the training script changes what it makes, so that old files are not mistaken.
_EDITION = "1"

Tensors = dict[str, NDArray[Any]]


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/prunecast/benchmark-models``, by default under ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "prunecast" / "benchmark-models"


def _path(folder: Path, model: str) -> Path:
    return folder / f"{model}.{_EDITION}.npz"


def missing(folder: Path) -> list[str]:
    """Models that the folder does not hold in the current edition."""
    return [m for m in MODELS if not _path(folder, m).is_file()]


def save(folder: Path, model: str, tensors: Mapping[str, NDArray[Any]]) -> Path:
    """Write one model's tensors; a reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
        try:
            np.savez_compressed(file, allow_pickle=False, **dict(tensors))
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(file.name)
            raise
    target = _path(folder, model)
    os.replace(file.name, target)
    return target


def load(folder: Path, model: str) -> dict[str, Tensors]:
    """Tensors of one model by snapshot, such as ``dense-late.update``."""
    out: dict[str, Tensors] = {}
    with np.load(_path(folder, model), allow_pickle=False) as archive:
        for key in archive.files:
            snapshot, _, tensor = key.partition("/")
            out.setdefault(snapshot, {})[tensor] = archive[key]
    return out
