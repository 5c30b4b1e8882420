"""Tasks that cannot tell what a device answers from what the server did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from prunecast.simulations.tasks.classification import Classification

__all__ = ["Fails", "NeverTheSame"]


@dataclass(frozen=True)
class Fails(Classification):
    """Its comparison raises."""

    def different(self, server: Any, device: Any) -> Any:
        raise ValueError("no idea")


@dataclass(frozen=True)
class NeverTheSame(Classification):
    """Finds even one and the same answer different."""

    def different(self, server: Any, device: Any) -> Any:
        return np.arange(len(server))
