"""The network of `support.classifier` as a torch module, for apps that name a factory."""

from __future__ import annotations

import torch
from torch import nn

from support.classifier import WIDTHS

__all__ = ["Classifier", "spread"]


class Classifier(nn.Module):
    """Two linear layers with a ReLU between them; parameters w1, b1, w2, b2."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(WIDTHS[1], WIDTHS[0]))
        self.b1 = nn.Parameter(torch.zeros(WIDTHS[1]))
        self.w2 = nn.Parameter(torch.randn(WIDTHS[2], WIDTHS[1]))
        self.b2 = nn.Parameter(torch.zeros(WIDTHS[2]))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(nn.functional.linear(inputs, self.w1, self.b1))
        return nn.functional.linear(hidden, self.w2, self.b2)


def spread(module: nn.Module, context: object) -> dict[str, float]:
    """Stands for an evaluation: something that changes from round to round."""
    return {"spread": float(sum(p.detach().abs().mean() for p in module.parameters()))}
