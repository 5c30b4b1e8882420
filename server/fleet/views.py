"""What people and programs see of a fleet: the rows of tables, JSON and pages, from one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from prunecast.server.fleet.audit import AuditEntry, audit_text
from prunecast.server.fleet.model import Device, Group, Rollout
from prunecast.server.fleet.reports import Health

__all__ = ["AuditView", "DeviceView", "GroupView", "HealthView", "RolloutView"]


@dataclass(frozen=True)
class _View:
    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON values by the names of the attributes; times are ISO 8601 in UTC."""
        plain = asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in plain.items()}


@dataclass(frozen=True)
class GroupView(_View):
    """A group: what it follows, the version in force, its pin, and how many devices it has."""

    group: str
    release: str
    stable: int | None
    pin: int | None
    last_rollout: str | None
    devices: int

    @classmethod
    def of(cls, group: Group, stable: int | None, devices: int) -> GroupView:
        """View of a group with the version in force and the number of its devices."""
        return cls(group.id, group.release, stable, group.pin, group.rollout, devices)


@dataclass(frozen=True)
class DeviceView(_View):
    """A device: what it runs, what it was told and because of which rollout, what it answered.

    `answer` is ``revoked`` for a device that takes part no more. `refused` are the versions that
    failed on it. `seen` is when it last polled or reported. `stage`, from 1, and `progress` tell
    of the last rollout that it took part in.
    """

    device: str
    group: str
    runs: int | None
    told: int | None
    answer: str | None
    rollout: str | None
    pin: int | None
    refused: tuple[int, ...]
    agent: str
    seen: str | None
    stage: int | None
    progress: str | None

    @classmethod
    def of(cls, device: Device) -> DeviceView:
        """View of a device."""
        told, part = device.told, device.part
        return cls(
            device=device.id,
            group=device.group,
            runs=device.running,
            told=told.version,
            answer="revoked" if device.revoked else told.outcome and told.outcome.value,
            rollout=told.rollout,
            pin=device.pin,
            refused=tuple(sorted(device.refused)),
            agent=device.agent,
            seen=_when(device.last_seen),
            stage=part.stage + 1 if part else None,
            progress=part.progress.value if part else None,
        )


@dataclass(frozen=True)
class HealthView(_View):
    """How a device last said it is: when that arrived, its problem, its figures by name."""

    reported: str | None
    problem: str
    figures: Mapping[str, float]

    @classmethod
    def of(cls, health: Health, at: float) -> HealthView:
        """View of what arrived at a time."""
        return cls(_when(at), health.error, dict(health.figures))


@dataclass(frozen=True)
class RolloutView(_View):
    """How far a rollout is: its stage as a percentage, and devices by what became of them.

    `devices` take part in all; `told` were told, `expected` are waited for in the present window,
    in which `succeeded`, `failed` and `silent` are counted.
    """

    rollout: str
    release: str
    version: int
    groups: tuple[str, ...]
    status: str
    percent: float
    stages: tuple[float, ...]
    since: str | None
    devices: int
    told: int
    expected: int
    succeeded: int
    failed: int
    silent: int
    reason: str

    @classmethod
    def of(cls, rollout: Rollout) -> RolloutView:
        """View of a rollout."""
        return cls(
            rollout=rollout.id,
            release=rollout.release.name,
            version=rollout.release.version,
            groups=rollout.groups,
            status=rollout.status.value,
            percent=rollout.stages[rollout.stage],
            stages=rollout.stages,
            since=_when(rollout.since),
            devices=sum(rollout.cohorts),
            told=rollout.told,
            expected=rollout.expected,
            **asdict(rollout.tally),
            reason=rollout.reason,
        )


@dataclass(frozen=True)
class AuditView(_View):
    """An entry of the audit log: `kind` and `fields` for programs, `action` and `detail` in words.

    `number` grows; it names the place to go on from.
    """

    number: int
    at: str | None
    actor: str
    kind: str
    action: str
    subject: str
    detail: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, entry: AuditEntry) -> AuditView:
        """View of an entry."""
        return cls(
            number=entry.number,
            at=_when(entry.at),
            actor=entry.actor,
            kind=entry.kind.value,
            action=entry.kind.words,
            subject=entry.subject,
            detail=audit_text(entry),
            fields=dict(entry.fields),
        )


def _when(at: float | None) -> str | None:
    """A time in UTC, ISO 8601."""
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
