"""Devices that leave a rollout and late joiners."""

from __future__ import annotations

from dataclasses import replace

from prunecast.server.fleet.model import Device, Part, Rollout
from prunecast.server.fleet.step import Step

__all__ = ["join", "leave", "takes_part"]


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
