"""The part of a fleet that an event concerns: locked, loaded, and written back.

Locks are taken in the order groups, rollouts, devices, each by name, so no two transactions wait
for each other. Groups are locked for sharing unless the event changes them; an active rollout is
locked for writing, which makes all decisions about it one after the other, in whichever process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, or_, select
from sqlalchemy.orm import Session

from prunecast.server.fleet.audit import AuditEntry
from prunecast.server.fleet.errors import DatabaseError
from prunecast.server.fleet.events import AnyEvent
from prunecast.server.fleet.machine import apply
from prunecast.server.fleet.model import (
    SOAK_SECONDS,
    Device,
    Fleet,
    Group,
    Progress,
    Release,
    Rollout,
    Status,
)
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

__all__ = ["Moved", "decide", "load", "load_device", "write_audit"]

_Row = TypeVar("_Row", GroupRow, RolloutRow, DeviceRow)
_Items = Mapping[str, Group] | Mapping[str, Device] | Mapping[str, Rollout]
_ACTIVE = (Status.RUNNING.value, Status.PAUSED.value)


class Moved(DatabaseError):
    """A device was moved while its group was being locked: look again."""


def load(
    session: Session,
    releases: Callable[[], Iterable[Release]],
    at: float,
    *,
    groups: Collection[str],
    devices: Collection[str] = (),
    change_groups: bool = False,
    everybody: bool = False,
    silent: bool = False,
    counting: bool = True,
) -> Fleet:
    """Lock and load.

    Args:
        session: in a transaction.
        releases: gives the live ones.
        at: time, which decides who is overdue.
        groups: names of the groups.
        devices: names of the devices.
        change_groups: whether the event changes the groups themselves.
        everybody: whether all devices of the groups are needed.
        silent: whether the silent devices of the groups' rollouts are needed.
        counting: whether the event may change a rollout that is completed already, so that it is
            locked, too.
    """
    wanted = select(GroupRow).where(GroupRow.id.in_(groups))
    held = _locked(session, wanted, GroupRow, share=not change_groups)
    rollouts: list[RolloutRow] = []
    for name in sorted({g.rollout for g in held if g.rollout}):
        rollout = session.get(RolloutRow, name, populate_existing=True)
        counts = (*_ACTIVE, Status.COMPLETED.value) if counting else _ACTIVE
        if rollout is not None and rollout.status in counts:
            found = select(RolloutRow).where(RolloutRow.id == name)
            rollouts += _locked(session, found, RolloutRow)
        elif rollout is not None:
            rollouts.append(rollout)
    conditions: list[ColumnElement[bool]] = [DeviceRow.id.in_(devices)]
    conditions += [
        (DeviceRow.part_rollout == r.id)
        & (DeviceRow.part_progress == progress.value)
        & (DeviceRow.part_told_at <= at - float(r.policy["report_deadline"]) - more)
        for r in rollouts
        if r.status in _ACTIVE
        for progress, more in ((Progress.TOLD, 0.0), (Progress.ACTIVATED, SOAK_SECONDS))
    ]
    if silent:
        told_nothing = DeviceRow.part_progress == Progress.SILENT.value
        conditions.append(told_nothing & DeviceRow.part_rollout.in_([r.id for r in rollouts]))
    if everybody:
        conditions.append(DeviceRow.group.in_(groups))
    members = _locked(session, select(DeviceRow).where(or_(*conditions)), DeviceRow)
    # the other groups of an active rollout, and those of overdue devices there; read only
    shared = {g for r in rollouts if r.status in _ACTIVE for g in r.groups}
    if foreign := (shared | {d.group for d in members}) - {g.id for g in held}:
        held += session.scalars(select(GroupRow).where(GroupRow.id.in_(foreign)))
    session.info["rows"] = held, rollouts, members  # a session holds what it has loaded weakly
    return Fleet(
        frozenset(releases()),
        {row.id: to_group(row) for row in held},
        {row.id: to_device(row) for row in members},
        {row.id: to_rollout(row) for row in rollouts},
    )


def load_device(
    session: Session,
    releases: Callable[[], Iterable[Release]],
    at: float,
    name: str,
    *others: str,
    counting: bool = True,
) -> Fleet:
    """What an event of one device concerns.

    Args:
        session: in a transaction.
        releases: gives the live ones.
        at: time of the event.
        name: of the device.
        others: groups that are concerned besides its own.
        counting: see `load`.

    Raises:
        Moved: the device was moved meanwhile.
    """
    group = session.scalar(select(DeviceRow.group).where(DeviceRow.id == name))
    groups = [*others, *([group] if group is not None else [])]
    fleet = load(session, releases, at, groups=groups, devices=[name], counting=counting)
    if group is not None and fleet.devices[name].group != group:
        raise Moved("the device was moved again and again meanwhile: try once more")
    return fleet


def decide(session: Session, fleet: Fleet, *events: AnyEvent) -> list[Decision]:
    """Apply events one after the other; the result is written once.

    Raises:
        FleetError: an event cannot be; the transaction must be rolled back.
    """
    state, decisions = fleet, []
    for event in events:
        decisions.append(apply(state, event))
        state = decisions[-1].fleet
    # referred-to rows first
    _write(session, RolloutRow, fleet.rollouts, state.rollouts)
    _write(session, GroupRow, fleet.groups, state.groups)
    _write(session, DeviceRow, fleet.devices, state.devices)
    write_audit(session, [entry for decision in decisions for entry in decision.audit])
    return decisions


def write_audit(session: Session, entries: Sequence[AuditEntry]) -> None:
    """Add to the audit log."""
    for e in entries:
        row = AuditRow(
            at=e.at, actor=e.actor[:80], kind=e.kind.value, subject=e.subject, fields=dict(e.fields)
        )
        session.add(row)


def _write(session: Session, kind: type[_Row], before: _Items, after: _Items) -> None:
    for name, item in after.items():
        if item is before.get(name):
            continue
        columns = columns_of(item)
        if name not in before:
            session.add(kind(**columns))
            session.flush()
            continue
        row = session.get_one(kind, name)  # loaded already
        for key, value in columns.items():
            setattr(row, key, value)


def _locked(
    session: Session, wanted: Select[Any], row: type[_Row], *, share: bool = False
) -> list[_Row]:
    locked = wanted.order_by(row.id).with_for_update(read=share)
    return list(session.scalars(locked.execution_options(populate_existing=True)))
