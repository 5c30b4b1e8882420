"""What this project does: versions on a lattice down, pruned and coded; quantised updates up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prunecast.simulations.arms import Arm
from prunecast.simulations.kinds import ScenarioError

if TYPE_CHECKING:
    from prunecast.server.federation import Policy

__all__ = ["Prunecast"]


@dataclass(frozen=True)
class Prunecast(Arm):
    """Any policy.

    Attributes:
        preset: of the policy.
        policy: ``[arms.<name>.policy]``, knobs that replace those of the preset.
        left_out: width classes whose clients take no part, so that it shows what they are worth.
    """

    preset: str = "balanced"
    policy: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def check_widths(self, key: str, classes: Sequence[str]) -> None:
        """See that the policy knows the classes of clients that take part, and that some do."""
        stated = set(classes) - {""}
        for name in self.left_out:
            if name not in stated:
                raise ScenarioError(
                    f"{key}.left_out", f"{name!r} is the class of no client", "see clients.widths"
                )
        if set(classes) <= set(self.left_out):
            raise ScenarioError(f"{key}.left_out", "leaves no client", "leave a class in")
        known = self.policy.get("widths", {})
        unknown = stated - set(self.left_out) - set(known)
        if known and unknown:
            raise ScenarioError(
                f"{key}.policy.widths",
                f"says nothing of class {min(unknown)!r}, which clients.widths has",
                "add it, or name it in left_out",
            )

    @property
    def without(self) -> tuple[str, ...]:
        """As stated."""
        return self.left_out

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
        knobs = [f"{k} = {v}" for k, v in self.policy.items()]
        without = [f"without {', '.join(self.left_out)}"] if self.left_out else []
        return ", ".join([f"preset {self.preset}", *knobs, *without])
