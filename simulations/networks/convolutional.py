"""Convolutional networks for images in one grey channel, and along time for sensors."""

from __future__ import annotations

from torch import nn

__all__ = ["cnn", "digits_cnn", "lenet", "narrow_lenet", "sensor_cnn"]


def digits_cnn() -> nn.Module:
    """The demo's network; 409,034 parameters.

    Input (n, 1, 28, 28) in [0, 1], output (n, 10) logits.
    """
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


def lenet(classes: int = 10) -> nn.Module:
    """LeNet-5 as Flower's baseline niid_bench has it for MNIST; 44,426 parameters.

    Source: ``CNNMnist`` of ``baselines/niid_bench`` (Li et al. 2022, "Federated learning on
    non-IID data silos"): two convolutions of 5 x 5 without padding, then 120, 84 and the classes.
    Input (n, 1, 28, 28), output (n, classes) logits.
    """
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * 4 * 4, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, classes),
    )


def narrow_lenet() -> nn.Module:
    """LeNet-5 with padding and a narrow head; 44,246 parameters. Input (n, 1, 28, 28)."""
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


def sensor_cnn(channels: int = 6, classes: int = 6, width: int = 64) -> nn.Module:
    """Three convolutions along time, and the largest over it; 35,270 parameters by default.

    Args:
        channels: of a window, such as three axes of two sensors.
        classes: of the output.
        width: channels of each convolution.

    Input (n, channels, steps) of any number of steps from 4 on, output (n, classes) logits.
    """
    return nn.Sequential(
        *(nn.Conv1d(channels, width, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2)),
        *(nn.Conv1d(width, width, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2)),
        *(nn.Conv1d(width, width, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(width, classes)),
    )
