"""A checkpoint with a tensor of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunecast.compression.files.formats import write_tensors
from prunecast.compression.files.tensors import FileTensor
from support.checkpoints import every_kind


@pytest.fixture
def kinds() -> dict[str, FileTensor]:
    return every_kind()


@pytest.fixture
def checkpoint(tmp_path: Path, kinds: dict[str, FileTensor]) -> Path:
    """A .safetensors file with all of them."""
    path = tmp_path / "model.safetensors"
    write_tensors(path, kinds, {"format": "pt", "ключ": "значение"})
    return path
