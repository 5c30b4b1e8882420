"""What a fleet stands on: the releases that must stay live while it needs them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prunecast.server.fleet.model import Device, Fleet, Group, Release

__all__ = ["Use", "uses_of", "way_back"]

_REOPENS = 86400.0
"""Seconds after completion in which late failures are likely: devices that were off come back."""


@dataclass(frozen=True)
class Use:
    """A release that a fleet needs.

    Attributes:
        release: which.
        user: who needs it, in words: ``group lab``.
        why: for what: ``has it as its stable release``.
        remedy: how to do without it.
        lasting: whether devices may be told it at any time; else it is only good to have: a rollout
            that was completed a short while ago may be reopened, and then go back to it.
    """

    release: Release
    user: str
    why: str
    remedy: str
    lasting: bool = True

    def __str__(self) -> str:
        return f"{self.user} {self.why}"


def uses_of(fleet: Fleet, at: float) -> list[Use]:
    """Every release that groups, rollouts and pins of a fleet need, and who needs it.

    These are: the version in force in a group, the pin of a group or of a device that is not
    revoked, and of a rollout that is under way its target and what each group would go back to.
    What groups would go back to from a rollout of the last day is good to have.

    Args:
        fleet: all groups, their last rollouts and the devices that are pinned; other devices do
            not matter.
        at: the time, in seconds since the epoch.
    """
    found: list[Use] = []
    for group in fleet.groups.values():
        found += _of_group(fleet, group, at)
    found += _of_pins(fleet, fleet.devices.values())
    return found


def way_back(fleet: Fleet, group: Group) -> tuple[int | None, bool]:
    """What the devices of a group are told when its rollout is aborted.

    Returns:
        The stable version, and whether it is there to be told.

    >>> way_back(Fleet(), Group("lab", "digits", stable=1))
    (1, False)
    """
    stable = group.stable
    return stable, stable is not None and Release(group.release, stable) in fleet.releases


def _of_group(fleet: Fleet, group: Group, at: float) -> list[Use]:
    found: list[Use] = []
    who = f"group {group.id}"
    current = fleet.current(group)
    if current is not None:
        end = f"end it first: `prunecast fleet abort {current.id}`"
        found.append(Use(current.release, f"rollout {current.id}", "brings it to devices", end))
    stable = fleet.stable(group)
    if stable is not None and current is not None:
        why = f"goes back to it in {who}"
        wait = f"wait until rollout {current.id} has completed"
        found.append(Use(Release(group.release, stable), f"rollout {current.id}", why, wait))
    elif stable is not None:
        move = (
            "bring the group to another version first: `prunecast fleet rollout start "
            f"{group.release} VERSION --group {group.id}`"
        )
        why = "has it as its stable release"
        found.append(Use(Release(group.release, stable), who, why, move))
    last = fleet.rollouts[group.rollout] if group.rollout else None
    done = last.completed if last is not None and current is None else None
    recent = done is not None and at - done < _REOPENS
    if last is not None and recent and group.stable not in (None, stable):
        back = Release(group.release, group.stable or 0)
        why = f"would go back to it in {who} if it failed late: it was completed within a day"
        found.append(Use(back, f"rollout {last.id}", why, "wait for a day", lasting=False))
    if group.pin is not None:
        unpin = f"`prunecast fleet unpin --group {group.id}` first"
        found.append(Use(Release(group.release, group.pin), who, "is pinned to it", unpin))
    return found


def _of_pins(fleet: Fleet, devices: Iterable[Device]) -> list[Use]:
    return [
        Use(
            Release(fleet.group(device.group).release, device.pin),
            f"device {device.id}",
            "is pinned to it",
            f"`prunecast fleet unpin --device {device.id}` first",
        )
        for device in devices
        if device.pin is not None and not device.revoked
    ]
