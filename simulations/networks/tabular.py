"""Networks for rows of a table."""

from __future__ import annotations

from torch import nn

__all__ = ["logistic_regression", "mlp"]


def logistic_regression(features: int = 20, classes: int = 3) -> nn.Module:
    """One linear layer, whose loss is the task's; 63 parameters by default.

    Args:
        features: columns.
        classes: of the output.

    Input (n, features), output (n, classes) logits.
    """
    return nn.Linear(features, classes)


def mlp(
    features: int = 20, classes: int = 3, hidden: int = 64, layers: int = 2, dropout: float = 0.0
) -> nn.Module:
    """Hidden layers with ReLU before the output; 5,699 parameters by default.

    Args:
        features: columns.
        classes: of the output; 1 for a regression.
        hidden: width of a hidden layer.
        layers: hidden ones.
        dropout: share of hidden values that training leaves out.

    Input (n, features), output (n, classes).
    """
    parts: list[nn.Module] = []
    for inner in [features, *[hidden] * (layers - 1)]:
        parts += [nn.Linear(inner, hidden), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*parts, nn.Linear(hidden, classes))
