"""A network of the class that phones run: depthwise and pointwise convolutions."""

from __future__ import annotations

from torch import nn

__all__ = ["mobile_net"]

_BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)
"""Outputs of the pointwise convolution at width 1, and the stride of the depthwise one."""


def mobile_net(width: float = 2.75, classes: int = 10, channels: int = 1) -> nn.Module:
    """MobileNet (Howard et al. 2017, table 1); 23,955,018 parameters by default, 96 MB in float32.

    Args:
        width: the paper's width multiplier; its own is 1, of 3,216,650 parameters here.
        classes: of the output.
        channels: of an image.

    Input (n, channels, height, width) of 28 pixels and more, output (n, classes) logits.
    """

    def wide(count: int) -> int:
        return max(8, round(width * count / 8) * 8)

    layers = _normalised(nn.Conv2d(channels, wide(32), 3, 2, 1, bias=False))
    inner = wide(32)
    for count, stride in _BLOCKS:
        outer = wide(count)
        depthwise = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        layers += _normalised(depthwise)
        layers += _normalised(nn.Conv2d(inner, outer, 1, bias=False))
        inner = outer
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, classes))
    return nn.Sequential(*layers, *head)


def _normalised(convolution: nn.Conv2d) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU()]
