"""What this project does: versions on a lattice down, pruned and coded; quantised updates up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prunecast.simulations.arms import Arm

if TYPE_CHECKING:
    from prunecast.server.federation import Policy

__all__ = ["Prunecast"]


@dataclass(frozen=True)
class Prunecast(Arm):
    """Any policy.

    Attributes:
        preset: of the policy.
        policy: ``[arms.<name>.policy]``, knobs that replace those of the preset.
    """

    preset: str = "balanced"
    policy: Mapping[str, Any] = field(default_factory=dict)

    @property
    def publishes(self) -> bool:
        """Unless the policy sends whole models."""
        default = "dense" if self.preset == "dense" else "lattice"
        return bool(self.policy.get("down", default) == "lattice")

    def grid_policy(self) -> Policy:
        """The preset, with the knobs that replace its own."""
        from prunecast.server.federation import Policy

        knobs = {k: tuple(v) if isinstance(v, list) else v for k, v in self.policy.items()}
        return Policy.preset(self.preset, **knobs)

    def text(self) -> str:
        """The preset, and the knobs that replace its own."""
        return ", ".join([f"preset {self.preset}", *(f"{k} = {v}" for k, v in self.policy.items())])
