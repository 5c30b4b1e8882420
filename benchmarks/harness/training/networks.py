"""The networks whose tensors are measured: what federated learning trains on small devices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Lstm", "ResNet", "Transformer", "cnn", "lenet"]


def lenet() -> nn.Module:
    """LeNet-5 with a narrow head; 44,246 parameters. Input (n, 1, 28, 28)."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 84), nn.ReLU(), nn.Linear(84, 84), nn.ReLU()),
        nn.Linear(84, 10),
    )


def cnn() -> nn.Module:
    """The MNIST network of McMahan et al. 2017, section 3; 1,663,370 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10)),
    )


class _Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, outer)
        self.short: nn.Module = nn.Identity()
        if stride > 1 or inner != outer:
            self.short = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride, bias=False), nn.GroupNorm(8, outer)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.short(x))


class ResNet(nn.Module):
    """ResNet-18 of half width with GroupNorm instead of BatchNorm; 2.8 million parameters.

    GroupNorm, because batch statistics of unlike clients do not average (Hsieh et al. 2020).
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 64, 128, 256)
        self.stem = nn.Conv2d(1, widths[0], 3, 2, 1, bias=False)
        self.norm = nn.GroupNorm(8, widths[0])
        blocks: list[nn.Module] = []
        for i, width in enumerate(widths):
            blocks += [_Block(widths[max(i - 1, 0)], width, 2 if i else 1), _Block(width, width, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 28, 28)."""
        x = self.blocks(torch.relu(self.norm(self.stem(x))))
        return torch.as_tensor(self.head(x.mean((2, 3))))


class Transformer(nn.Module):
    """Three encoder layers of width 128 that read an image row by row; 0.6 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        width = 128
        self.enter = nn.Linear(28, width)
        self.position = nn.Parameter(torch.randn(28, width) * 0.02)
        self.ink = nn.Embedding(64, width)
        nn.init.normal_(self.ink.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 512, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 28, 28)."""
        rows = x[:, 0]
        token = (rows.sum(2) * 2).long().clamp(0, 63)
        x = self.layers(self.enter(rows) + self.position + self.ink(token))
        return torch.as_tensor(self.head(x.mean(1)))


class Lstm(nn.Module):
    """Two LSTM layers of width 128 that read an image row by row; 0.2 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(28, 128, 2, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 28, 28)."""
        return torch.as_tensor(self.head(self.layers(x[:, 0])[0].mean(1)))
