"""One step of the state machine: a working copy of the state that collects what changed.

Besides it who takes part in a rollout: a hash ranks the devices. When a rollout goes on, pauses or
ends is `evaluation`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from prunecast.server.fleet.audit import AuditEntry, AuditKind
from prunecast.server.fleet.errors import Unusable
from prunecast.server.fleet.events import Event
from prunecast.server.fleet.model import (
    Device,
    Directive,
    Fleet,
    Group,
    Part,
    Progress,
    Rollout,
    Status,
    Tally,
)

__all__ = [
    "Decision",
    "Step",
    "assign",
    "check_stages",
    "cohort_size",
    "join",
    "leave",
    "rank",
    "takes_part",
]


@dataclass(frozen=True)
class Decision:
    """What an event leads to.

    Attributes:
        fleet: the new state.
        directives: what to tell devices; one for a poll, none otherwise, as devices ask.
        audit: what to write into the audit log.
        accepted: False for a report that changed nothing: replayed, foreign or out of order.
        warnings: what was done all the same, but an operator ought to know, in sentences.
    """

    fleet: Fleet
    directives: tuple[Directive, ...] = ()
    audit: tuple[AuditEntry, ...] = ()
    accepted: bool = True
    warnings: tuple[str, ...] = ()


@dataclass
class Step:
    """A working copy; the state that it was made from is never changed."""

    before: Fleet
    event: Event
    audit: list[AuditEntry] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        groups, devices = dict(self.before.groups), dict(self.before.devices)
        rollouts = dict(self.before.rollouts)
        self.fleet = replace(self.before, groups=groups, devices=devices, rollouts=rollouts)
        self._items: dict[type, dict[str, Any]]
        self._items = {Group: groups, Device: devices, Rollout: rollouts}

    @property
    def at(self) -> float:
        """Time of the event."""
        return self.event.at

    def put(self, item: Device | Group | Rollout) -> None:
        """Add or replace an item."""
        self._items[type(item)][item.id] = item

    def log(self, kind: AuditKind, subject: str, *, actor: str = "", **fields: Any) -> None:
        """Add an audit entry; by default the event's actor did it."""
        entry = AuditEntry(self.at, actor or self.event.actor, kind, subject, fields)
        self.audit.append(entry)

    def decision(self, *directives: Directive, accepted: bool = True) -> Decision:
        """The result."""
        return Decision(self.fleet, directives, tuple(self.audit), accepted, tuple(self.warnings))

    def active_part(self, device: Device) -> tuple[Rollout, Part] | None:
        """The active rollout that a device takes part in, and its part."""
        rollout = self.fleet.current(self.fleet.group(device.group))
        if rollout and device.part and device.part.rollout == rollout.id:
            return rollout, device.part
        return None

    def last_part(self, device: Device) -> tuple[Rollout, Part] | None:
        """A device's part in the last rollout of its group, active or completed, and that."""
        last = self.fleet.group(device.group).rollout
        rollout = self.fleet.rollouts[last] if last else None
        if rollout is None or rollout.status is Status.ABORTED:
            return None
        mine = device.part is not None and device.part.rollout == rollout.id
        return (rollout, device.part) if mine and device.part else None

    def settle(self, device: Device, progress: Progress) -> None:
        """Count what became of a device in the last rollout of its group.

        A device that settled before is counted differently where it was counted: in the present
        window, or in an earlier one, whose error rate can then stop a later stage.
        """
        found = self.last_part(device)
        if found is None:
            self.put(device)
            return
        rollout, part = found
        if not progress.settled:
            if part.progress is Progress.TOLD:  # a silent one stays counted until it is sure
                part = replace(part, progress=progress)
        elif not part.progress.settled:
            tally = rollout.tally.counted(progress, 1)
            self.put(replace(rollout, tally=tally, settled=rollout.settled + 1))
            part = replace(part, progress=progress, epoch=rollout.epoch)
        else:
            windows = [*rollout.windows, rollout.tally]
            at = part.epoch - 1
            windows[at] = windows[at].counted(part.progress, -1).counted(progress, 1)
            self.put(replace(rollout, windows=tuple(windows[:-1]), tally=windows[-1]))
            part = replace(part, progress=progress)
        self.put(replace(device, part=part))

    def begin_window(self, rollout: Rollout, *, stage: int, accept: bool) -> Rollout:
        """Observe anew, from now on.

        Args:
            rollout: which.
            stage: where it goes on.
            accept: whether the failures so far are no longer held against the release.
        """
        windows = (*rollout.windows, rollout.tally)
        if accept:
            windows = tuple(replace(window, failed=0) for window in windows)
        begun = replace(
            rollout,
            status=Status.RUNNING,
            stage=stage,
            epoch=rollout.epoch + 1,
            since=self.at,
            tally=Tally(),
            windows=windows,
            reason="",
        )
        begun = replace(begun, expected=begun.reached - begun.settled)
        self.put(begun)
        return begun

    def end(self, rollout: Rollout, status: Status, reason: str) -> None:
        """Set another status than running."""
        done = self.at if status is Status.COMPLETED else rollout.completed
        self.put(replace(rollout, status=status, reason=reason, completed=done))


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
    """Take a device out of its group's last rollout; what it settled stays counted.

    Returns:
        The device without a part, as it now stands in the state.
    """
    found = step.last_part(device)
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
