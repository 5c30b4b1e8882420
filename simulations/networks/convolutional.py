"""Convolutional networks for images in one grey channel, and along time for sensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["cnn", "conv4", "digits_cnn", "lenet", "narrow_lenet", "normalised_cnn4", "sensor_cnn"]


class _Standardised(nn.Module):
    """Inputs less their mean, by their deviation: constants, no weights that travel."""

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self._mean, self._deviation = mean, deviation

    def forward(self, x: Tensor) -> Tensor:
        return (x - self._mean) / self._deviation


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


def cnn(mean: float = 0.0, deviation: float = 1.0) -> nn.Module:
    """The MNIST network of McMahan et al. 2017, section 3; 1,663,370 parameters.

    Args:
        mean: of pixels, which are brought to mean 0 and deviation 1 first.
        deviation: of pixels.
    """
    return nn.Sequential(
        *([] if (mean, deviation) == (0, 1) else [_Standardised(mean, deviation)]),
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10)),
    )


def conv4(classes: int = 10) -> nn.Module:
    """Four convolutions of 3 x 3 and three layers, CONV-4 for one channel; 1,933,258 parameters.

    Source: ``Mask4CNN`` of the code of Isik et al. 2023 (FedPM), after Zhou et al. 2019. Input
    (n, 1, 28, 28), output (n, classes) logits.
    """
    return nn.Sequential(
        *(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(6272, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()),
        nn.Linear(256, classes),
    )


def normalised_cnn4(classes: int = 10, mean: float = 0.286, deviation: float = 0.353) -> nn.Module:
    """Four convolutions with BatchNorm and a linear layer, no biases; 390,880 parameters.

    Source: ``CNN4_MNIST`` of the code of Li et al. 2024 (FedBAT). Weights are drawn with a
    deviation of 0.01.

    Args:
        classes: of the output.
        mean: of pixels, which are brought to mean 0 and deviation 1 first; of Fashion-MNIST.
        deviation: of pixels.

    Input (n, 1, 28, 28), output (n, classes) logits.
    """
    layers: list[nn.Module] = [_Standardised(mean, deviation)]
    for given, made in ((1, 32), (32, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(given, made, 3, padding=1, bias=False), nn.BatchNorm2d(made)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, classes, bias=False))
    with torch.no_grad():
        for layer in module:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)
    return module


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
