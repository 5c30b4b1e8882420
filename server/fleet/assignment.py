"""Which devices a rollout reaches first: a hash decides, not the order of names or of polls."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise

from prunecast.server.fleet.errors import Unusable

__all__ = ["assign", "check_stages", "cohort_size", "rank"]


def rank(rollout: str, device: str) -> bytes:
    """Place of a device in a rollout: SHA-256 of both names, 32 bytes, compared as bytes.

    Another rollout gives another order, so that not always the same devices are canaries.
    """
    return hashlib.sha256(f"{rollout}\0{device}".encode()).digest()


def cohort_size(percent: float, devices: int) -> int:
    """How many of `devices` a percentage means, rounded up; thousandths of a percent count.

    >>> cohort_size(5, 500), cohort_size(5, 501), cohort_size(5, 1), cohort_size(0.5, 1000)
    (25, 26, 1, 5)
    """
    return -(-round(percent * 1000) * devices // 100_000)


def check_stages(stages: Sequence[float]) -> tuple[float, ...]:
    """The stages as a tuple.

    Raises:
        Unusable: not rising, not ending at 100, or below a thousandth of a percent.
    """
    rising = all(a < b for a, b in pairwise(stages))
    if not stages or not rising or stages[0] < 0.001 or stages[-1] != 100:
        shown = ", ".join(f"{s:g}" for s in stages)
        raise Unusable(f"stages {shown or 'none'} must rise and end at 100, such as 5, 25, 100")
    return tuple(float(s) for s in stages)


def assign(rollout: str, devices: Iterable[str], stages: Sequence[float]) -> dict[str, int]:
    """First stage of every device, such that stage `s` has reached exactly its share.

    Args:
        rollout: name of the rollout.
        devices: names of the devices.
        stages: rising percentages, the last one 100.

    >>> sorted(assign("r1", [f"d{i}" for i in range(20)], (5, 25, 100)).values()).count(1)
    4
    """
    ordered = sorted(devices, key=lambda device: rank(rollout, device))
    bounds = [cohort_size(percent, len(ordered)) for percent in stages]
    return {
        device: next(stage for stage, bound in enumerate(bounds) if place < bound)
        for place, device in enumerate(ordered)
    }
