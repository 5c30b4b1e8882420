"""The networks whose tensors are measured: what federated learning trains on small devices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = [
    "Lstm",
    "ResNet",
    "SmallResNet",
    "Transformer",
    "cnn",
    "lenet",
    "small_lstm",
    "small_resnet_batch",
    "small_resnet_group",
    "small_transformer",
]


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


def _group(width: int) -> nn.Module:
    return nn.GroupNorm(8, width)


class _Block(nn.Module):
    def __init__(
        self, inner: int, outer: int, stride: int, norm: Callable[[int], nn.Module] = _group
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = norm(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = norm(outer)
        self.short: nn.Module = nn.Identity()
        if stride > 1 or inner != outer:
            self.short = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), norm(outer))

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


class SmallResNet(nn.Module):
    """Four residual blocks of widths 16 to 64 after a stem of stride 2; 0.15 million parameters."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 2, 1, bias=False)
        self.norm = norm(16)
        self.blocks = nn.Sequential(
            *(_Block(16, 16, 1, norm), _Block(16, 32, 2, norm)),
            *(_Block(32, 64, 2, norm), _Block(64, 64, 1, norm)),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 28, 28)."""
        x = self.blocks(torch.relu(self.norm(self.stem(x))))
        return torch.as_tensor(self.head(x.mean((2, 3))))


def small_resnet_group() -> nn.Module:
    """`SmallResNet` with GroupNorm; 151,738 parameters."""
    return SmallResNet(_group)


def small_resnet_batch() -> nn.Module:
    """`SmallResNet` with BatchNorm."""
    return SmallResNet(nn.BatchNorm2d)


def small_lstm() -> nn.Module:
    """One LSTM layer of width 128."""
    return Lstm(layers=1)


def small_transformer() -> nn.Module:
    """Two encoder layers of width 64."""
    return Transformer(width=64, layers=2)


class Transformer(nn.Module):
    """Encoder layers that read an image row by row; of width 128 and three, 0.6 million weights."""

    def __init__(self, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.enter = nn.Linear(28, width)
        self.position = nn.Parameter(torch.randn(28, width) * 0.02)
        self.ink = nn.Embedding(64, width)
        nn.init.normal_(self.ink.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 28, 28)."""
        rows = x[:, 0]
        token = (rows.sum(2) * 2).long().clamp(0, 63)
        x = self.layers(self.enter(rows) + self.position + self.ink(token))
        return torch.as_tensor(self.head(x.mean(1)))


class Lstm(nn.Module):
    """LSTM layers of width 128 that read an image row by row; of two, 0.2 million parameters."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.LSTM(28, 128, layers, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 28, 28)."""
        return torch.as_tensor(self.head(self.layers(x[:, 0])[0].mean(1)))
