"""Plain Flower: whole models in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunecast.simulations.arms import Arm

if TYPE_CHECKING:
    from prunecast.server.federation import Policy

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense(Arm):
    """What the others are compared with."""

    baseline = True

    def grid_policy(self) -> Policy:
        """Nothing is compressed."""
        from prunecast.server.federation import Policy

        return Policy.preset("dense")
