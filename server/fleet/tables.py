"""The fleet's tables, and rows as values; a change of them is a revision in `migrations`."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Double,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from prunecast.server.fleet.audit import AuditEntry, AuditKind
from prunecast.server.fleet.model import (
    Device,
    Failure,
    Group,
    Outcome,
    Part,
    Progress,
    Release,
    Rollout,
    RolloutPolicy,
    Status,
    Tally,
    Told,
)

__all__ = [
    "REVISION",
    "REVISION_TABLE",
    "AuditRow",
    "Base",
    "DeviceRow",
    "GroupRow",
    "HealthRow",
    "MetaRow",
    "ReceiptRow",
    "ReportRow",
    "RolloutRow",
    "TokenRow",
    "columns_of",
    "to_device",
    "to_entry",
    "to_group",
    "to_rollout",
]

REVISION = "0004"
"""The latest in `migrations`; so a service need not load Alembic to see that all is well."""

REVISION_TABLE = "fleet_revision"

_Name = String(64)


class Base(DeclarativeBase):
    """Base of all tables; all names begin with ``fleet_``, as the database may hold others."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {float: Double()}


class MetaRow(Base):
    """Settings: where the release repository is, and hashes of operators' tokens."""

    __tablename__ = "fleet_meta"
    key: Mapped[str] = mapped_column(String(32), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class RolloutRow(Base):
    """A rollout; what is never searched (groups, stages, policy, cohorts, windows) is JSON."""

    __tablename__ = "fleet_rollouts"
    id: Mapped[str] = mapped_column(_Name, primary_key=True)
    release: Mapped[str] = mapped_column(_Name)
    version: Mapped[int] = mapped_column(BigInteger)
    groups: Mapped[list[str]] = mapped_column(JSON)
    stages: Mapped[list[float]] = mapped_column(JSON)
    policy: Mapped[dict[str, Any]] = mapped_column(JSON)
    cohorts: Mapped[list[int]] = mapped_column(JSON)
    since: Mapped[float]
    status: Mapped[str] = mapped_column(String(16), index=True)
    stage: Mapped[int]
    epoch: Mapped[int]
    expected: Mapped[int]
    confirmed: Mapped[int]
    failed: Mapped[int]
    silent: Mapped[int]
    windows: Mapped[list[dict[str, int]] | None] = mapped_column(JSON)
    completed: Mapped[float | None]
    told: Mapped[int]
    settled: Mapped[int]
    reason: Mapped[str] = mapped_column(Text)
    started: Mapped[float] = mapped_column(default=lambda c: c.get_current_parameters()["since"])


class GroupRow(Base):
    """A group, its stable release and its pin."""

    __tablename__ = "fleet_groups"
    id: Mapped[str] = mapped_column(_Name, primary_key=True)
    release: Mapped[str] = mapped_column(_Name)
    stable: Mapped[int | None] = mapped_column(BigInteger)
    pin: Mapped[int | None] = mapped_column(BigInteger)
    rollout: Mapped[str | None] = mapped_column(ForeignKey("fleet_rollouts.id"))


class DeviceRow(Base):
    """A device, its pin, its directive, and its part in a rollout."""

    __tablename__ = "fleet_devices"
    id: Mapped[str] = mapped_column(_Name, primary_key=True)
    group: Mapped[str] = mapped_column("group_id", ForeignKey("fleet_groups.id"), index=True)
    pin: Mapped[int | None] = mapped_column(BigInteger)
    revoked: Mapped[bool]
    running: Mapped[int | None] = mapped_column(BigInteger)
    agent: Mapped[str] = mapped_column(String(64))
    last_seen: Mapped[float | None]
    failures: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    serial: Mapped[int]
    told_version: Mapped[int | None] = mapped_column(BigInteger)
    told_at: Mapped[float | None]
    told_rollout: Mapped[str | None] = mapped_column(_Name)
    told_outcome: Mapped[str | None] = mapped_column(String(32))
    part_rollout: Mapped[str | None] = mapped_column(_Name)
    part_stage: Mapped[int | None]
    part_progress: Mapped[str | None] = mapped_column(String(16))
    part_told_at: Mapped[float | None]
    part_epoch: Mapped[int | None]

    __table_args__ = (
        Index("fleet_devices_overdue", "part_rollout", "part_progress", "part_told_at"),
    )


class TokenRow(Base):
    """SHA-256 of a device's token: 256 random bits need no salt and no slow hash."""

    __tablename__ = "fleet_tokens"
    hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    device: Mapped[str] = mapped_column(ForeignKey("fleet_devices.id"), index=True)
    created: Mapped[float]


class ReportRow(Base):
    """A report that was taken; replays and foreign ones are not kept."""

    __tablename__ = "fleet_reports"
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    at: Mapped[float]
    device: Mapped[str] = mapped_column(_Name, index=True)
    serial: Mapped[int]
    version: Mapped[int] = mapped_column(BigInteger)
    rollout: Mapped[str | None] = mapped_column(_Name)
    outcome: Mapped[str] = mapped_column(String(32))
    detail: Mapped[str] = mapped_column(Text)


class ReceiptRow(Base):
    """Identifier of a report that has arrived: a replay is recognised."""

    __tablename__ = "fleet_receipts"
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    device: Mapped[str] = mapped_column(ForeignKey("fleet_devices.id"))
    report: Mapped[str] = mapped_column(String(64))
    at: Mapped[float]

    __table_args__ = (UniqueConstraint("device", "report"),)


class HealthRow(Base):
    """What a device last said about how it is."""

    __tablename__ = "fleet_health"
    device: Mapped[str] = mapped_column(ForeignKey("fleet_devices.id"), primary_key=True)
    at: Mapped[float]
    document: Mapped[dict[str, Any]] = mapped_column(JSON)


class AuditRow(Base):
    """The audit log; only ever added to."""

    __tablename__ = "fleet_audit"
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    at: Mapped[float]
    actor: Mapped[str] = mapped_column(String(80))
    kind: Mapped[str] = mapped_column(String(32))
    subject: Mapped[str] = mapped_column(_Name, index=True)
    fields: Mapped[dict[str, Any]] = mapped_column(JSON)


def to_group(row: GroupRow) -> Group:
    """The group of a row."""
    return Group(row.id, row.release, row.stable, row.pin, row.rollout)


def to_device(row: DeviceRow) -> Device:
    """The device of a row."""
    part = None
    if row.part_rollout is not None and row.part_progress is not None:
        stage, epoch, progress = row.part_stage or 0, row.part_epoch or 0, row.part_progress
        part = Part(row.part_rollout, stage, Progress(progress), row.part_told_at, epoch)
    outcome = Outcome(row.told_outcome) if row.told_outcome else None
    return Device(
        **_same(row, "id", "group", "pin", "revoked", "running", "agent", "last_seen"),
        failures={
            held["version"]: Failure(Outcome(held["outcome"]), held["detail"], held["at"])
            for held in row.failures
        },
        told=Told(row.serial, row.told_version, row.told_at, row.told_rollout, outcome),
        part=part,
    )


def to_rollout(row: RolloutRow) -> Rollout:
    """The rollout of a row."""
    return Rollout(
        **_same(row, "id", "since", "stage", "epoch", "expected", "told", "settled", "reason"),
        windows=tuple(Tally(**window) for window in row.windows or []),
        completed=row.completed,
        release=Release(row.release, row.version),
        groups=tuple(row.groups),
        stages=tuple(row.stages),
        policy=RolloutPolicy(**row.policy),
        cohorts=tuple(row.cohorts),
        status=Status(row.status),
        tally=Tally(row.confirmed, row.failed, row.silent),
    )


def to_entry(row: AuditRow) -> AuditEntry:
    """The audit entry of a row."""
    return AuditEntry(row.at, row.actor, AuditKind(row.kind), row.subject, row.fields, row.number)


def columns_of(item: Group | Device | Rollout) -> dict[str, Any]:
    """The columns of a value, but for a rollout's `started`, which is set by itself."""
    made = dict(vars(item))
    if isinstance(item, Device):
        told, part = vars(made.pop("told")), vars(made["part"]) if item.part else {}
        del made["part"]
        made["failures"] = [
            {"version": version, **asdict(item.failures[version])} for version in item.failures
        ]
        made["serial"] = told["serial"]
        made |= {f"told_{key}": told[key] for key in ("version", "at", "rollout", "outcome")}
        keys = ("rollout", "stage", "progress", "told_at", "epoch")
        made |= {f"part_{key}": part.get(key) for key in keys}
    elif isinstance(item, Rollout):
        made |= {"release": item.release.name, "version": item.release.version}
        made |= {"policy": asdict(item.policy), **vars(made.pop("tally"))}
        made["windows"] = [asdict(window) for window in item.windows]
    return {key: _plain(value) for key, value in made.items()}


def _same(row: Base, *names: str) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, StrEnum):
        return value.value
    return list(value) if isinstance(value, tuple) else value
