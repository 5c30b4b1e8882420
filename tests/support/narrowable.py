"""A torch module for `prunecast release create --module support.narrowable:make`."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Narrowable", "make", "weights"]


class Narrowable(nn.Module):
    """A convolution with BatchNorm and a linear layer; `factor` shows in no description of it."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return torch.as_tensor(self.fc(x * self.factor))


def make() -> Narrowable:
    """Weights of version 0."""
    torch.manual_seed(11)
    return Narrowable()


def weights(number: int) -> dict[str, torch.Tensor]:
    """Version `number`: half of the channels are far smaller than the others."""
    state = make().state_dict()
    generator = torch.Generator().manual_seed(12)
    state["conv.weight"][::2] *= 1e-3
    for _ in range(number):
        for name, tensor in state.items():
            if tensor.dim() > 1:
                state[name] = tensor + 0.003 * torch.randn(tensor.shape, generator=generator) * (
                    tensor.abs() > 1e-3
                )
    return state
