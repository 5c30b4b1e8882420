"""Examples made up here, with something in them to learn: no download, no package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from prunecast.simulations.data import DataSource, Examples
from prunecast.simulations.kinds import Range

__all__ = ["Synthetic"]

# Of each shape; factories of `prunecast.simulations.networks` have the same defaults.
_VOCABULARY, _STEPS = 32, 32
_NODES, _FEATURES, _COMMUNITIES = 60, 16, 4
_USERS, _ITEMS, _RANK = 200, 300, 4
_CHANNELS, _SAMPLES, _MOVEMENTS = 6, 64, 6
_COLUMNS, _CLASSES = 20, 3


@dataclass(frozen=True)
class Synthetic(DataSource):
    """Seeded examples of one shape.

    ============= ============================================== ================================
    `shape`       inputs                                         targets
    ============= ============================================== ================================
    "sequences"   tokens (32,) of 32, int64                      the next tokens (32,)
    "graphs"      features (60, 16), adjacency (60, 60), float32 communities of nodes (60,), of 4
    "ratings"     user of 200, item of 300, int64                1 to 5 in halves
    "sensors"     x (6, 64), float32                             a movement of 6
    "tables"      x (20,), float32                               a class of 3
    ============= ============================================== ================================

    A rating belongs to its user, and every graph to somebody else, for natural partitions.

    Attributes:
        shape: what is made.
        count: examples; a graph is one.
        seed: of the structure and the examples; that of the scenario spreads them.
    """

    shape: Literal["sequences", "graphs", "ratings", "sensors", "tables"] = "tables"
    count: Annotated[int, Range(1)] = 5000
    seed: Annotated[int, Range(0)] = 0

    unused = ("path",)

    def read(self) -> Examples:
        """The examples."""
        rng = np.random.default_rng([self.seed, sorted(_SHAPES).index(self.shape)])
        return _SHAPES[self.shape](rng, self.count)


def _sequences(rng: np.random.Generator, count: int) -> Examples:
    """After most tokens one of two follows, by the token before: the best guess is right 4 in 5."""
    follows = rng.integers(0, _VOCABULARY, (2, _VOCABULARY))
    tokens = rng.integers(0, _VOCABULARY, (count, _STEPS + 1))
    odd = rng.random((count, _STEPS + 1)) < 0.2  # a token that follows from nothing
    for at in range(2, _STEPS + 1):
        # high tokens two places back choose the other successor
        following = follows[tokens[:, at - 2] * 2 // _VOCABULARY, tokens[:, at - 1]]
        tokens[:, at] = np.where(odd[:, at], tokens[:, at], following)
    return Examples({"tokens": tokens[:, :-1].copy()}, tokens[:, 1:].copy())


def _graphs(rng: np.random.Generator, count: int) -> Examples:
    """Communities that share edges (a stochastic block model); features alone tell them poorly."""
    centres = rng.normal(size=(_COMMUNITIES, _FEATURES)).astype(np.float32)
    labels = rng.integers(0, _COMMUNITIES, (count, _NODES))
    noise = rng.normal(scale=3.0, size=(count, _NODES, _FEATURES)).astype(np.float32)
    same = labels[:, :, None] == labels[:, None, :]
    drawn = np.triu(rng.random(same.shape) < np.where(same, 0.3, 0.02), 1)
    linked = (drawn | drawn.transpose(0, 2, 1) | np.eye(_NODES, dtype=bool)).astype(np.float32)
    root = linked.sum(2) ** -0.5
    adjacency = linked * root[:, :, None] * root[:, None, :]
    inputs = {"features": centres[labels] + noise, "adjacency": adjacency}
    return Examples(inputs, labels, np.arange(count))


def _ratings(rng: np.random.Generator, count: int) -> Examples:
    """Tastes and traits of rank 4, a bias of each item, a little noise."""
    tastes, traits = rng.normal(size=(_USERS, _RANK)), rng.normal(size=(_ITEMS, _RANK))
    bias = rng.normal(scale=0.5, size=_ITEMS)
    user, item = rng.integers(0, _USERS, count), rng.integers(0, _ITEMS, count)
    liking = (tastes[user] * traits[item]).sum(1) * 0.5 + bias[item]
    rating = 3.0 + liking + rng.normal(scale=0.2, size=count)
    stars = np.clip(np.round(rating * 2) / 2, 1, 5)
    return Examples({"user": user, "item": item}, stars, user)


def _sensors(rng: np.random.Generator, count: int) -> Examples:
    """Each movement has its own frequency and strength on every axis; all begin together."""
    rate = rng.uniform(0.5, 6.0, (_MOVEMENTS, _CHANNELS))
    strength = rng.uniform(0.0, 1.0, (_MOVEMENTS, _CHANNELS))
    labels = rng.integers(0, _MOVEMENTS, count)
    begin = rng.uniform(0, 0.3, (count, 1, 1))
    phase = rate[labels][:, :, None] * np.arange(_SAMPLES) / _SAMPLES + begin
    wave = strength[labels][:, :, None] * np.sin(2 * np.pi * phase)
    noise = rng.normal(scale=0.5, size=wave.shape)
    return Examples({"x": (wave + noise).astype(np.float32)}, labels)


def _tables(rng: np.random.Generator, count: int) -> Examples:
    """Scores that are linear in the columns, and in products of some: a line gets part of it."""
    x = rng.normal(size=(count, _COLUMNS))
    scores = x @ rng.normal(size=(_COLUMNS, _CLASSES))
    pairs = rng.permutation(_COLUMNS).reshape(2, -1)
    scores += (x[:, pairs[0]] * x[:, pairs[1]]) @ rng.normal(size=(_COLUMNS // 2, _CLASSES))
    return Examples({"x": x.astype(np.float32)}, scores.argmax(1))


_SHAPES: dict[str, Callable[[np.random.Generator, int], Examples]] = {
    "sequences": _sequences,
    "graphs": _graphs,
    "ratings": _ratings,
    "sensors": _sensors,
    "tables": _tables,
}
