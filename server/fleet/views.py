"""What people and programs see of a fleet: the rows of tables, JSON and pages, from one place.

A view is a mapping of plain JSON values; times are ISO 8601 in UTC.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from prunecast.server.fleet.audit import AuditEntry, audit_text, no_way_back_text
from prunecast.server.fleet.evaluation import no_way_back
from prunecast.server.fleet.model import Device, Fleet, Group, Release, Rollout, Status
from prunecast.server.fleet.reports import Health

__all__ = ["audit_view", "device_view", "group_view", "health_view", "rollout_view"]

_COMMAND = "prunecast fleet"
_PAUSED = ("resume", "promote", "abort")  # what ends a pause


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


def device_view(device: Device, version: int | None = None) -> dict[str, Any]:
    """A device: what it runs, what it was told and because of which rollout, what it answered.

    `answer` is ``activated`` until the device is sure (``confirmed``) or has given the release up,
    and ``revoked`` for a device that takes part no more. `refused` are the versions that failed on
    it, `failures` say why, the last one at the end, and `failure` is the last one in words, or that
    of `version`. `seen` is when it last polled or reported. `stage`, from 1, and `progress` tell of
    the last rollout that it took part in.
    """
    told, part = device.told, device.part
    failures = sorted(device.failures.items(), key=lambda item: item[1].at)
    shown = [f"{number}: {failed}" for number, failed in failures if version in (None, number)]
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
        "failure": shown[-1] if shown else "",
        "failures": [
            {
                "version": number,
                "outcome": failed.outcome.value,
                "detail": failed.detail,
                "at": _when(failed.at),
                "text": str(failed),
            }
            for number, failed in failures
        ],
    }


def health_view(health: Health, at: float) -> dict[str, Any]:
    """How a device last said it is: when that arrived, its problem, its figures by name."""
    return {"reported": _when(at), "problem": health.error, "figures": dict(health.figures)}


def rollout_view(fleet: Fleet, rollout: Rollout, at: float) -> dict[str, Any]:
    """How far a rollout is: its stage as a percentage, and devices by what became of them.

    `devices` take part in all; `told` were told, `expected` are waited for in the present window,
    in which `confirmed`, `failed` and `silent` are counted. `next` says what it waits for, with the
    command if that is an operator's, and `problem` what stands in the way of a roll-back.

    Args:
        fleet: with the live releases and the rollout's groups.
        rollout: which.
        at: the time, in seconds since the epoch.
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
        "completed": _when(rollout.completed),
        "devices": sum(rollout.cohorts),
        "told": rollout.told,
        "expected": rollout.expected,
        **asdict(rollout.tally),
        "next": _next(rollout, at),
        "problem": _problem(fleet, rollout),
        "reason": rollout.reason,
    }


def _next(rollout: Rollout, at: float) -> str:
    """What a rollout waits for; empty where it has ended."""
    if rollout.status is Status.PAUSED:
        commands = ", ".join(f"`{_COMMAND} {verb} {rollout.id}`" for verb in _PAUSED)
        return f"waits for {commands}"
    if rollout.status is not Status.RUNNING:
        return ""
    waits = []
    if (left := rollout.expected - rollout.tally.settled) > 0:
        waits.append(f"{left} of {rollout.expected} devices to confirm or to fail")
    if at - rollout.since < rollout.policy.soak:
        waits.append(f"{_when(rollout.since + rollout.policy.soak)}, until when the stage soaks")
    if not rollout.policy.automatic:
        waits.append(f"an operator: `{_COMMAND} promote {rollout.id}`")
    return "waits for " + ", then for ".join(waits) if waits else ""


def _problem(fleet: Fleet, rollout: Rollout) -> str:
    """Why devices are not told the release, or cannot go back from it; empty: they can."""
    latest = all(fleet.groups[name].rollout == rollout.id for name in rollout.groups)
    if not latest or rollout.status is Status.COMPLETED:
        return ""
    found = []
    if rollout.status.active and rollout.release not in fleet.releases:
        found.append(f"{rollout.release} is retired, so it is told to nobody")
    lost = no_way_back(fleet, rollout)
    found += [no_way_back_text(rollout.release.name, name, lost[name]) for name in lost]
    return "; ".join(found)


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
