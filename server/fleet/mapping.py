"""Rows to values and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prunecast.server.fleet.model import (
    Device,
    Group,
    Outcome,
    Part,
    Policy,
    Progress,
    Release,
    Rollout,
    Status,
    Tally,
    Told,
)
from prunecast.server.fleet.tables import DeviceRow, GroupRow, RolloutRow

__all__ = [
    "device_columns",
    "group_columns",
    "rollout_columns",
    "to_device",
    "to_group",
    "to_rollout",
]


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
        policy=Policy(**row.policy),
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
