"""The part of a fleet that an event concerns: locked, loaded, and written back.

Locks are taken in the order groups, rollouts, devices, each by name, so no two transactions wait
for each other. Groups are locked for sharing unless the event changes them; an active rollout is
locked for writing, which makes all decisions about it one after the other, in whichever process.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, or_, select
from sqlalchemy.orm import Session

from prunecast.server.fleet.audit import AuditEntry
from prunecast.server.fleet.events import AnyEvent
from prunecast.server.fleet.machine import apply
from prunecast.server.fleet.model import Device, Fleet, Group, Progress, Release, Rollout, Status
from prunecast.server.fleet.step import Decision
from prunecast.server.fleet.tables import (
    AuditRow,
    DeviceRow,
    GroupRow,
    RolloutRow,
    columns_of,
    to_device,
    to_group,
    to_rollout,
)

__all__ = ["Slice", "decide", "load_device", "write_audit"]

_Row = TypeVar("_Row", GroupRow, RolloutRow, DeviceRow)
_AnyRow = GroupRow | RolloutRow | DeviceRow
_Items = Mapping[str, Group] | Mapping[str, Device] | Mapping[str, Rollout]
_ACTIVE = (Status.RUNNING.value, Status.PAUSED.value)


@dataclass
class Slice:
    """Rows that are loaded and locked, and the state that they make.

    Attributes:
        groups: rows by name.
        rollouts: rows by name.
        devices: rows by name.
    """

    groups: dict[str, GroupRow] = field(default_factory=dict)
    rollouts: dict[str, RolloutRow] = field(default_factory=dict)
    devices: dict[str, DeviceRow] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        session: Session,
        at: float,
        *,
        groups: Collection[str],
        devices: Collection[str] = (),
        change_groups: bool = False,
        everybody: bool = False,
        silent: bool = False,
    ) -> Slice:
        """Lock and load.

        Args:
            session: in a transaction.
            at: time, which decides who is overdue.
            groups: names of the groups.
            devices: names of the devices.
            change_groups: whether the event changes the groups themselves.
            everybody: whether all devices of the groups are needed.
            silent: whether the silent devices of the groups' rollouts are needed.
        """
        made = cls()
        wanted = select(GroupRow).where(GroupRow.id.in_(groups))
        made.groups = _locked(session, wanted, GroupRow, share=not change_groups)
        names = sorted({g.rollout for g in made.groups.values() if g.rollout})
        for name in names:
            rollout = session.get(RolloutRow, name, populate_existing=True)
            if rollout is not None and rollout.status in _ACTIVE:
                found = select(RolloutRow).where(RolloutRow.id == name)
                made.rollouts.update(_locked(session, found, RolloutRow))
            elif rollout is not None:
                made.rollouts[name] = rollout
        conditions: list[ColumnElement[bool]] = [DeviceRow.id.in_(devices)]
        conditions += [
            (DeviceRow.part_rollout == r.id)
            & (DeviceRow.part_progress == Progress.TOLD.value)
            & (DeviceRow.part_told_at <= at - float(r.policy["report_deadline"]))
            for r in made.rollouts.values()
            if r.status in _ACTIVE
        ]
        if silent:
            told_nothing = DeviceRow.part_progress == Progress.SILENT.value
            conditions.append(told_nothing & DeviceRow.part_rollout.in_(names))
        if everybody:
            conditions.append(DeviceRow.group.in_(groups))
        made.devices = _locked(session, select(DeviceRow).where(or_(*conditions)), DeviceRow)
        made._load_foreign_groups(session)
        return made

    def fleet(self, releases: Iterable[Release]) -> Fleet:
        """The state."""
        return Fleet(
            frozenset(releases),
            {name: to_group(row) for name, row in self.groups.items()},
            {name: to_device(row) for name, row in self.devices.items()},
            {name: to_rollout(row) for name, row in self.rollouts.items()},
        )

    def write(self, session: Session, before: Fleet, after: Fleet) -> None:
        """Write what differs between two states: referred-to rows first."""
        kinds: tuple[tuple[Mapping[str, _AnyRow], type[_AnyRow], _Items, _Items], ...] = (
            (self.rollouts, RolloutRow, before.rollouts, after.rollouts),
            (self.groups, GroupRow, before.groups, after.groups),
            (self.devices, DeviceRow, before.devices, after.devices),
        )
        for rows, kind, old, new in kinds:
            for name, item in new.items():
                if item is old.get(name):
                    continue
                columns = columns_of(item)
                if (row := rows.get(name)) is None:
                    once = {"started": item.since} if isinstance(item, Rollout) else {}
                    session.add(kind(**columns, **once))
                    session.flush()
                    continue
                for key, value in columns.items():
                    if getattr(row, key) != value:
                        setattr(row, key, value)

    def _load_foreign_groups(self, session: Session) -> None:
        """Groups of overdue devices elsewhere in the same rollout; read only."""
        missing = {d.group for d in self.devices.values()} - set(self.groups)
        if missing:
            for row in session.scalars(select(GroupRow).where(GroupRow.id.in_(missing))):
                self.groups[row.id] = row


def write_audit(session: Session, entries: Sequence[AuditEntry]) -> None:
    """Add to the audit log."""
    for e in entries:
        row = AuditRow(
            at=e.at, actor=e.actor[:80], kind=e.kind.value, subject=e.subject, fields=dict(e.fields)
        )
        session.add(row)


def _locked(
    session: Session, wanted: Select[Any], row: type[_Row], *, share: bool = False
) -> dict[str, _Row]:
    locked = wanted.order_by(row.id).with_for_update(read=share)
    found: Iterable[_Row] = session.scalars(locked.execution_options(populate_existing=True))
    return {item.id: item for item in found}


def load_device(session: Session, at: float, name: str, *others: str) -> Slice | None:
    """What an event of one device concerns; None if the device was moved meanwhile.

    Args:
        session: in a transaction.
        at: time of the event.
        name: of the device.
        others: groups that are concerned besides its own.
    """
    group = session.scalar(select(DeviceRow.group).where(DeviceRow.id == name))
    groups = [*others, *([group] if group is not None else [])]
    part = Slice.load(session, at, groups=groups, devices=[name])
    if group is not None and part.devices[name].group != group:
        return None
    return part


def decide(
    session: Session, part: Slice, releases: Iterable[Release], *events: AnyEvent
) -> list[Decision]:
    """Apply events one after the other; the result is written once.

    Raises:
        FleetError: an event cannot be; the transaction must be rolled back.
    """
    before = part.fleet(releases)
    state, decisions = before, []
    for event in events:
        decisions.append(apply(state, event))
        state = decisions[-1].fleet
    part.write(session, before, state)
    write_audit(session, [entry for decision in decisions for entry in decision.audit])
    return decisions
