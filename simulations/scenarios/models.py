"""Networks that packaged scenarios train."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["digits_cnn"]


def digits_cnn() -> nn.Module:
    """A convolutional network for 28 x 28 grey images in ten classes; 409,034 parameters.

    Input (batch, 1, 28, 28) in [0, 1], output (batch, 10) logits.
    """
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )
