"""The fleet's tables, and rows as values; any change of them raises `SCHEMA`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from prunecast.server.fleet.model import (
    Device,
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
    "SCHEMA",
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
    "device_columns",
    "group_columns",
    "rollout_columns",
    "to_device",
    "to_group",
    "to_rollout",
]

SCHEMA = 2
_Name = String(64)


class Base(DeclarativeBase):
    """Base of all tables; all names begin with ``fleet_``, as the database may hold others."""


class MetaRow(Base):
    """Settings: the schema's version, where the release repository is."""

    __tablename__ = "fleet_meta"
    key: Mapped[str] = mapped_column(String(32), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class RolloutRow(Base):
    """A rollout; groups, stages, policy and cohorts never are searched, so they are JSON."""

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
    succeeded: Mapped[int]
    failed: Mapped[int]
    silent: Mapped[int]
    told: Mapped[int]
    settled: Mapped[int]
    reason: Mapped[str] = mapped_column(Text)
    started: Mapped[float]


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
    refused: Mapped[list[int]] = mapped_column(JSON)
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
    """Identifier of a report that has arrived: a replay is recognised. Since schema 2."""

    __tablename__ = "fleet_receipts"
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    device: Mapped[str] = mapped_column(ForeignKey("fleet_devices.id"))
    report: Mapped[str] = mapped_column(String(64))
    at: Mapped[float]

    __table_args__ = (UniqueConstraint("device", "report"),)


class HealthRow(Base):
    """What a device last said about how it is. Since schema 2."""

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
    action: Mapped[str] = mapped_column(String(32))
    subject: Mapped[str] = mapped_column(_Name, index=True)
    detail: Mapped[str] = mapped_column(Text)


def to_group(row: GroupRow) -> Group:
    """The group of a row."""
    return Group(row.id, row.release, row.stable, row.pin, row.rollout)


def group_columns(group: Group) -> dict[str, Any]:
    """The columns of a group."""
    return asdict(group)


def to_device(row: DeviceRow) -> Device:
    """The device of a row."""
    part = None
    if row.part_rollout is not None and row.part_progress is not None:
        part = Part(
            row.part_rollout,
            row.part_stage or 0,
            Progress(row.part_progress),
            row.part_told_at,
            row.part_epoch or 0,
        )
    told = Told(
        row.serial,
        row.told_version,
        row.told_at,
        row.told_rollout,
        Outcome(row.told_outcome) if row.told_outcome else None,
    )
    return Device(
        id=row.id,
        group=row.group,
        pin=row.pin,
        revoked=row.revoked,
        running=row.running,
        agent=row.agent,
        last_seen=row.last_seen,
        refused=frozenset(row.refused),
        told=told,
        part=part,
    )


def device_columns(device: Device) -> dict[str, Any]:
    """The columns of a device."""
    told, part = device.told, device.part
    return {
        "id": device.id,
        "group": device.group,
        "pin": device.pin,
        "revoked": device.revoked,
        "running": device.running,
        "agent": device.agent,
        "last_seen": device.last_seen,
        "refused": sorted(device.refused),
        "serial": told.serial,
        "told_version": told.version,
        "told_at": told.at,
        "told_rollout": told.rollout,
        "told_outcome": told.outcome.value if told.outcome else None,
        "part_rollout": part.rollout if part else None,
        "part_stage": part.stage if part else None,
        "part_progress": part.progress.value if part else None,
        "part_told_at": part.told_at if part else None,
        "part_epoch": part.epoch if part else None,
    }


def to_rollout(row: RolloutRow) -> Rollout:
    """The rollout of a row."""
    return Rollout(
        id=row.id,
        release=Release(row.release, row.version),
        groups=tuple(row.groups),
        stages=tuple(row.stages),
        policy=RolloutPolicy(**row.policy),
        cohorts=tuple(row.cohorts),
        since=row.since,
        status=Status(row.status),
        stage=row.stage,
        epoch=row.epoch,
        expected=row.expected,
        tally=Tally(row.succeeded, row.failed, row.silent),
        told=row.told,
        settled=row.settled,
        reason=row.reason,
    )


def rollout_columns(rollout: Rollout) -> dict[str, Any]:
    """The columns of a rollout, but for `started`, which is set once."""
    return {
        "id": rollout.id,
        "release": rollout.release.name,
        "version": rollout.release.version,
        "groups": list(rollout.groups),
        "stages": list(rollout.stages),
        "policy": asdict(rollout.policy),
        "cohorts": list(rollout.cohorts),
        "since": rollout.since,
        "status": rollout.status.value,
        "stage": rollout.stage,
        "epoch": rollout.epoch,
        "expected": rollout.expected,
        "succeeded": rollout.tally.succeeded,
        "failed": rollout.tally.failed,
        "silent": rollout.tally.silent,
        "told": rollout.told,
        "settled": rollout.settled,
        "reason": rollout.reason,
    }
