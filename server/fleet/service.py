"""The fleet as a service: a database around the state machine. No clock: times are arguments."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Self, TypeVar

from sqlalchemy import ColumnElement, delete, func, select
from sqlalchemy.orm import Session

from prunecast.server.fleet import events
from prunecast.server.fleet.audit import AuditEntry, AuditKind
from prunecast.server.fleet.database import Database
from prunecast.server.fleet.devices import DeviceService, token_hash
from prunecast.server.fleet.errors import NotFound, Unusable
from prunecast.server.fleet.model import Device, Fleet, Group, Outcome, Release, Rollout, Status
from prunecast.server.fleet.operators import Operators
from prunecast.server.fleet.reports import Health
from prunecast.server.fleet.tables import (
    AuditRow,
    DeviceRow,
    GroupRow,
    HealthRow,
    ReportRow,
    RolloutRow,
    TokenRow,
    to_device,
    to_entry,
    to_group,
    to_rollout,
)
from prunecast.server.fleet.transactions import decide, load, load_device, write_audit

__all__ = ["FleetService"]

_NAMED = 5  # devices in a warning
_Row = TypeVar("_Row", DeviceRow, RolloutRow)


class FleetService(DeviceService):
    """Devices, groups and rollouts in a database; several processes may share one.

    Args:
        url: of the database, such as ``sqlite:///fleet.db``.
        releases: gives the live releases; called in every operation, so it should be quick.
        guard: held while an operator's event is decided and stored; the repository's lock
            (`RepositoryReader.held`), so that no release that the event names is retired
            between the look at the live ones and the use.
        operator: the token of the operator who acts; needed where there are `operators`.

    Attributes:
        operators: who may change the fleet.

    Raises:
        DatabaseMissing: the database holds no fleet: `create` one.
        SchemaMismatch: it was made by another version.
        DatabaseError: it cannot be reached.
    """

    def __init__(
        self,
        url: str,
        releases: Callable[[], Iterable[Release]],
        *,
        guard: Callable[[], AbstractContextManager[object]] = nullcontext,
        operator: str | None = None,
    ) -> None:
        super().__init__(Database(url), releases)
        self._guard = guard
        self.operators = Operators(self._database, operator)

    @classmethod
    def create(
        cls, url: str, releases: Callable[[], Iterable[Release]], *, repository: Path | None = None
    ) -> FleetService:
        """Make the tables in a database that holds no fleet yet.

        Raises:
            AlreadyExists: it does.
            DatabaseError: it cannot be reached.
        """
        settings = {} if repository is None else {"repository": str(repository.absolute())}
        Database.create(url, settings).close()
        return cls(url, releases)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    def tick(self, now: float) -> None:
        """Look at deadlines; polls and reports do so as well, for their own rollout."""
        running = select(RolloutRow.groups).where(RolloutRow.status == Status.RUNNING.value)
        with self._database.transaction() as session:
            found = list(session.scalars(running.order_by(RolloutRow.started, RolloutRow.id)))
        for groups in found:
            with self._database.transaction() as session:
                part = load(session, self._releases, now, groups=groups)
                decide(session, part, events.Tick(at=now))

    def enrol(self, device: str, group: str, *, now: float, actor: str) -> str:
        """Add a device; only a hash of its token is kept.

        Returns:
            The token, which cannot be shown again.

        Raises:
            AlreadyExists: there is, or was, a device of that name.
            NotFound: there is no such group.
            Unusable: the name.
            TokenRefused: there are operators, and none of them acts.
        """
        actor = self.operators.acting(actor)
        token = secrets.token_urlsafe(32)
        event = events.AddDevice(at=now, actor=actor, device=device, group=group)

        def work(session: Session) -> str:
            decide(session, load_device(session, self._releases, now, device, group), event)
            session.add(TokenRow(hash=token_hash(token), device=device, created=now))
            return token

        return self._transact(work)

    def renew_token(self, device: str, *, now: float, actor: str) -> str:
        """Replace a device's token; the old one is refused from now on.

        Raises:
            NotFound: no such device, or it is revoked.
            TokenRefused: there are operators, and none of them acts.
        """
        actor = self.operators.acting(actor)
        token = secrets.token_urlsafe(32)
        with self._database.transaction() as session:
            row = session.get(DeviceRow, device, with_for_update=True)
            if row is None or row.revoked:
                raise NotFound(f"there is no device {device!r}, or it is revoked: enrol a new one")
            session.execute(delete(TokenRow).where(TokenRow.device == device))
            session.add(TokenRow(hash=token_hash(token), device=device, created=now))
            write_audit(session, [AuditEntry(now, actor, AuditKind.TOKEN_RENEWED, device)])
        return token

    def operate(self, event: events.AnyEvent) -> tuple[str, ...]:
        """Apply what an operator wants: any event but a device's.

        Returns:
            What the operator ought to know about it; see `Decision.warnings`.

        Raises:
            FleetError: it cannot be; nothing changed.
            TokenRefused: there are operators, and none of them acts.
        """
        if isinstance(event, events.AddDevice | events.Poll | events.ReportOutcome | events.Tick):
            raise Unusable(f"{type(event).__name__} is not an operator's event: use its own method")
        event = replace(event, actor=self.operators.acting(event.actor))

        def work(session: Session) -> tuple[str, ...]:
            (decision,) = decide(session, self._load(session, event), event)
            if isinstance(event, events.RevokeDevice):
                session.execute(delete(TokenRow).where(TokenRow.device == event.device))
            return (*decision.warnings, *_failed_before(session, event))

        with self._guard():
            return self._transact(work)

    def settings(self) -> dict[str, str]:
        """What was stored with the tables: the repository's folder."""
        return self._database.settings()

    def overview(self) -> Fleet:
        """The live releases, all groups with their last rollouts, and the devices with a pin."""
        pinned = DeviceRow.pin.is_not(None) & DeviceRow.revoked.is_(False)
        with self._database.transaction() as session:
            rows = list(session.scalars(select(GroupRow).order_by(GroupRow.id)))
            last = {r.rollout for r in rows if r.rollout}
            rollouts = session.scalars(select(RolloutRow).where(RolloutRow.id.in_(last)))
            devices = session.scalars(select(DeviceRow).where(pinned).order_by(DeviceRow.id))
            return Fleet(
                frozenset(self._releases()),
                {row.id: to_group(row) for row in rows},
                {row.id: to_device(row) for row in devices},
                {row.id: to_rollout(row) for row in rollouts},
            )

    def groups(self) -> list[tuple[Group, int | None]]:
        """All groups by name, each with the version in force."""
        fleet = self.overview()
        return [(group, fleet.stable(group)) for group in fleet.groups.values()]

    def device_counts(self) -> dict[str, int]:
        """How many devices that are not revoked each group has; a group without any is left out."""
        wanted = select(DeviceRow.group, func.count()).where(DeviceRow.revoked.is_(False))
        with self._database.transaction() as session:
            return dict(session.execute(wanted.group_by(DeviceRow.group)).tuples().all())

    def device(self, name: str) -> Device:
        """A device.

        Raises:
            NotFound: there is none of that name.
        """
        with self._database.transaction() as session:
            return to_device(_found(session, DeviceRow, name, "device"))

    def health(self, device: str) -> tuple[Health, float] | None:
        """What a device last said about how it is, and when that arrived; None: nothing yet.

        Raises:
            NotFound: there is no such device.
        """
        with self._database.transaction() as session:
            _found(session, DeviceRow, device, "device")
            row = session.get(HealthRow, device)
            return None if row is None else (Health(**row.document), row.at)

    def devices(
        self,
        group: str | None = None,
        *,
        rollout: str | None = None,
        after: str | None = None,
        limit: int | None = None,
    ) -> list[Device]:
        """Devices by name, page by page.

        Args:
            group: only those of this group.
            rollout: only those that take, or last took, part in this rollout.
            after: begin after this name: the last one of the page before.
            limit: how many at most; None: all.
        """
        wanted = select(DeviceRow).order_by(DeviceRow.id).limit(limit)
        if group is not None:
            wanted = wanted.where(DeviceRow.group == group)
        if rollout is not None:
            wanted = wanted.where(DeviceRow.part_rollout == rollout)
        if after is not None:
            wanted = wanted.where(DeviceRow.id > after)
        with self._database.transaction() as session:
            return [to_device(row) for row in session.scalars(wanted)]

    def rollouts(self) -> list[Rollout]:
        """All rollouts, oldest first."""
        wanted = select(RolloutRow).order_by(RolloutRow.started, RolloutRow.id)
        with self._database.transaction() as session:
            return [to_rollout(row) for row in session.scalars(wanted)]

    def rollout(self, name: str) -> Rollout:
        """A rollout; who takes part in it is said by `devices`.

        Raises:
            NotFound: there is none of that name.
        """
        with self._database.transaction() as session:
            return to_rollout(_found(session, RolloutRow, name, "rollout"))

    def audit(
        self, *, subject: str | None = None, after: int | None = None, limit: int = 100
    ) -> list[AuditEntry]:
        """Entries of the audit log, oldest first: what this or another process did.

        Whatever changes a directive is in the log. PostgreSQL may show an entry only after a later
        one, so who follows the log should also look by itself from time to time.

        Args:
            subject: only what concerns this device, group or rollout.
            after: the first entries after this number; None: the last ones.
            limit: how many at most.
        """
        newest = after is None
        order = AuditRow.number.desc() if newest else AuditRow.number
        wanted = select(AuditRow).order_by(order).limit(limit)
        if subject is not None:
            wanted = wanted.where(AuditRow.subject == subject)
        if after is not None:
            wanted = wanted.where(AuditRow.number > after)
        with self._database.transaction() as session:
            found = [to_entry(row) for row in session.scalars(wanted)]
        return found[::-1] if newest else found

    def _load(self, session: Session, event: events.AnyEvent) -> Fleet:
        """What an operator's event concerns."""
        releases, at = self._releases, event.at
        match event:
            case events.AddGroup() | events.PinGroup():
                return load(session, releases, at, groups=[event.group], change_groups=True)
            case events.StartRollout():
                named, groups = session.get(RolloutRow, event.rollout), event.groups
                part = load(
                    session, releases, at, groups=groups, change_groups=True, everybody=True
                )
            case events.Steering():
                named = _found(session, RolloutRow, event.rollout, "rollout")
                resumed = isinstance(event, events.Resume)
                part = load(session, releases, at, groups=named.groups, silent=resumed)
            case events.MoveDevice():
                return load_device(session, releases, at, event.device, event.group)
            case events.RevokeDevice() | events.PinDevice():
                return load_device(session, releases, at, event.device)
            case _:
                raise AssertionError(event)
        # the name is taken, or a later rollout has the groups by now
        others = {named.id: to_rollout(named)} if named else {}
        return replace(part, rollouts={**others, **part.rollouts})


def _failed_before(session: Session, event: events.AnyEvent) -> tuple[str, ...]:
    """Where a version failed already that an operator has chosen, or that an abort goes back to."""
    match event:
        case events.StartRollout():
            failed = _failed_on(session, event.release)
            return _failed_text(event.release, failed, "which do not try it again")
        case events.AddGroup(stable=int(version)):
            release = Release(event.release, version)
            return _failed_text(release, _failed_on(session, release), "which do not try it again")
        case events.PinGroup(version=int(version)):
            release = Release(session.get_one(GroupRow, event.group).release, version)
            return _failed_text(release, _failed_on(session, release), "which do not try it again")
        case events.PinDevice(version=int(version)):
            group = session.get_one(DeviceRow, event.device).group
            release = Release(session.get_one(GroupRow, group).release, version)
            failed = _failed_on(session, release, DeviceRow.id == event.device)
            return _failed_text(release, failed, "which do not try it again")
        case events.Abort():
            found: list[str] = []
            rollout = session.get_one(RolloutRow, event.rollout)
            told = (DeviceRow.part_rollout == rollout.id) & DeviceRow.part_told_at.is_not(None)
            for row in (session.get_one(GroupRow, name) for name in rollout.groups):
                if row.stable is not None:
                    release = Release(row.release, row.stable)
                    failed = _failed_on(session, release, told & (DeviceRow.group == row.id))
                    found += _failed_text(release, failed, "which stay on what they run")
            return tuple(found)
    return ()


def _failed_on(session: Session, release: Release, *conditions: ColumnElement[bool]) -> list[str]:
    """Devices on which a release failed, each with the reason."""
    good = (Outcome.ACTIVATED.value, Outcome.CONFIRMED.value)
    reports = select(ReportRow.device).where(
        ReportRow.version == release.version, ReportRow.outcome.not_in(good)
    )
    wanted = (
        select(DeviceRow)
        .join(GroupRow, DeviceRow.group == GroupRow.id)
        .where(GroupRow.release == release.name, DeviceRow.revoked.is_(False), *conditions)
        .where(DeviceRow.id.in_(reports))
        .order_by(DeviceRow.id)
    )
    found = [to_device(row) for row in session.scalars(wanted)]
    return [
        f"{d.id} ({d.failures[release.version]})" for d in found if release.version in d.failures
    ]


def _failed_text(release: Release, failed: list[str], so: str) -> tuple[str, ...]:
    if not failed:
        return ()
    named = ", ".join(failed[:_NAMED]) + (", …" if len(failed) > _NAMED else "")
    return (f"{release} failed before on {len(failed)} devices, {so}: {named}",)


def _found(session: Session, kind: type[_Row], name: str, what: str) -> _Row:
    row = session.get(kind, name)
    if row is None:
        remedy = f"list them with `prunecast fleet {what} list`"
        raise NotFound(f"there is no {what} named {name!r}: {remedy}")
    return row
