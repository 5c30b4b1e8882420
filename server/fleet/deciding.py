"""Load what an event concerns, apply it, write what changed."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.orm import Session

from prunecast.server.fleet.loading import Slice, write_audit
from prunecast.server.fleet.machine import AnyEvent, apply
from prunecast.server.fleet.model import Release
from prunecast.server.fleet.step import Decision
from prunecast.server.fleet.tables import DeviceRow

__all__ = ["decide", "load_device"]


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
