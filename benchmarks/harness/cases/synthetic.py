"""Seeded synthetic tensors: no training, no download, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .case import Case, case
from .quantising import largest, to_error

__all__ = ["ARCHITECTURES", "QUICK", "synthetic_cases"]

ARCHITECTURES: dict[str, dict[str, tuple[int, ...]]] = {
    "lenet": {
        "c1": (6, 1, 5, 5), "c2": (16, 6, 5, 5), "f1": (84, 400), "f2": (84, 84), "f3": (10, 84),
    },
    "lstm": {"ih0": (512, 28), "hh0": (512, 128), "ih1": (512, 128), "hh1": (512, 128)},
    "transformer": {
        f"l{i}.{n}": shape
        for i in range(3)
        for n, shape in {
            "qkv": (384, 128), "out": (128, 128), "up": (512, 128), "down": (128, 512),
            "norm": (128,),
        }.items()
    },
    "embedding": {"table": (20_000, 64)},
    "resnet": {
        "stem": (32, 1, 3, 3),
        **{
            f"b{i}.{j}": shape
            for i, (a, b) in enumerate([(32, 64), (64, 128), (128, 256)])
            for j, shape in enumerate([(b, a, 3, 3), (b,), (b, b, 3, 3), (b,), (b, a, 1, 1)])
        },
        "head": (10, 256),
    },
}  # fmt: skip
"""Shapes of tensors by the architecture they imitate."""

QUICK = ("lenet", "lstm")
"""The small ones of them."""


def _values(name: str, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Laplacian values whose scale is a product over rows and columns, as updates have it."""
    rng = np.random.default_rng(seed)
    out = {}
    for key, shape in ARCHITECTURES[name].items():
        rows = np.exp(0.6 * rng.normal(size=(shape[0], *[1] * (len(shape) - 1))))
        columns = np.exp(0.4 * rng.normal(size=(1, *shape[1:]))) if len(shape) > 1 else 1.0
        out[key] = (rng.laplace(size=shape) * rows * columns).astype(np.float32)
    return out


def synthetic_cases(name: str) -> Iterator[Case]:
    """Cases of one of :data:`ARCHITECTURES`, named ``synthetic-NAME/...``."""
    head = f"synthetic-{name}/"
    values = _values(name)
    for error in (0.01, 0.25, 0.6):
        yield case(f"{head}update-{error}", "update", dict(to_error(values, error)))
    rng = np.random.default_rng(1)
    weights = largest(to_error(values, 0.05), 0.1)
    yield case(f"{head}pruned", "pruned", dict(weights))
    delta, update = {}, {}
    for k, q in weights.items():
        moved = rng.integers(-1, 2, q.shape) * (rng.random(q.shape) < 0.15) * (q != 0)
        delta[k] = np.where(rng.random(q.shape) < 0.02, -q, moved).astype(np.int32)
        sent = rng.random(q.shape) < 0.06
        some = rng.choice([-2, -1, -1, 1, 1, 2], q.shape)
        update[k] = (some * sent * (q != 0)).astype(np.int32)
    yield case(f"{head}delta", "delta", delta, previous=dict(weights))
    mask = {k: q != 0 for k, q in weights.items()}
    yield case(f"{head}masked", "masked", update, mask=dict(mask))
    near = {
        k: (v + 0.01 * v.std() * rng.normal(size=v.shape)).astype(np.float32)
        for k, v in values.items()
    }
    yield case(f"{head}float", "float", dict(near))
    yield case(f"{head}float-delta", "float-delta", dict(near), previous=dict(values))
