"""Who takes part in a rollout: a hash ranks the devices; who leaves, and late joiners."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from prunecast.server.fleet.errors import Unusable
from prunecast.server.fleet.model import Device, Part, Rollout
from prunecast.server.fleet.step import Step

__all__ = ["assign", "check_stages", "cohort_size", "join", "leave", "rank", "takes_part"]


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


def leave(step: Step, device: Device) -> Device:
    """Take a device out of its active rollout; what it settled stays counted.

    Returns:
        The device without a part, as it now stands in the state.
    """
    found = step.active_part(device)
    if found is not None:
        rollout, part = found
        if not part.progress.settled:
            _resize(step, rollout, part.stage, -1)
    gone = replace(device, part=None)
    step.put(gone)
    return gone


def join(step: Step, device: Device) -> None:
    """Let a device take part in its group's active rollout, if any: in the last stage.

    Earlier stages keep their size, so a late joiner never makes a canary larger.
    """
    rollout = step.fleet.current(step.fleet.group(device.group))
    if rollout is None or not takes_part(device, rollout):
        return
    last = len(rollout.stages) - 1
    step.put(replace(device, part=Part(rollout.id, last)))
    _resize(step, rollout, last, 1)


def takes_part(device: Device, rollout: Rollout) -> bool:
    """Whether a device may be told what a rollout brings."""
    free = not device.revoked and device.pin is None
    return free and rollout.release.version not in device.refused


def _resize(step: Step, rollout: Rollout, stage: int, by: int) -> None:
    cohorts = list(rollout.cohorts)
    cohorts[stage] += by
    expected = rollout.expected + (by if stage <= rollout.stage else 0)
    step.put(replace(rollout, cohorts=tuple(cohorts), expected=max(0, expected)))
