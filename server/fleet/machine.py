"""The state machine of a fleet: a state and an event in, a decision out.

::

    start ──▶ running ──(stage settled or timed out)──▶ running, next stage ──▶ completed
                │  ▲                                                        (last stage)
     errors,    │  │ resume, promote                                         │
     silence,   ▼  │                                                         │
     operator  paused ◀──(late failures: reopened)───────────────────────────┘
                │
                └──abort──▶ aborted ◀──abort, or errors with roll_back_on_error── running

Nothing here reads a clock, draws a number or touches a file: equal arguments give equal results.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from prunecast.server.fleet import events
from prunecast.server.fleet.audit import AuditKind, Cause, no_way_back_text
from prunecast.server.fleet.errors import AlreadyExists, NotPossible, ReleaseUnknown, RolloutOverlap
from prunecast.server.fleet.evaluation import (
    abort,
    advance,
    count_late_failures,
    evaluate,
    expire,
    wait_again,
)
from prunecast.server.fleet.model import (
    Device,
    Directive,
    Failure,
    Fleet,
    Group,
    Part,
    Progress,
    Release,
    Rollout,
    Status,
    Told,
    check_name,
)
from prunecast.server.fleet.step import (
    Decision,
    Step,
    assign,
    check_stages,
    join,
    leave,
    takes_part,
)

__all__ = ["apply"]

_RECENT = 60.0
"""Seconds after which it is stored anew when a device was last seen."""


def apply(fleet: Fleet, event: events.AnyEvent) -> Decision:
    """Decide what an event leads to.

    Deadlines that have passed by `event.at` are honoured first. Whether or not the event brought
    something new, rollouts whose time has come go on or pause.

    Args:
        fleet: the state, or the part of it that the event concerns: its device, group and
            rollout, and the overdue devices of that rollout; for `Resume` also its silent
            devices, for `StartRollout` all devices of the groups.
        event: what happened.

    Raises:
        FleetError: an operator asked for what cannot be; the state stays as it was.
    """
    step = Step(fleet, event)
    expire(step)
    if isinstance(event, events.Poll | events.ReportOutcome | events.Tick):
        # a poll must not be told a release whose rollout is due to pause
        evaluate(step)
    match event:
        case events.Poll():
            directive = _poll(step, event)
            return step.decision(directive)
        case events.ReportOutcome():
            accepted = _report(step, event)
            evaluate(step)
            return step.decision(accepted=accepted)
        case events.Tick():
            return step.decision()
        case events.StartRollout():
            _start(step, event)
        case events.Steering():
            _steer(step, event)
        case events.AddGroup() | events.AddDevice() | events.MoveDevice() | events.RevokeDevice():
            _enrol(step, event)
        case events.PinDevice() | events.PinGroup():
            _pin(step, event)
        case _:
            assert_never(event)
    return step.decision()


def _start(step: Step, event: events.StartRollout) -> None:
    fleet, release = step.fleet, event.release
    check_name(event.rollout, "rollout")
    stages = check_stages(event.stages)
    if event.rollout in fleet.rollouts:
        raise AlreadyExists(f"there was a rollout {event.rollout} already: choose another name")
    names = tuple(sorted(set(event.groups)))
    if not names:
        raise NotPossible("a rollout needs at least one group: name it with --group")
    groups = [fleet.group(name) for name in names]
    for group in groups:
        _check_startable(fleet, group, release)
    made = Rollout(event.rollout, release, names, stages, event.policy, (), step.at)
    members = {
        name: device
        for name, device in fleet.devices.items()
        if device.group in names and takes_part(device, made)
    }
    stage_of = assign(made.id, members, stages)
    cohorts = tuple(list(stage_of.values()).count(stage) for stage in range(len(stages)))
    for device in list(fleet.devices.values()):
        if device.group in names and step.last_part(device):
            leave(step, device)  # a completed rollout that goes on in other groups may be reopened
    step.put(replace(made, cohorts=cohorts, expected=cohorts[0]))
    for group in groups:
        stable = fleet.stable(group)
        if stable is None or Release(release.name, stable) not in fleet.releases:
            lost = no_way_back_text(release.name, group.id, stable)
            step.warnings.append(f"{lost}; an abort leaves its devices on what they run")
        step.put(replace(group, stable=stable, rollout=made.id))
    for name, device in members.items():
        step.put(replace(device, part=Part(made.id, stage_of[name])))
    step.log(
        AuditKind.ROLLOUT_STARTED,
        made.id,
        release=release.name,
        version=release.version,
        groups=list(names),
        stages=list(stages),
    )


def _check_startable(fleet: Fleet, group: Group, release: Release) -> None:
    if release.name != group.release:
        raise ReleaseUnknown(
            f"group {group.id} follows {group.release!r}, not {release.name!r}: "
            "choose a release of that name or another group"
        )
    _check_live(fleet, release)
    if (current := fleet.current(group)) is not None:
        raise RolloutOverlap(
            f"rollout {current.id} ({current.release}) is {current.status} in group {group.id}: "
            f"wait for it, or end it with `prunecast fleet abort {current.id}`"
        )
    if group.pin is not None:
        raise NotPossible(
            f"group {group.id} is pinned to {group.release} {group.pin}: "
            f"unpin it first with `prunecast fleet unpin --group {group.id}`"
        )
    if fleet.stable(group) == release.version:
        raise NotPossible(f"{release} is in force in group {group.id} already: nothing to roll out")


def _steer(step: Step, event: events.Steering) -> None:
    rollout = step.fleet.rollout(event.rollout)
    if not rollout.status.active:
        raise NotPossible(
            f"rollout {rollout.id} is {rollout.status}, which is final: start another one"
        )
    match event:
        case events.Promote():
            _check_live(step.fleet, rollout.release)
            advance(step, rollout, {"cause": Cause.OPERATOR, "words": "by an operator"})
        case events.Pause():
            if rollout.status is Status.PAUSED:
                raise NotPossible(f"rollout {rollout.id} is paused already: {rollout.reason}")
            step.end(rollout, Status.PAUSED, event.reason)
            step.log(AuditKind.ROLLOUT_PAUSED, rollout.id, **_by_operator(event))
        case events.Resume():
            if rollout.status is Status.RUNNING:
                raise NotPossible(f"rollout {rollout.id} is running already")
            _check_live(step.fleet, rollout.release)
            rollout = wait_again(step, rollout)
            step.begin_window(rollout, stage=rollout.stage, accept=True)
            step.log(AuditKind.ROLLOUT_RESUMED, rollout.id, was=rollout.reason)
        case events.Abort():
            abort(step, rollout, _by_operator(event))


def _enrol(step: Step, event: events.Enrolment) -> None:
    fleet = step.fleet
    match event:
        case events.AddGroup():
            check_name(event.group, "group")
            if event.group in fleet.groups:
                raise AlreadyExists(f"there is a group {event.group} already: choose another name")
            if event.stable is not None:
                _check_live(fleet, Release(event.release, event.stable))
            elif all(known.name != event.release for known in fleet.releases):
                known = ", ".join(sorted({r.name for r in fleet.releases})) or "none"
                raise ReleaseUnknown(
                    f"the repository has no live release named {event.release!r} (it has: {known}):"
                    " publish one first"
                )
            step.put(Group(event.group, event.release, event.stable))
            step.log(AuditKind.GROUP_ADDED, event.group, release=event.release, stable=event.stable)
        case events.AddDevice():
            check_name(event.device, "device")
            if event.device in fleet.devices:
                raise AlreadyExists(
                    f"there is, or was, a device {event.device} already: choose another name"
                )
            fleet.group(event.group)
            device = Device(event.device, event.group)
            step.put(device)
            join(step, device)
            step.log(AuditKind.DEVICE_ADDED, event.device, group=event.group)
        case events.MoveDevice():
            device = _living(fleet, event.device)
            new, old = fleet.group(event.group), fleet.group(device.group)
            if new.release != old.release:
                raise NotPossible(
                    f"{device.id} follows {old.release!r} and group {new.id} {new.release!r}: "
                    "add the device there under another name"
                )
            moved = replace(leave(step, device), group=new.id)
            step.put(moved)
            join(step, moved)
            step.log(AuditKind.DEVICE_MOVED, device.id, was=old.id, group=new.id)
        case events.RevokeDevice():
            device = _living(fleet, event.device)
            step.put(replace(leave(step, device), revoked=True))
            step.log(AuditKind.DEVICE_REVOKED, device.id)


def _pin(step: Step, event: events.Pinning) -> None:
    fleet, version = step.fleet, event.version
    if isinstance(event, events.PinDevice):
        device = _living(fleet, event.device)
        if version is None and device.pin is None:
            raise NotPossible(f"device {device.id} is not pinned")
        if version is not None:
            release = Release(fleet.group(device.group).release, version)
            _check_live(fleet, release)
            step.put(replace(leave(step, device), pin=version))
        else:
            unpinned = replace(device, pin=None)
            step.put(unpinned)
            join(step, unpinned)
        kinds = AuditKind.DEVICE_PINNED, AuditKind.DEVICE_UNPINNED
        subject = device.id
    else:
        group = fleet.group(event.group)
        if version is None and group.pin is None:
            raise NotPossible(f"group {group.id} is not pinned")
        if version is not None:
            _check_live(fleet, Release(group.release, version))
            if (current := fleet.current(group)) is not None:
                raise RolloutOverlap(
                    f"rollout {current.id} is {current.status} in group {group.id}: "
                    f"end it with `prunecast fleet abort {current.id}`, or pin single devices"
                )
        step.put(replace(group, pin=version))
        kinds = AuditKind.GROUP_PINNED, AuditKind.GROUP_UNPINNED
        subject = group.id
    if version is None:
        step.log(kinds[1], subject)
    else:
        step.log(kinds[0], subject, version=version)


def _by_operator(event: events.Pause | events.Abort) -> dict[str, str]:
    return {"cause": Cause.OPERATOR, "words": event.reason}


def _living(fleet: Fleet, name: str) -> Device:
    device = fleet.device(name)
    if device.revoked:
        raise NotPossible(f"device {name} is revoked, which is final: add it under another name")
    return device


def _check_live(fleet: Fleet, release: Release) -> None:
    if release not in fleet.releases:
        live = sorted(r.version for r in fleet.releases if r.name == release.name)
        shown = ", ".join(map(str, live)) or "none"
        raise ReleaseUnknown(
            f"the repository has no live release {release} (live: {shown}): publish it first, or "
            "choose one with `prunecast release list`"
        )


def _poll(step: Step, event: events.Poll) -> Directive:
    """Answer a device; in a running rollout this is where it is told the new release."""
    held = step.fleet.device(event.device)
    if held.revoked:
        raise NotPossible(f"device {held.id} is revoked: enrol it under another name")
    device = replace(held, running=event.running, agent=event.agent, last_seen=step.at)
    device, version, rollout = _target(step, device)
    name = step.fleet.group(device.group).release
    told = device.told
    # its report counts for the rollout, unless it has counted: after completion it was told as the
    # stable release, and the rollout was reopened since
    open_ = device.part is not None and not device.part.progress.settled
    anew = rollout is not None and rollout != told.rollout and open_
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


def _report(step: Step, event: events.ReportOutcome) -> bool:
    """Take a device's answer to its present directive; False if it is anything else.

    A first answer is taken, one that confirms what was provisional, and a failure after either (a
    crash loop, say). All else is a replay, out of order, or about something that the device was
    not told.
    """
    device = step.fleet.devices.get(event.device)
    if device is None or device.revoked:
        return False
    told = device.told
    if (event.serial, event.version) != (told.serial, told.version):
        return False
    if not event.outcome.follows(told.outcome):
        return False
    failed = event.outcome.failed
    detail = " ".join(event.detail.split())[:200]
    failures = dict(device.failures)
    if failed:
        failures[event.version] = Failure(event.outcome, detail, step.at)
    device = replace(
        device, last_seen=step.at, failures=failures, told=replace(told, outcome=event.outcome)
    )
    rollout = _counting(step, device)
    if rollout is not None:
        step.settle(device, Progress.FAILED if failed else Progress(event.outcome.value))
    else:
        step.put(device)
    if failed:
        step.log(
            AuditKind.RELEASE_FAILED,
            device.id,
            actor=f"device:{device.id}",
            release=step.fleet.group(device.group).release,
            version=event.version,
            outcome=event.outcome.value,
            detail=detail,
        )
    if failed and rollout is not None and rollout.status is Status.COMPLETED:
        count_late_failures(step, step.fleet.rollouts[rollout.id])
    return True


def _counting(step: Step, device: Device) -> Rollout | None:
    """The rollout that a device's answer counts for.

    After completion its release is the stable one, and devices are told it as that.
    """
    found = step.last_part(device)
    if found is None or device.told.version != found[0].release.version:
        return None
    rollout = found[0]
    because = (rollout.id, None) if rollout.completed is not None else (rollout.id,)
    return rollout if device.told.rollout in because else None


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
    current = step.fleet.current(group)
    if current is not None and current.completed is not None:
        # reopened: who was told its release as the stable one is not sent back and forth
        version = current.release.version
        usable = version not in device.refused and _exists(step, group.release, version)
        if usable and device.told.version == version:
            return device, version, None
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
