"""Factorisation of ratings, and scores of items from what was seen before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ItemScores", "MatrixFactorisation", "matrix_factorisation"]


class MatrixFactorisation(nn.Module):
    """Ratings as products of user and item, with biases (Koren et al. 2009, equation 4).

    Args:
        users: number of users; they count from 0.
        items: number of items, likewise.
        rank: width of the factors.
        mean: of all ratings, where training begins.
    """

    def __init__(self, users: int, items: int, rank: int, mean: float) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, rank), nn.Embedding(items, rank)
        self.user_bias, self.item_bias = nn.Embedding(users, 1), nn.Embedding(items, 1)
        self.mean = nn.Parameter(torch.tensor([mean]))
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.3 * rank**-0.25)
        for table in (self.user_bias, self.item_bias):
            nn.init.zeros_(table.weight)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Ratings (n, 1) of int64 numbers of users (n,) and items (n,)."""
        product = (self.users(user) * self.items(item)).sum(1, keepdim=True)
        return torch.as_tensor(product + self.user_bias(user) + self.item_bias(item) + self.mean)


def matrix_factorisation(
    users: int = 200, items: int = 300, rank: int = 8, mean: float = 3.5
) -> nn.Module:
    """`MatrixFactorisation`; 4,501 parameters by default, 23,626 for ml-100k."""
    return MatrixFactorisation(users, items, rank, mean)


class ItemScores(nn.Module):
    """Scores an item for a user who is the mean of the items seen before.

    Args:
        items: number of items.
        width: of an embedded item.
    """

    def __init__(self, items: int = 20_000, width: int = 64) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width)
        nn.init.normal_(self.items.weight, std=0.05)
        self.bias = nn.Embedding(items, 1)
        nn.init.zeros_(self.bias.weight)
        self.taste = nn.Linear(width, width)

    def forward(self, history: Tensor, item: Tensor) -> Tensor:
        """Scores (n,) of int64 items (n,), given items seen before (n, seen)."""
        user = self.taste(self.items(history).mean(1))
        return torch.as_tensor((user * self.items(item)).sum(1) + self.bias(item)[:, 0])
