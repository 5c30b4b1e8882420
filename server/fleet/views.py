"""What people and programs see of a fleet: the rows of tables, JSON and pages, from one place.

A view is a mapping of plain JSON values; times are ISO 8601 in UTC.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from prunecast.server.fleet.audit import AuditEntry, audit_text
from prunecast.server.fleet.model import Device, Fleet, Group, Release, Rollout
from prunecast.server.fleet.reports import Health

__all__ = ["audit_view", "device_view", "group_view", "health_view", "rollout_view"]


def group_view(fleet: Fleet, group: Group, devices: int) -> dict[str, Any]:
    """A group: what it follows, the version in force, its pin, and how many devices it has.

    `problem` says what it stands on without it being live; empty: all of it is.

    Args:
        fleet: with the live releases, the group and its last rollout.
        group: which.
        devices: how many it has that are not revoked.
    """
    stable = fleet.stable(group)
    stands = {"stable": stable, "pinned": group.pin}
    lost = [
        f"{what} {version} is retired"
        for what, version in stands.items()
        if version is not None and Release(group.release, version) not in fleet.releases
    ]
    return {
        "group": group.id,
        "release": group.release,
        "stable": stable,
        "pin": group.pin,
        "last_rollout": group.rollout,
        "devices": devices,
        "problem": "; ".join(lost),
    }


def device_view(device: Device) -> dict[str, Any]:
    """A device: what it runs, what it was told and because of which rollout, what it answered.

    `answer` is ``revoked`` for a device that takes part no more. `refused` are the versions that
    failed on it. `seen` is when it last polled or reported. `stage`, from 1, and `progress` tell
    of the last rollout that it took part in.
    """
    told, part = device.told, device.part
    return {
        "device": device.id,
        "group": device.group,
        "runs": device.running,
        "told": told.version,
        "answer": "revoked" if device.revoked else told.outcome and told.outcome.value,
        "rollout": told.rollout,
        "pin": device.pin,
        "refused": sorted(device.refused),
        "agent": device.agent,
        "seen": _when(device.last_seen),
        "stage": part.stage + 1 if part else None,
        "progress": part.progress.value if part else None,
    }


def health_view(health: Health, at: float) -> dict[str, Any]:
    """How a device last said it is: when that arrived, its problem, its figures by name."""
    return {"reported": _when(at), "problem": health.error, "figures": dict(health.figures)}


def rollout_view(rollout: Rollout) -> dict[str, Any]:
    """How far a rollout is: its stage as a percentage, and devices by what became of them.

    `devices` take part in all; `told` were told, `expected` are waited for in the present window,
    in which `succeeded`, `failed` and `silent` are counted.
    """
    return {
        "rollout": rollout.id,
        "release": rollout.release.name,
        "version": rollout.release.version,
        "groups": list(rollout.groups),
        "status": rollout.status.value,
        "percent": rollout.stages[rollout.stage],
        "stages": list(rollout.stages),
        "since": _when(rollout.since),
        "devices": sum(rollout.cohorts),
        "told": rollout.told,
        "expected": rollout.expected,
        **asdict(rollout.tally),
        "reason": rollout.reason,
    }


def audit_view(entry: AuditEntry) -> dict[str, Any]:
    """An entry of the audit log: `kind` and `fields` for programs, `action` and `detail` in words.

    `number` grows; it names the place to go on from.
    """
    return {
        "number": entry.number,
        "at": _when(entry.at),
        "actor": entry.actor,
        "kind": entry.kind.value,
        "action": entry.kind.words,
        "subject": entry.subject,
        "detail": audit_text(entry),
        "fields": dict(entry.fields),
    }


def _when(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
