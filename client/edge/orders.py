"""Which release an agent goes to: the highest, or the one that an order names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prunecast.client.edge.errors import OrderRefused

__all__ = ["Order", "candidates"]


@dataclass(frozen=True)
class Order:
    """What a device shall run, from whoever may decide that: see `prunecast.client.edge.control`.

    An order only chooses among the releases that are signed and live.

    Attributes:
        version: of the release; None: keep what runs.
        downgrade: the version may be lower than what runs; without it, that is refused.
    """

    version: int | None = None
    downgrade: bool = False


def candidates(order: Order | None, live: Sequence[int], held: int) -> list[int]:
    """Versions to go to, the first one that was not rejected on this device.

    Args:
        order: what to run; None: the highest version.
        live: numbers of the releases that are signed and live, ascending.
        held: what runs; 0: nothing.

    Raises:
        OrderRefused: the order names a release that is not live, or goes down without saying so.

    >>> candidates(None, [1, 2, 3], 1), candidates(Order(2), [1, 2, 3], 1)
    ([3, 2], [2])
    >>> candidates(Order(1, downgrade=True), [1, 2, 3], 2), candidates(Order(), [1, 2, 3], 2)
    ([1], [])
    """
    if order is None:
        return [version for version in reversed(live) if version > held]
    version = order.version
    if version is None or version == held:
        return []
    if version not in live:
        shown = ", ".join(map(str, live)) or "none"
        raise OrderRefused(
            f"release {version} is ordered but not signed and live (live: {shown}): publish it "
            "again under a new number, and roll that out"
        )
    if version < held and not order.downgrade:
        raise OrderRefused(
            f"release {version} is ordered, lower than the {held} that runs, and the order does "
            "not say that this is meant"
        )
    return [version]
