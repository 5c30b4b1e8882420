"""What a device is told, and what its answers count for."""

from __future__ import annotations

from dataclasses import replace

from prunecast.server.fleet.audit import AuditKind
from prunecast.server.fleet.errors import NotPossible
from prunecast.server.fleet.events import Poll, ReportOutcome
from prunecast.server.fleet.model import Device, Directive, Progress, Release, Status, Told
from prunecast.server.fleet.step import Step

__all__ = ["poll", "report"]

_RECENT = 60.0
"""Seconds after which it is stored anew when a device was last seen."""


def poll(step: Step, event: Poll) -> Directive:
    """Answer a device; in a running rollout this is where it is told the new release."""
    held = step.fleet.device(event.device)
    if held.revoked:
        raise NotPossible(f"device {held.id} is revoked: enrol it under another name")
    device = replace(held, running=event.running, agent=event.agent, last_seen=step.at)
    device, version, rollout = _target(step, device)
    name = step.fleet.group(device.group).release
    told = device.told
    anew = rollout is not None and rollout != told.rollout  # its report counts for the rollout
    if version != told.version or anew:
        said = {"release": name, "version": version}
        step.log(AuditKind.DEVICE_TOLD, device.id, actor="fleet", **said)
        told = Told(told.serial + 1, version, step.at, rollout)
    else:
        told = replace(told, rollout=rollout)  # the rollout's release became the stable one, say
    older = version is not None and version < max(device.told.version or 0, device.running or 0)
    device = replace(device, told=told)
    if not _same(held, device):
        step.put(device)
    release = None if version is None else Release(name, version)
    return Directive(device.id, told.serial, release, older, rollout)


def report(step: Step, event: ReportOutcome) -> bool:
    """Take a device's answer to its present directive; False if it is anything else.

    A first answer is taken, and a failure after a success (a crash loop, say). All else is a
    replay, out of order, or about something that the device was not told.
    """
    device = step.fleet.devices.get(event.device)
    if device is None or device.revoked:
        return False
    told = device.told
    if (event.serial, event.version) != (told.serial, told.version):
        return False
    changes = told.outcome is None or (event.outcome.failed and not told.outcome.failed)
    if not changes:
        return False
    refused = device.refused | {event.version} if event.outcome.failed else device.refused
    device = replace(
        device, last_seen=step.at, refused=refused, told=replace(told, outcome=event.outcome)
    )
    found = step.active_part(device)
    if found and told.rollout == found[0].id:
        step.settle(device, Progress.FAILED if event.outcome.failed else Progress.SUCCEEDED)
    else:
        step.put(device)
    if event.outcome.failed:
        step.log(
            AuditKind.RELEASE_FAILED,
            device.id,
            actor=f"device:{device.id}",
            release=step.fleet.group(device.group).release,
            version=event.version,
            outcome=event.outcome.value,
            detail=" ".join(event.detail.split())[:200],
        )
    return True


def _target(step: Step, device: Device) -> tuple[Device, int | None, str | None]:
    """The device with its part brought up to date, the version to run, and the rollout's name."""
    group = step.fleet.group(device.group)
    for pin in (device.pin, group.pin):
        if pin is not None and _exists(step, group.release, pin):
            return device, pin, None
    found = step.active_part(device)
    if found and group.pin is None and device.pin is None:
        rollout, part = found
        version = rollout.release.version
        usable = version not in device.refused and _exists(step, group.release, version)
        if usable and part.progress is not Progress.WAITING:
            return device, version, rollout.id
        running = rollout.status is Status.RUNNING
        if usable and running and part.stage <= rollout.stage:
            part = replace(part, progress=Progress.TOLD, told_at=step.at, epoch=rollout.epoch)
            step.put(replace(rollout, told=rollout.told + 1))
            return replace(device, part=part), version, rollout.id
    stable = step.fleet.stable(group)
    if stable is None or stable in device.refused or not _exists(step, group.release, stable):
        return device, None, None
    return device, stable, None


def _same(held: Device, device: Device) -> bool:
    """Whether nothing is worth storing: a fleet that has nothing to do writes little."""
    recent = held.last_seen is not None and 0 <= (device.last_seen or 0) - held.last_seen < _RECENT
    return recent and replace(device, last_seen=held.last_seen) == held


def _exists(step: Step, name: str, version: int) -> bool:
    return Release(name, version) in step.fleet.releases
