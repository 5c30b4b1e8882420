"""A multilayer perceptron of 407,050 weights, and arrays as plain Flower or through zstd."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import zstandard
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

__all__ = ["ZSTD", "accuracy", "examples", "initial", "packed", "train", "unpacked"]

Weights = dict[str, NDArray[np.float32]]

ZSTD = "dense-zstd"
"""The arm whose arrays travel through zstd, each by itself; also their serialisation type."""
LEVEL = 3
HIDDEN = 512
RATE, MOMENTUM, BATCH = 0.02, 0.9, 32


def initial(seed: int) -> Weights:
    """Weights as He et al. 2015 draw them."""
    rng = np.random.default_rng(seed)

    def drawn(rows: int, columns: int) -> NDArray[np.float32]:
        return rng.standard_normal((rows, columns), np.float32) * np.float32((2 / rows) ** 0.5)

    return {
        "hidden.weight": drawn(784, HIDDEN),
        "hidden.bias": np.zeros(HIDDEN, np.float32),
        "output.weight": drawn(HIDDEN, 10),
        "output.bias": np.zeros(10, np.float32),
    }


def examples(path: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images, (n, 784) in [0, 1], and labels."""
    with np.load(path) as archive:
        return archive["x"].reshape(-1, 784), archive["y"]


def _forward(
    weights: Mapping[str, NDArray[np.float32]], x: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    hidden = np.maximum(x @ weights["hidden.weight"] + weights["hidden.bias"], 0)
    return hidden, hidden @ weights["output.weight"] + weights["output.bias"]


def accuracy(
    weights: Mapping[str, NDArray[np.float32]], x: NDArray[np.float32], y: NDArray[np.int64]
) -> float:
    """The fraction of images that are told right."""
    return float(np.mean(_forward(weights, x)[1].argmax(1) == y))


def train(weights: Weights, x: NDArray[np.float32], y: NDArray[np.int64], seed: int) -> Weights:
    """One epoch of SGD with momentum on the cross entropy."""
    weights = {name: array.copy() for name, array in weights.items()}
    speed = {name: np.zeros_like(array) for name, array in weights.items()}
    order = np.random.default_rng(seed).permutation(len(x))
    for start in range(0, len(x), BATCH):
        batch = order[start : start + BATCH]
        hidden, scores = _forward(weights, x[batch])
        scores = np.exp(scores - scores.max(1, keepdims=True))
        wrong = scores / scores.sum(1, keepdims=True)
        wrong[np.arange(len(batch)), y[batch]] -= 1
        wrong /= np.float32(len(batch))
        back = (wrong @ weights["output.weight"].T) * (hidden > 0)
        gradients = {
            "hidden.weight": x[batch].T @ back,
            "hidden.bias": back.sum(0),
            "output.weight": hidden.T @ wrong,
            "output.bias": wrong.sum(0),
        }
        for name, gradient in gradients.items():
            speed[name] = MOMENTUM * speed[name] + gradient
            weights[name] -= np.float32(RATE) * speed[name]
    return weights


def packed(record: ArrayRecord) -> ArrayRecord:
    """Every array of a record through zstd."""
    coder = zstandard.ZstdCompressor(LEVEL)
    return ArrayRecord(
        {
            name: Array(dtype=a.dtype, shape=a.shape, stype=ZSTD, data=coder.compress(a.data))
            for name, a in record.items()
        }
    )


def unpacked(record: ArrayRecord) -> ArrayRecord:
    """What `packed` was given."""
    coder = zstandard.ZstdDecompressor()
    plain = Array(np.zeros(1, np.float32)).stype
    return ArrayRecord(
        {
            name: Array(dtype=a.dtype, shape=a.shape, stype=plain, data=coder.decompress(a.data))
            for name, a in record.items()
        }
    )
