"""Makes the golden vectors of the schemes; run by hand when a new major version is born.

    python tests/compression/schemes/make_vectors.py

Tests only read what is committed: a payload per scheme and coding, and what it must decode to.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prunecast.compression.schemes.layout import layout_of
from prunecast.compression.schemes.registry import scheme

FOLDER = Path(__file__).parent / "vectors"
CASES = {
    "topk": ("topk", {"density": 0.1}),
    "topk8": ("topk", {"density": 0.2, "value_bits": 8, "scope": "payload"}),
    "stc": ("stc", {"density": 0.1}),
    "stc_tensor": ("stc", {"density": 0.3, "scope": "tensor"}),
    "qsgd_sparse": ("qsgd", {"levels": 4, "bucket": 64, "elias": "sparse"}),
    "qsgd_dense": ("qsgd", {"levels": 30, "bucket": 0, "elias": "dense"}),
    "signsgd": ("signsgd", {"step": 0.0}),
    "int8": ("int8", {}),
    "int4": ("int4", {}),
    "fp16": ("fp16", {}),
}


def main() -> None:
    """Write every vector."""
    rng = np.random.default_rng(2026)
    tensors = {
        "layer.weight": rng.laplace(size=(12, 25)).astype("f4"),
        "layer.bias": rng.normal(size=12).astype("f4"),
        "größe": np.float32(0.75).reshape(()),
        "empty": np.zeros((0, 3), "f4"),
    }
    FOLDER.mkdir(exist_ok=True)
    for case, (name, options) in CASES.items():
        for coding in ("paper", "prunecast"):
            one = scheme(name, coding=coding, **options)  # type: ignore[arg-type]
            payload, _ = one.encode(tensors, one.init(layout_of(tensors)), key=7)
            (FOLDER / f"{case}-{coding}.bin").write_bytes(payload)
            decoded = one.decode(payload)
        np.savez_compressed(FOLDER / f"{case}.npz", **decoded)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
