"""The part of the service that devices talk to."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import TypeVar

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from prunecast.server.fleet.database import Database
from prunecast.server.fleet.errors import TokenRefused
from prunecast.server.fleet.events import AnyEvent, Poll, ReportOutcome
from prunecast.server.fleet.model import Directive, Fleet, Release
from prunecast.server.fleet.reports import (
    Certified,
    Credential,
    DeviceReport,
    DeviceState,
    Identity,
    Receipt,
)
from prunecast.server.fleet.tables import (
    DeviceRow,
    GroupRow,
    HealthRow,
    ReceiptRow,
    ReportRow,
    TokenRow,
)
from prunecast.server.fleet.transactions import Moved, decide, load_device

__all__ = ["DeviceService", "token_hash"]

_T = TypeVar("_T")
_TRIES = 5
_REFUSED = "the token is unknown or revoked: enrol the device with `prunecast fleet device add`"
_NOT_ENROLLED = (
    "the certificate is for {!r}, which is not enrolled or is revoked: "
    "`prunecast fleet device add` enrols it"
)
_REMEMBERED = 256
"""Reports per device whose ids are remembered; more than an agent ever keeps for sending."""


def token_hash(token: str) -> str:
    """What is stored of a token: its SHA-256 in hex."""
    return hashlib.sha256(token.encode()).hexdigest()


class DeviceService:
    """Answers devices; every method is one transaction.

    Args:
        database: of the fleet.
        releases: gives the live releases; called in every operation, so it should be quick.
    """

    def __init__(self, database: Database, releases: Callable[[], Iterable[Release]]) -> None:
        self._database, self._releases = database, releases

    def identify(self, credential: Credential) -> Identity:
        """Whom a credential stands for.

        Raises:
            TokenRefused: nobody, or a revoked device.
            DatabaseError: try again later.
        """
        with self._database.transaction() as session:
            name = _device_of(session, credential)
            wanted = (
                select(GroupRow.release)
                .join(DeviceRow, DeviceRow.group == GroupRow.id)
                .where(DeviceRow.id == name, DeviceRow.revoked.is_(False))
            )
            release = session.scalar(wanted)
            if release is None:
                raise _refusal(credential)
            return Identity(name, release)

    def poll(self, credential: Credential, state: DeviceState | None, now: float) -> Directive:
        """What a device shall run.

        Args:
            credential: a token as `FleetService.enrol` returned it, or a name that a certificate
                proves.
            state: what the device says about itself; None: as it said before.
            now: seconds since the epoch.

        Raises:
            TokenRefused: the token is unknown or was revoked.
            DatabaseError: try again later; the device keeps what it runs.
        """

        def work(session: Session, fleet: Fleet, device: str) -> Directive:
            event = _poll(fleet, device, state, now)
            return decide(session, fleet, event)[-1].directives[0]

        return self._with_device(credential, now, work, counting=False)

    def receive(self, credential: Credential, report: DeviceReport, now: float) -> Receipt:
        """Take everything that a device reports at once.

        A report whose id was taken before changes nothing; of each device the last 256 ids are
        remembered. Apart from that an answer counts once per serial, and once more if what was
        provisional is confirmed, or if it turns into a failure.

        Raises:
            TokenRefused: the token is unknown or was revoked.
            DatabaseError: send it again later.
        """

        def work(session: Session, fleet: Fleet, device: str) -> Receipt:
            if report.id is not None and not _remember(session, device, report.id, now):
                return Receipt(counted=False, replayed=True)
            if report.health is not None:
                document = asdict(report.health)
                session.merge(HealthRow(device=device, at=now, document=document))
            events: list[AnyEvent] = []
            if report.answer is not None:
                events.append(ReportOutcome(at=now, device=device, **vars(report.answer)))
            if report.state is not None:
                events.append(_poll(fleet, device, report.state, now))
            decisions = decide(session, fleet, *events)
            counted = report.answer is not None and decisions[0].accepted
            if report.answer is not None and counted:
                rollout = decisions[0].fleet.devices[device].told.rollout
                columns = {**vars(report.answer), "outcome": report.answer.outcome.value}
                session.add(ReportRow(at=now, device=device, rollout=rollout, **columns))
            return Receipt(counted, replayed=False)

        return self._with_device(credential, now, work, counting=report.answer is not None)

    def _with_device(
        self,
        credential: Credential,
        now: float,
        work: Callable[[Session, Fleet, str], _T],
        *,
        counting: bool,
    ) -> _T:
        def located(session: Session) -> _T:
            name = _device_of(session, credential)
            fleet = load_device(session, self._releases, now, name, counting=counting)
            if name not in fleet.devices or fleet.devices[name].revoked:
                raise _refusal(credential)
            return work(session, fleet, name)

        return self._transact(located)

    def _transact(self, work: Callable[[Session], _T]) -> _T:
        """Do something in a transaction, and in another one if a device was moved meanwhile."""
        for _ in range(_TRIES - 1):
            with suppress(Moved), self._database.transaction() as session:
                return work(session)
        with self._database.transaction() as session:
            return work(session)


def _device_of(session: Session, credential: Credential) -> str:
    if isinstance(credential, Certified):
        return credential.device
    # Looked up by the hash of 256 random bits: how long that takes tells nothing about a token.
    # What is found is compared in constant time nevertheless.
    wanted = token_hash(credential)
    row = session.scalar(select(TokenRow).where(TokenRow.hash == wanted))
    if row is None or not hmac.compare_digest(row.hash, wanted):
        raise _refusal(credential)
    return row.device


def _refusal(credential: Credential) -> TokenRefused:
    if isinstance(credential, Certified):
        return TokenRefused(_NOT_ENROLLED.format(credential.device[:80]))
    return TokenRefused(_REFUSED)


def _poll(fleet: Fleet, device: str, state: DeviceState | None, now: float) -> Poll:
    said = fleet.devices[device] if state is None else state
    return Poll(at=now, device=device, running=said.running, agent=said.agent)


def _remember(session: Session, device: str, report: str, now: float) -> bool:
    """Whether this report is new; the device's row is locked, so two of them take turns."""
    mine = ReceiptRow.device == device
    known = select(ReceiptRow.number).where(mine, ReceiptRow.report == report)
    if session.scalar(known) is not None:
        return False
    session.add(ReceiptRow(device=device, report=report, at=now))
    session.flush()
    newest = select(ReceiptRow.number).where(mine).order_by(ReceiptRow.number.desc())
    last = session.scalar(newest.offset(_REMEMBERED).limit(1))
    if last is not None:
        session.execute(delete(ReceiptRow).where(mine, ReceiptRow.number <= last))
    return True
