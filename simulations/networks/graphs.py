"""Graph convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["GraphConvolution", "gcn"]


class GraphConvolution(nn.Module):
    """Two layers of graph convolution (Kipf & Welling 2017, section 3.1).

    Args:
        features: of a node.
        hidden: of a node after the first layer.
        classes: of a node.
        scale: of features, which are multiplied by it: bags of words that add up to 1 are so small
            that SGD learns nothing from them.
    """

    def __init__(self, features: int, hidden: int, classes: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.first = nn.Linear(features, hidden)
        self.second = nn.Linear(hidden, classes)

    def forward(self, features: Tensor, adjacency: Tensor) -> Tensor:
        """Logits of every node.

        Args:
            features: (graphs, nodes, features).
            adjacency: (graphs, nodes, nodes), self-loops added, normalised symmetrically:
                D^-1/2 (A + I) D^-1/2. Rows and columns of nodes that a graph lacks are zero.

        Returns:
            (graphs, nodes, classes).
        """
        hidden = torch.relu(adjacency @ self.first(self.scale * features))
        return torch.as_tensor(adjacency @ self.second(hidden))


def gcn(features: int = 16, hidden: int = 64, classes: int = 4, scale: float = 1.0) -> nn.Module:
    """`GraphConvolution`; 1,348 parameters by default, 92,231 for Cora with 1,433 and 7."""
    return GraphConvolution(features, hidden, classes, scale)
