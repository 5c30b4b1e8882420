"""The part of the service that devices talk to."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TypeVar

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from prunecast.server.fleet.database import Database
from prunecast.server.fleet.errors import DatabaseError, NotFound, TokenRefused
from prunecast.server.fleet.events import Poll, ReportOutcome
from prunecast.server.fleet.machine import AnyEvent
from prunecast.server.fleet.model import Directive, Release
from prunecast.server.fleet.reports import (
    Certified,
    Credential,
    DeviceReport,
    DeviceState,
    Health,
    Identity,
    Receipt,
    printable,
)
from prunecast.server.fleet.tables import (
    DeviceRow,
    GroupRow,
    HealthRow,
    ReceiptRow,
    ReportRow,
    TokenRow,
)
from prunecast.server.fleet.transactions import Slice, decide, load_device

__all__ = ["BUSY", "TRIES", "DeviceSide", "token_hash"]

_T = TypeVar("_T")
TRIES = 5
BUSY = "the device was moved again and again meanwhile: try once more"
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


class DeviceSide:
    """Answers devices; every method is one transaction.

    Args:
        database: of the fleet.
        releases: gives the live releases.
    """

    def __init__(self, database: Database, releases: Callable[[], Iterable[Release]]) -> None:
        self._database, self._releases = database, releases

    def identify(self, credential: Credential) -> Identity:
        """See `FleetService.identify`."""
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
        """See `FleetService.poll`."""

        def work(session: Session, part: Slice, device: str) -> Directive:
            event = _poll(part, device, state, now)
            return decide(session, part, self._releases(), event)[-1].directives[0]

        return self._with_device(credential, now, work)

    def receive(self, credential: Credential, report: DeviceReport, now: float) -> Receipt:
        """See `FleetService.receive`."""

        def work(session: Session, part: Slice, device: str) -> Receipt:
            if report.id is not None and not _remember(session, device, report.id, now):
                return Receipt(counted=False, replayed=True)
            if report.health is not None:
                _store(session, device, report.health, now)
            events: list[AnyEvent] = []
            counted = False
            if report.answer is not None:
                given = report.answer
                event = ReportOutcome(
                    at=now,
                    device=device,
                    serial=given.serial,
                    version=given.version,
                    outcome=given.outcome,
                    detail=printable(given.detail),
                )
                events.append(event)
            if report.state is not None:
                events.append(_poll(part, device, report.state, now))
            decisions = decide(session, part, self._releases(), *events) if events else []
            if report.answer is not None and (counted := decisions[0].accepted):
                rollout = decisions[0].fleet.devices[device].told.rollout
                session.add(_report_row(event, rollout))
            return Receipt(counted, replayed=False)

        return self._with_device(credential, now, work)

    def health(self, device: str) -> tuple[Health, float] | None:
        """See `FleetService.health`."""
        with self._database.transaction() as session:
            if session.get(DeviceRow, device) is None:
                raise NotFound(f"there is no device named {device!r}")
            row = session.get(HealthRow, device)
            return None if row is None else (Health(**row.document), row.at)

    def _with_device(
        self, credential: Credential, now: float, work: Callable[[Session, Slice, str], _T]
    ) -> _T:
        for _ in range(TRIES):
            with self._database.transaction() as session:
                name = _device_of(session, credential)
                part = load_device(session, now, name)
                if part is None:
                    continue  # moved meanwhile: look again
                if name not in part.devices or part.devices[name].revoked:
                    raise _refusal(credential)
                return work(session, part, name)
        raise DatabaseError(BUSY)


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


def _poll(part: Slice, device: str, state: DeviceState | None, now: float) -> Poll:
    row = part.devices[device]
    running, agent = (row.running, row.agent) if state is None else (state.running, state.agent)
    return Poll(at=now, device=device, running=running, agent=agent)


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


def _store(session: Session, device: str, health: Health, now: float) -> None:
    document = {**asdict(health), "error": printable(health.error), "figures": dict(health.figures)}
    row = session.get(HealthRow, device)
    if row is None:
        session.add(HealthRow(device=device, at=now, document=document))
    else:
        row.at, row.document = now, document


def _report_row(event: ReportOutcome, rollout: str | None) -> ReportRow:
    return ReportRow(
        at=event.at,
        device=event.device,
        serial=event.serial,
        version=event.version,
        rollout=rollout,
        outcome=event.outcome.value,
        detail=event.detail,
    )
