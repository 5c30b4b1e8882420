"""Tensors of every kind that checkpoint files hold."""

from __future__ import annotations

import numpy as np

from prunecast.compression.files.tensors import FileTensor

FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")


def every_kind(seed: int = 0) -> dict[str, FileTensor]:
    """Tensors of every dtype, with every bit pattern of the small ones."""
    rng = np.random.default_rng(seed)
    tensors = {
        "weight": rng.normal(size=(40, 50)).astype(np.float32),
        "half": rng.normal(size=(30, 40)).astype(np.float16),
        "double": rng.laplace(size=(20, 3, 3)),
        "specials": np.array([np.nan, -np.inf, -0.0, 1e-45], np.float32),
        "mask": rng.random((9, 7)) < 0.3,
        "scalar": np.array(7),
        "empty": np.zeros((0, 4), np.float32),
        "prunecast:steps": np.array([1.0, 2.0], np.float32),
        "näme/with.all:sorts": np.array([3], np.uint64),
    }
    for dtype in ("int8", "int16", "int32", "uint8", "uint16", "uint32"):
        info = np.iinfo(dtype)
        tensors[dtype] = rng.integers(info.min, info.max, (5, 6), dtype, endpoint=True)
    made = {
        name: FileTensor(np.asarray(x), np.asarray(x).dtype.name) for name, x in tensors.items()
    }
    made["bfloat16"] = FileTensor(np.arange(1 << 16, dtype=np.uint16).reshape(256, 256), "bfloat16")
    for name in FLOAT8:
        made[name] = FileTensor(np.arange(256, dtype=np.uint8), name)
    return made


def assert_same(found: FileTensor, expected: FileTensor) -> None:
    """dtype, shape and every bit."""
    assert found.dtype == expected.dtype
    assert found.values.dtype == expected.values.dtype
    assert found.values.shape == expected.values.shape
    assert found.values.tobytes() == expected.values.tobytes()
