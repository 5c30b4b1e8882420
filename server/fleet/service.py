"""The fleet as a service: a database around the state machine. No clock: times are arguments."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from prunecast.server.fleet.database import Database
from prunecast.server.fleet.errors import DatabaseError, NotFound, TokenRefused, Unusable
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
    Report,
    Resume,
    RevokeDevice,
    StartRollout,
    Tick,
)
from prunecast.server.fleet.loading import Slice, write_audit
from prunecast.server.fleet.machine import AnyEvent, apply
from prunecast.server.fleet.mapping import to_device, to_group, to_rollout
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
from prunecast.server.fleet.step import Decision
from prunecast.server.fleet.tables import (
    AuditRow,
    DeviceRow,
    GroupRow,
    ReportRow,
    RolloutRow,
    TokenRow,
)

__all__ = ["DeviceState", "FleetService"]

_TRIES = 5
_MOST_DETAIL = 500


@dataclass(frozen=True)
class DeviceState:
    """What a device says about itself when it polls.

    Attributes:
        running: version of the active release; None: none is active.
        agent: version of its software.

    Raises:
        Unusable: out of bounds.
    """

    running: int | None = None
    agent: str = ""

    def __post_init__(self) -> None:
        if self.running is not None and not 1 <= self.running < 10**15:
            raise Unusable(f"running version {str(self.running)[:20]} is no release number")
        if len(self.agent) > 64 or not self.agent.isprintable():
            raise Unusable("the agent's version is at most 64 printable characters")


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

    def poll(self, device_token: str, state: DeviceState, now: float) -> Directive:
        """What a device shall run.

        Args:
            device_token: as `enrol` returned it.
            state: what the device says about itself.
            now: seconds since the epoch.

        Raises:
            TokenRefused: the token is unknown or was revoked.
            DatabaseError: try again later; the device keeps what it runs.
        """

        def make(device: str) -> Poll:
            return Poll(at=now, device=device, running=state.running, agent=state.agent)

        return self._from_device(device_token, make).directives[0]

    def report(
        self,
        device_token: str,
        *,
        serial: int,
        version: int,
        outcome: Outcome,
        now: float,
        detail: str = "",
    ) -> bool:
        """Take a device's answer to a directive.

        Args:
            device_token: as `enrol` returned it.
            serial: of the directive that is answered.
            version: that the directive named.
            outcome: what became of it.
            now: seconds since the epoch.
            detail: the agent's own words; at most 500 characters are kept.

        Returns:
            Whether it changed anything. False: it was known already, or answers another directive
            than the present one. Either way the device need not send it again.

        Raises:
            TokenRefused: the token is unknown or was revoked.
            DatabaseError: send it again later.
        """
        words = "".join(c if c.isprintable() else " " for c in detail[:_MOST_DETAIL])

        def make(device: str) -> Report:
            return Report(
                at=now,
                device=device,
                serial=serial,
                version=version,
                outcome=Outcome(outcome),
                detail=words,
            )

        return self._from_device(device_token, make).accepted

    def tick(self, now: float) -> None:
        """Look at deadlines; polls and reports do so as well, for their own rollout."""
        for rollout in self.rollouts():
            if rollout.status is Status.RUNNING:
                with self._database.transaction() as session:
                    part = Slice.load(session, now, groups=rollout.groups)
                    self._decide(session, part, Tick(at=now))

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
        for _ in range(_TRIES):
            with self._database.transaction() as session:
                part = self._load_device(session, now, device, group)
                if part is None:
                    continue
                self._decide(session, part, event)
                session.add(TokenRow(hash=_hash(token), device=device, created=now))
                return token
        raise DatabaseError(_BUSY)

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
            session.add(TokenRow(hash=_hash(token), device=device, created=now))
            write_audit(session, [AuditEntry(now, actor, "token renewed", device)])
        return token

    def operate(self, event: AnyEvent) -> None:
        """Apply what an operator wants: any event but a device's.

        Raises:
            FleetError: it cannot be; nothing changed.
        """
        if isinstance(event, AddDevice | Poll | Report | Tick):
            raise Unusable(f"{type(event).__name__} is not an operator's event: use its own method")
        for _ in range(_TRIES):
            with self._database.transaction() as session:
                part = self._load(session, event)
                if part is None:
                    continue
                self._decide(session, part, event)
                if isinstance(event, RevokeDevice):
                    session.execute(delete(TokenRow).where(TokenRow.device == event.device))
                return
        raise DatabaseError(_BUSY)

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

    def _from_device(self, token: str, make: Callable[[str], Poll | Report]) -> Decision:
        for _ in range(_TRIES):
            with self._database.transaction() as session:
                name = session.scalar(select(TokenRow.device).where(TokenRow.hash == _hash(token)))
                if name is None:
                    raise TokenRefused(_REFUSED)
                event = make(name)
                part = self._load_device(session, event.at, name)
                if part is None:
                    continue  # moved meanwhile: look again
                if part.devices[name].revoked:
                    raise TokenRefused(_REFUSED)
                decision = self._decide(session, part, event)
                if isinstance(event, Report) and decision.accepted:
                    told = decision.fleet.devices[name].told
                    session.add(_report_row(event, told.rollout))
                return decision
        raise DatabaseError(_BUSY)

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
                return self._load_device(session, event.at, event.device, event.group)
            case RevokeDevice() | PinDevice():
                return self._load_device(session, event.at, event.device)
        raise AssertionError(event)

    def _load_device(self, session: Session, at: float, name: str, *others: str) -> Slice | None:
        group = session.scalar(select(DeviceRow.group).where(DeviceRow.id == name))
        groups = [*others, *([group] if group is not None else [])]
        part = Slice.load(session, at, groups=groups, devices=[name])
        if group is not None and part.devices[name].group != group:
            return None
        return part

    def _decide(self, session: Session, part: Slice, event: AnyEvent) -> Decision:
        before = part.fleet(self._releases())
        decision = apply(before, event)
        part.write(session, before, decision.fleet)
        write_audit(session, decision.audit)
        return decision


_BUSY = "the device was moved again and again meanwhile: try once more"
_REFUSED = "the token is unknown or revoked: enrol the device with `prunecast fleet device add`"
_NO_ROLLOUT = "there is no rollout named {!r}: list them with `prunecast fleet rollout list`"


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _report_row(event: Report, rollout: str | None) -> ReportRow:
    return ReportRow(
        at=event.at,
        device=event.device,
        serial=event.serial,
        version=event.version,
        rollout=rollout,
        outcome=event.outcome.value,
        detail=event.detail,
    )
