"""A tiny scenario on data made up here, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 28 x 28 images: a bright quarter each, under noise."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 3, 240)
    images = rng.random((240, 1, 28, 28), dtype=np.float32) * 0.5
    for label, (row, column) in enumerate([(0, 0), (0, 14), (14, 0)]):
        images[labels == label, :, row : row + 14, column : column + 14] += 0.4
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, x=images, y=labels)
    return path


@pytest.fixture
def tiny(digits: Path) -> dict[str, Any]:
    """A scenario as a mapping."""
    return {
        "schema": 1,
        "name": "tiny",
        "seed": 3,
        "rounds": 3,
        "data": {"source": "npz", "path": str(digits), "held_out": 60},
        "partition": {"kind": "dirichlet", "alpha": 1.0, "min_size": 5},
        "clients": {"count": 3},
        "model": {"initial": "drawn"},
        "training": {"batch_size": 16, "device": "cpu"},
        "engine": {"backend": "inline"},
        "arms": {
            "dense": {"kind": "dense"},
            "dense-zstd": {"kind": "recoded", "of": "dense", "level": 3},
            "prunecast": {
                "kind": "prunecast",
                "preset": "small",
                "policy": {"pruning_begin": 1, "pruning_end": 3, "sparsity": 0.8},
            },
        },
    }
