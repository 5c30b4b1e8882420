"""Residual networks for 28 x 28 grey images, normalised over groups or over the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["ResNet", "SmallResNet", "small_resnet_batch", "small_resnet_group"]


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
    """Four residual blocks after a stem of stride 2; of width 16 to 64, 0.15 million parameters.

    Args:
        norm: makes the normalisation of so many channels.
        width: channels of the stem; the last blocks have four times as many.
    """

    def __init__(self, norm: Callable[[int], nn.Module], width: int = 16) -> None:
        super().__init__()
        twice, most = 2 * width, 4 * width
        self.stem = nn.Conv2d(1, width, 3, 2, 1, bias=False)
        self.norm = norm(width)
        self.blocks = nn.Sequential(
            *(_Block(width, width, 1, norm), _Block(width, twice, 2, norm)),
            *(_Block(twice, most, 2, norm), _Block(most, most, 1, norm)),
        )
        self.head = nn.Linear(most, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 28, 28)."""
        x = self.blocks(torch.relu(self.norm(self.stem(x))))
        return torch.as_tensor(self.head(x.mean((2, 3))))


def small_resnet_group(width: int = 16) -> nn.Module:
    """`SmallResNet` with GroupNorm; of width 16 151,738 parameters."""
    return SmallResNet(_group, width)


def small_resnet_batch(width: int = 16) -> nn.Module:
    """`SmallResNet` with BatchNorm."""
    return SmallResNet(nn.BatchNorm2d, width)
