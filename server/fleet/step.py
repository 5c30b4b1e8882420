"""One step of the state machine: a working copy of the state that collects what changed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from prunecast.server.fleet.audit import AuditEntry, AuditKind
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

__all__ = ["Decision", "Step"]


@dataclass(frozen=True)
class Decision:
    """What an event leads to.

    Attributes:
        fleet: the new state.
        directives: what to tell devices; one for a poll, none otherwise, as devices ask.
        audit: what to write into the audit log.
        accepted: False for a report that changed nothing: replayed, foreign or out of order.
    """

    fleet: Fleet
    directives: tuple[Directive, ...] = ()
    audit: tuple[AuditEntry, ...] = ()
    accepted: bool = True


@dataclass
class Step:
    """A working copy; the state that it was made from is never changed."""

    before: Fleet
    event: Event
    audit: list[AuditEntry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fleet = replace(
            self.before,
            groups=(groups := dict(self.before.groups)),
            devices=(devices := dict(self.before.devices)),
            rollouts=(rollouts := dict(self.before.rollouts)),
        )
        self._groups, self._devices, self._rollouts = groups, devices, rollouts

    @property
    def at(self) -> float:
        """Time of the event."""
        return self.event.at

    def put(self, item: Device | Group | Rollout) -> None:
        """Add or replace an item."""
        if isinstance(item, Device):
            self._devices[item.id] = item
        elif isinstance(item, Group):
            self._groups[item.id] = item
        else:
            self._rollouts[item.id] = item

    def log(self, kind: AuditKind, subject: str, *, actor: str = "", **fields: Any) -> None:
        """Add an audit entry; by default the event's actor did it."""
        entry = AuditEntry(self.at, actor or self.event.actor, kind, subject, fields)
        self.audit.append(entry)

    def decision(self, *directives: Directive, accepted: bool = True) -> Decision:
        """The result."""
        return Decision(self.fleet, directives, tuple(self.audit), accepted)

    def active_part(self, device: Device) -> tuple[Rollout, Part] | None:
        """The active rollout that a device takes part in, and its part."""
        rollout = self.fleet.current(self.fleet.group(device.group))
        if rollout and device.part and device.part.rollout == rollout.id:
            return rollout, device.part
        return None

    def settle(self, device: Device, progress: Progress) -> None:
        """Count what became of a device in its active rollout.

        A device that settled in an earlier window is not counted anew, only shown differently,
        unless it turns out to have failed: that must be able to stop a later stage.
        """
        found = self.active_part(device)
        if found is None:
            self.put(device)
            return
        rollout, part = found
        tally, settled = rollout.tally, rollout.settled
        if not part.progress.settled:
            tally, settled = _count(tally, progress, 1), settled + 1
        elif part.epoch == rollout.epoch:
            tally = _count(_count(tally, part.progress, -1), progress, 1)
        elif progress is Progress.FAILED:
            tally = _count(tally, progress, 1)
        else:
            self.put(replace(device, part=replace(part, progress=progress)))
            return
        self.put(replace(device, part=replace(part, progress=progress, epoch=rollout.epoch)))
        self.put(replace(rollout, tally=tally, settled=settled))

    def begin_window(self, rollout: Rollout, *, stage: int, reason: str = "") -> None:
        """Observe anew, from now on: nothing that settled before is held against a release."""
        begun = replace(
            rollout,
            status=Status.RUNNING,
            stage=stage,
            epoch=rollout.epoch + 1,
            since=self.at,
            tally=Tally(),
            reason=reason,
        )
        self.put(replace(begun, expected=begun.reached - begun.settled))

    def end(self, rollout: Rollout, status: Status, reason: str) -> None:
        """Set another status than running."""
        self.put(replace(rollout, status=status, reason=reason))


def _count(tally: Tally, progress: Progress, by: int) -> Tally:
    change: dict[str, Any] = {progress.value: getattr(tally, progress.value) + by}
    return replace(tally, **change)
