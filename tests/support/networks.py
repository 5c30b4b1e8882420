"""Factories of networks for 28 x 28 images, some of which are of no use, and one of tokens."""

from __future__ import annotations

import torch
from torch import nn


def two() -> nn.Module:
    """A network of two classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 2))


def normalised() -> nn.Module:
    """A network that normalises over the batch, which a batch of one example cannot be."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10))


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(x.flatten(1)), x


def pair() -> nn.Module:
    """A network that returns two tensors."""
    return _Pair()


def number() -> int:
    """No network at all."""
    return 3


def fails() -> nn.Module:
    """A factory that raises."""
    raise ZeroDivisionError("division by zero")


class _Together(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1 and not self.training:
            raise ValueError("one example is no batch")
        return self.layer(x.flatten(1))


def together() -> nn.Module:
    """A network that answers no single example."""
    return _Together()


def frozen() -> nn.Module:
    """A network of which only the biases are trained."""
    layer = nn.Linear(784, 10)
    layer.weight.requires_grad_(False)
    return nn.Sequential(nn.Flatten(), layer)


class Tied(nn.Module):
    """Tokens, of which the head has the same weight as the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.tokens(x))
