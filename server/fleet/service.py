"""The fleet as a service: a database around the state machine. No clock: times are arguments."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from prunecast.server.fleet.database import Database
from prunecast.server.fleet.devices import BUSY, TRIES, DeviceSide, token_hash
from prunecast.server.fleet.errors import DatabaseError, NotFound, Unusable
from prunecast.server.fleet.events import (
    Abort,
    AddDevice,
    AddGroup,
    MoveDevice,
    Pause,
    PinDevice,
    PinGroup,
    Poll,
    Promote,
    ReportOutcome,
    Resume,
    RevokeDevice,
    StartRollout,
    Tick,
)
from prunecast.server.fleet.machine import AnyEvent
from prunecast.server.fleet.model import (
    AuditEntry,
    Device,
    Directive,
    Fleet,
    Group,
    Outcome,
    Release,
    Rollout,
    Status,
)
from prunecast.server.fleet.reports import (
    Credential,
    DeviceReport,
    DeviceState,
    DirectiveAnswer,
    Health,
    Identity,
    Receipt,
)
from prunecast.server.fleet.tables import (
    AuditRow,
    DeviceRow,
    GroupRow,
    RolloutRow,
    TokenRow,
    to_device,
    to_group,
    to_rollout,
)
from prunecast.server.fleet.transactions import Slice, decide, load_device, write_audit

__all__ = ["FleetService"]


class FleetService:
    """Devices, groups and rollouts in a database; several processes may share one.

    Args:
        url: of the database, such as ``sqlite:///fleet.db``.
        releases: gives the live releases; called in every operation, so it should be quick.

    Raises:
        DatabaseMissing: the database holds no fleet: `create` one.
        SchemaMismatch: it was made by another version.
        DatabaseError: it cannot be reached.
    """

    def __init__(self, url: str, releases: Callable[[], Iterable[Release]]) -> None:
        self._database, self._releases = Database(url), releases
        self._devices = DeviceSide(self._database, releases)

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    def identify(self, credential: Credential) -> Identity:
        """Whom a credential stands for.

        Raises:
            TokenRefused: nobody, or a revoked device.
            DatabaseError: try again later.
        """
        return self._devices.identify(credential)

    def poll(self, credential: Credential, state: DeviceState | None, now: float) -> Directive:
        """What a device shall run.

        Args:
            credential: a token as `enrol` returned it, or a name that a certificate proves.
            state: what the device says about itself; None: as it said before.
            now: seconds since the epoch.

        Raises:
            TokenRefused: the token is unknown or was revoked.
            DatabaseError: try again later; the device keeps what it runs.
        """
        return self._devices.poll(credential, state, now)

    def report(
        self,
        credential: Credential,
        *,
        serial: int,
        version: int,
        outcome: Outcome,
        now: float,
        detail: str = "",
    ) -> bool:
        """Take a device's answer to a directive: `receive` with nothing else.

        Returns:
            Whether it changed anything. False: it was known already, or answers another directive
            than the present one. Either way the device need not send it again.

        Raises:
            TokenRefused: the token is unknown or was revoked.
            DatabaseError: send it again later.
        """
        answer = DirectiveAnswer(serial, version, Outcome(outcome), detail)
        return self._devices.receive(credential, DeviceReport(answer=answer), now).counted

    def receive(self, credential: Credential, report: DeviceReport, now: float) -> Receipt:
        """Take everything that a device reports at once.

        A report whose id was taken before changes nothing; of each device the last 256 ids are
        remembered. Apart from that an answer counts once per serial, and once more if a success
        turns into a failure.

        Raises:
            TokenRefused: the token is unknown or was revoked.
            DatabaseError: send it again later.
        """
        return self._devices.receive(credential, report, now)

    def health(self, device: str) -> tuple[Health, float] | None:
        """What a device last said about how it is, and when that arrived; None: nothing yet.

        Raises:
            NotFound: there is no such device.
        """
        return self._devices.health(device)

    def tick(self, now: float) -> None:
        """Look at deadlines; polls and reports do so as well, for their own rollout."""
        for rollout in self.rollouts():
            if rollout.status is Status.RUNNING:
                with self._database.transaction() as session:
                    part = Slice.load(session, now, groups=rollout.groups)
                    decide(session, part, self._releases(), Tick(at=now))

    def enrol(self, device: str, group: str, *, now: float, actor: str) -> str:
        """Add a device; only a hash of its token is kept.

        Returns:
            The token, which cannot be shown again.

        Raises:
            AlreadyExists: there is, or was, a device of that name.
            NotFound: there is no such group.
            Unusable: the name.
        """
        token = secrets.token_urlsafe(32)
        event = AddDevice(at=now, actor=actor, device=device, group=group)
        for _ in range(TRIES):
            with self._database.transaction() as session:
                part = load_device(session, now, device, group)
                if part is None:
                    continue
                decide(session, part, self._releases(), event)
                session.add(TokenRow(hash=token_hash(token), device=device, created=now))
                return token
        raise DatabaseError(BUSY)

    def renew_token(self, device: str, *, now: float, actor: str) -> str:
        """Replace a device's token; the old one is refused from now on.

        Raises:
            NotFound: no such device, or it is revoked.
        """
        token = secrets.token_urlsafe(32)
        with self._database.transaction() as session:
            row = session.get(DeviceRow, device, with_for_update=True)
            if row is None or row.revoked:
                raise NotFound(f"there is no device {device!r}, or it is revoked: enrol a new one")
            session.execute(delete(TokenRow).where(TokenRow.device == device))
            session.add(TokenRow(hash=token_hash(token), device=device, created=now))
            write_audit(session, [AuditEntry(now, actor, "token renewed", device)])
        return token

    def operate(self, event: AnyEvent) -> None:
        """Apply what an operator wants: any event but a device's.

        Raises:
            FleetError: it cannot be; nothing changed.
        """
        if isinstance(event, AddDevice | Poll | ReportOutcome | Tick):
            raise Unusable(f"{type(event).__name__} is not an operator's event: use its own method")
        for _ in range(TRIES):
            with self._database.transaction() as session:
                part = self._load(session, event)
                if part is None:
                    continue
                decide(session, part, self._releases(), event)
                if isinstance(event, RevokeDevice):
                    session.execute(delete(TokenRow).where(TokenRow.device == event.device))
                return
        raise DatabaseError(BUSY)

    def changes(self, since: int | None = None) -> tuple[int, list[AuditEntry]]:
        """What has happened after an entry of the audit log, in this or another process.

        Whatever changes a directive is in the log. PostgreSQL may show an entry only after a later
        one, so who follows the log should also look by itself from time to time.

        Args:
            since: number of the last known entry; None: only the present last number is wanted.

        Returns:
            Number of the last entry, and the entries after `since`, at most 1000.
        """
        with self._database.transaction() as session:
            if since is None:
                return session.scalar(select(func.max(AuditRow.number))) or 0, []
            wanted = select(AuditRow).where(AuditRow.number > since).order_by(AuditRow.number)
            rows = list(session.scalars(wanted.limit(1000)))
        entries = [AuditEntry(r.at, r.actor, r.action, r.subject, r.detail) for r in rows]
        return (rows[-1].number if rows else since), entries

    def settings(self) -> dict[str, str]:
        """What was stored with the tables: the schema's version, the repository's folder."""
        return self._database.settings()

    def groups(self) -> list[tuple[Group, int | None]]:
        """All groups by name, each with the version in force."""
        with self._database.transaction() as session:
            rows = list(session.scalars(select(GroupRow).order_by(GroupRow.id)))
            last = {r.rollout for r in rows if r.rollout}
            found = session.scalars(select(RolloutRow).where(RolloutRow.id.in_(last)))
            fleet = Fleet(rollouts={r.id: to_rollout(r) for r in found})
            return [(group, fleet.stable(group)) for group in map(to_group, rows)]

    def devices(self, group: str | None = None) -> list[Device]:
        """All devices by name, or those of one group."""
        wanted = select(DeviceRow).order_by(DeviceRow.id)
        if group is not None:
            wanted = wanted.where(DeviceRow.group == group)
        with self._database.transaction() as session:
            return [to_device(row) for row in session.scalars(wanted)]

    def rollouts(self) -> list[Rollout]:
        """All rollouts, oldest first."""
        wanted = select(RolloutRow).order_by(RolloutRow.started, RolloutRow.id)
        with self._database.transaction() as session:
            return [to_rollout(row) for row in session.scalars(wanted)]

    def rollout(self, name: str) -> tuple[Rollout, list[Device]]:
        """A rollout and the devices that take, or last took, part in it.

        Raises:
            NotFound: there is none of that name.
        """
        with self._database.transaction() as session:
            row = session.get(RolloutRow, name)
            if row is None:
                raise NotFound(_NO_ROLLOUT.format(name))
            wanted = select(DeviceRow).where(DeviceRow.part_rollout == name)
            rows = session.scalars(wanted.order_by(DeviceRow.part_stage, DeviceRow.id))
            return to_rollout(row), [to_device(r) for r in rows]

    def audit(self, *, subject: str | None = None, limit: int = 100) -> list[AuditEntry]:
        """The last entries of the audit log, oldest first."""
        wanted = select(AuditRow).order_by(AuditRow.number.desc()).limit(limit)
        if subject is not None:
            wanted = wanted.where(AuditRow.subject == subject)
        with self._database.transaction() as session:
            rows = list(session.scalars(wanted))
        return [AuditEntry(r.at, r.actor, r.action, r.subject, r.detail) for r in reversed(rows)]

    def _load(self, session: Session, event: AnyEvent) -> Slice | None:
        """What an operator's event concerns; None if it changed while it was being locked."""
        match event:
            case AddGroup() | PinGroup():
                return Slice.load(session, event.at, groups=[event.group], change_groups=True)
            case StartRollout():
                part = Slice.load(
                    session, event.at, groups=event.groups, change_groups=True, everybody=True
                )
                if (taken := session.get(RolloutRow, event.rollout)) is not None:
                    part.rollouts[taken.id] = taken
                return part
            case Promote() | Pause() | Resume() | Abort():
                row = session.get(RolloutRow, event.rollout)
                if row is None:
                    raise NotFound(_NO_ROLLOUT.format(event.rollout))
                resumed = isinstance(event, Resume)
                part = Slice.load(session, event.at, groups=row.groups, silent=resumed)
                part.rollouts.setdefault(row.id, row)  # a later one may have the groups by now
                return part
            case MoveDevice():
                return load_device(session, event.at, event.device, event.group)
            case RevokeDevice() | PinDevice():
                return load_device(session, event.at, event.device)
        raise AssertionError(event)


_NO_ROLLOUT = "there is no rollout named {!r}: list them with `prunecast fleet rollout list`"
