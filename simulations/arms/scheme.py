"""Whole models down; updates up in a scheme of the literature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prunecast.compression.schemes import BadConfig
from prunecast.compression.schemes.registry import SCHEMES, scheme
from prunecast.simulations.arms import Arm
from prunecast.simulations.kinds import ScenarioError, choice

if TYPE_CHECKING:
    from prunecast.server.federation import Policy

__all__ = ["SchemeArm"]


@dataclass(frozen=True)
class SchemeArm(Arm):
    """Plain Flower, but for the updates.

    Attributes:
        scheme: name of one of `prunecast.compression.schemes`.
        options: ``[arms.<name>.options]``, of that scheme.
    """

    scheme: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def check(self, key: str, arms: Mapping[str, Arm]) -> None:
        """There is such a scheme, and it takes the options."""
        choice(f"{key}.scheme", self.scheme, SCHEMES)
        try:
            scheme(self.scheme, **self.options)
        except BadConfig as error:
            remedy = f"options: {', '.join(SCHEMES[self.scheme].options())}"
            raise ScenarioError(f"{key}.options", str(error), remedy) from error

    def grid_policy(self) -> Policy:
        """Updates in the scheme."""
        from prunecast.server.federation import Policy

        return Policy.preset("dense", up=self.scheme, up_options=self.options)

    def text(self) -> str:
        """The scheme and its options."""
        return ", ".join([self.scheme, *(f"{key} = {v}" for key, v in self.options.items())])
