"""``[clients]`` of a scenario: who trains, and what devices they stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from prunecast.simulations.kinds import NAME, Range, ScenarioError

__all__ = ["ClientsSpec"]


@dataclass(frozen=True)
class ClientsSpec:
    """``[clients]``: who trains.

    Attributes:
        count: number of clients.
        fraction: of them that train in a round.
        widths: ``[clients.widths]``, width classes that clients state and the share of the clients
            that are of each, the last ones by number; the others state none. What a class trains is
            an arm's policy.
    """

    count: Annotated[int, Range(1)] = 10
    fraction: Annotated[float, Range(0, 1, above=True)] = 1.0
    widths: Mapping[str, float] = field(default_factory=dict)

    def classes(self) -> list[str]:
        """The width class of every client, in their order; "" for none."""
        found = [name for name, share in self.widths.items() for _ in range(self._of(share))]
        return [""] * (self.count - len(found)) + found

    def check(self, key: str) -> None:
        """Raise `ScenarioError` for classes that do not share the clients."""
        for name, share in self.widths.items():
            if not re.fullmatch(NAME, name):
                raise ScenarioError(
                    f"{key}.widths.{name}", "is no name of a class", "use a-z 0-9 _ -"
                )
            if not (0 < share <= 1 and self._of(share)):
                raise ScenarioError(
                    f"{key}.widths.{name}",
                    f"is {share}, which is none of {self.count} clients",
                    "give the share of the clients that are of the class, such as 0.5",
                )
        if sum(map(self._of, self.widths.values())) > self.count:
            raise ScenarioError(
                f"{key}.widths", "share more clients than there are", "let them sum up to 1 at most"
            )

    def _of(self, share: float) -> int:
        return round(share * self.count)
