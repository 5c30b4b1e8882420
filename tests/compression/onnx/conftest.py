"""Small modules, each exported once for the whole session."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from prunecast.compression.onnx.export import export_graph
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor


class Convolutional(nn.Module):
    """Convolution, BatchNorm, linear, and a parameter that inference does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 6 * 6, 5)
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(1))


class Tied(nn.Module):
    """An embedding tied to the output layer, a buffer, a scalar parameter, an int64 input."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.output = nn.Linear(8, 12, bias=False)
        self.output.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("offset", torch.arange(8.0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(self.embedding(tokens).mean(1) * self.scale + self.offset)


def _published(module: nn.Module, *, step: float = 0.01, counter: int = 1) -> PublishedModel:
    """The module's state on a lattice; statistics, integers and scalars raw."""
    tensors: dict[str, LatticeTensor | RawTensor] = {}
    for name, tensor in module.state_dict().items():
        values = tensor.numpy()
        if values.dtype.kind == "f" and values.ndim >= 2:
            q = np.rint(values.astype(np.float64) / step).astype(np.int32)
            tensors[name] = LatticeTensor(q, step, pruned=values.ndim == 4, dtype=values.dtype)
        else:
            tensors[name] = RawTensor(values)
    return PublishedModel(tensors, counter)


@pytest.fixture(scope="session")
def published() -> Callable[..., PublishedModel]:
    """A function: module -> published model on a lattice."""
    return _published


@pytest.fixture(scope="session")
def conv_module() -> nn.Module:
    torch.manual_seed(1)
    module = Convolutional()
    module.train()
    with torch.no_grad():
        module(torch.randn(16, 1, 6, 6))  # moves the BatchNorm statistics off their defaults
    return module


@pytest.fixture(scope="session")
def conv_graph(conv_module: nn.Module) -> ExportedGraph:
    return export_graph(conv_module, (torch.randn(1, 1, 6, 6),))


@pytest.fixture(scope="session")
def tied_module() -> nn.Module:
    torch.manual_seed(2)
    return Tied()


@pytest.fixture(scope="session")
def tied_graph(tied_module: nn.Module) -> ExportedGraph:
    return export_graph(tied_module, (torch.randint(0, 12, (3, 5)),), input_names=["tokens"])
