"""An item table learned from invented interactions: only the rows that a client meets move."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from prunecast.simulations.networks.factorisation import ItemScores

__all__ = ["Recommender"]

ITEMS, WIDTH, HISTORY = 20_000, 64, 16


@dataclass
class Recommender:
    """Users of planted taste and items of Zipf popularity; pairwise ranking (Rendle et al. 2009).

    Attributes:
        clients: number of clients; each holds its own users.
        users: users of one client.
        steps: minibatches of a round.
        batch: users of a minibatch.
    """

    clients: int
    users: int = 300
    steps: int = 20
    batch: int = 64

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        popularity = -np.log1p(rng.permutation(ITEMS))
        traits = rng.normal(size=(ITEMS, 8))
        seen = []
        for _ in range(self.clients * self.users):
            appeal = popularity + traits @ rng.normal(size=8)
            # the largest of Gumbel-perturbed scores: a draw without replacement
            drawn = appeal + rng.gumbel(size=ITEMS)
            seen.append(rng.permutation(np.argpartition(-drawn, HISTORY + 4)[: HISTORY + 4]))
        self.seen = np.array(seen).reshape(self.clients, self.users, HISTORY + 4)

    def build(self) -> nn.Module:
        """The network."""
        return ItemScores(ITEMS, WIDTH)

    def optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """Adam, whose steps leave rows alone that were never met."""
        return torch.optim.Adam(model.parameters(), 0.005)

    def loss(self, model: nn.Module, client: int, rng: np.random.Generator) -> Tensor:
        """Bayesian personalised ranking: a seen item above a random one."""
        rows = self.seen[client, rng.choice(self.users, self.batch, replace=False)]
        # the last two items of every user are held out
        order = rng.permutation(HISTORY + 2)
        history, item = torch.tensor(rows[:, order[:-1]]), torch.tensor(rows[:, order[-1]])
        other = torch.tensor(rng.integers(0, ITEMS, self.batch))
        return nn.functional.softplus(model(history, other) - model(history, item)).mean()

    def score(self, model: nn.Module) -> float:
        """Share of held-out items ranked above a random one."""
        rng = np.random.default_rng(1)
        rows = self.seen.reshape(-1, HISTORY + 4)
        history = torch.tensor(rows[:, :HISTORY])
        right = [
            model(history, torch.tensor(rows[:, at]))
            > model(history, torch.tensor(rng.integers(0, ITEMS, len(rows))))
            for at in (HISTORY + 2, HISTORY + 3)
        ]
        return float(torch.stack(right).float().mean())
