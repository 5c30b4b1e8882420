"""Autoencoders: what comes out is to be what went in."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["Autoencoder", "autoencoder"]


class Autoencoder(nn.Module):
    """Two layers down to a code and two back.

    Args:
        shape: of an example.
        hidden: width between the example and its code.
        code: width of the code.
    """

    def __init__(self, shape: tuple[int, ...], hidden: int, code: int) -> None:
        super().__init__()
        self.shape, size = shape, math.prod(shape)
        self.encoder = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, code))
        self.decoder = nn.Sequential(nn.Linear(code, hidden), nn.ReLU(), nn.Linear(hidden, size))

    def forward(self, x: Tensor) -> Tensor:
        """(n, *shape) to the same."""
        return torch.as_tensor(self.decoder(self.encoder(x.flatten(1)))).view(-1, *self.shape)


def autoencoder(
    shape: tuple[int, ...] = (1, 28, 28), hidden: int = 128, code: int = 16
) -> nn.Module:
    """`Autoencoder`; 205,856 parameters by default."""
    return Autoencoder(tuple(shape), hidden, code)
