"""The fleet's tables; any change of them raises `SCHEMA`."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

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
