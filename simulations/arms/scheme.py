"""Updates up in a scheme of the literature; the model down whole, or by the same scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prunecast.compression.schemes import BadConfig
from prunecast.compression.schemes.registry import SCHEMES, scheme
from prunecast.simulations.arms import Arm
from prunecast.simulations.kinds import ScenarioError, choice

if TYPE_CHECKING:
    from prunecast.server.federation import Policy

__all__ = ["SchemeArm"]


@dataclass(frozen=True)
class SchemeArm(Arm):
    """Plain Flower, but for the updates, or for what travels in both directions.

    Attributes:
        scheme: name of one of `prunecast.compression.schemes`.
        options: ``[arms.<name>.options]``, of that scheme.
        directions: "up", or "both": the server codes the change of its model as the clients code
            theirs, and the next one with what this dropped; clients hold the sum of what came.
        down_options: ``[arms.<name>.down_options]``, of the server; those of the clients where
            there are none.
    """

    scheme: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    directions: Literal["up", "both"] = "up"
    down_options: Mapping[str, Any] = field(default_factory=dict)

    def check(self, key: str, arms: Mapping[str, Arm]) -> None:
        """There is such a scheme, and it takes the options."""
        choice(f"{key}.scheme", self.scheme, SCHEMES)
        for name, options in (("options", self.options), ("down_options", self.down_options)):
            try:
                scheme(self.scheme, **options)
            except BadConfig as error:
                remedy = f"options: {', '.join(SCHEMES[self.scheme].options())}"
                raise ScenarioError(f"{key}.{name}", str(error), remedy) from error
        if self.down_options and self.directions == "up":
            raise ScenarioError(
                f"{key}.down_options", "nothing travels down by it", 'set directions = "both"'
            )

    def grid_policy(self) -> Policy:
        """Updates in the scheme, and models where it is in both directions."""
        from prunecast.server.federation import Policy

        up: dict[str, Any] = {"up": self.scheme, "up_options": self.options}
        if self.directions == "up":
            return Policy.preset("dense", **up)
        return Policy(down=self.scheme, down_options=self.down_options or self.options, **up)

    def text(self) -> str:
        """The scheme and its options."""
        told = [self.scheme, *(f"{key} = {v}" for key, v in self.options.items())]
        return ", ".join([*told, *(["both directions"] if self.directions == "both" else [])])
