"""Plain Flower: whole models in both directions."""

from dataclasses import dataclass

from prunecast.simulations.arms import Arm

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense(Arm):
    """What the others are compared with."""

    baseline = True
