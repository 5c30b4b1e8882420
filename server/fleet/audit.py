"""The audit log: what happened, as a kind and its fields; English is made where people read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["AuditEntry", "AuditKind", "Cause", "audit_text", "no_way_back_text", "reason_text"]


class AuditKind(StrEnum):
    """What happened; the value is what the database holds and programs compare."""

    GROUP_ADDED = "group_added"
    GROUP_PINNED = "group_pinned"
    GROUP_UNPINNED = "group_unpinned"
    DEVICE_ADDED = "device_added"
    DEVICE_MOVED = "device_moved"
    DEVICE_REVOKED = "device_revoked"
    DEVICE_PINNED = "device_pinned"
    DEVICE_UNPINNED = "device_unpinned"
    DEVICE_TOLD = "device_told"
    DEVICE_SILENT = "device_silent"
    TOKEN_RENEWED = "token_renewed"
    OPERATOR_ADDED = "operator_added"
    OPERATOR_REMOVED = "operator_removed"
    RELEASE_FAILED = "release_failed"
    ROLLOUT_STARTED = "rollout_started"
    ROLLOUT_PROMOTED = "rollout_promoted"
    ROLLOUT_PAUSED = "rollout_paused"
    ROLLOUT_RESUMED = "rollout_resumed"
    ROLLOUT_COMPLETED = "rollout_completed"
    ROLLOUT_ABORTED = "rollout_aborted"

    @property
    def of_one_device(self) -> bool:
        """Whether no other device than the subject can be told something else because of it."""
        return self.value.startswith("device_") or self in _ABOUT_ONE_DEVICE

    @property
    def words(self) -> str:
        """For people: ``rollout paused``."""
        return self.value.replace("_", " ")


_ABOUT_ONE_DEVICE = (
    AuditKind.RELEASE_FAILED,
    AuditKind.TOKEN_RENEWED,
    AuditKind.OPERATOR_ADDED,
    AuditKind.OPERATOR_REMOVED,
)


class Cause(StrEnum):
    """Why a rollout went on, paused or ended."""

    OPERATOR = "operator"
    SETTLED = "settled"
    ERROR_RATE = "error_rate"
    LATE_FAILURES = "late_failures"
    SILENCE = "silence"
    TOO_FEW_REPORTS = "too_few_reports"
    RETIRED = "retired"


@dataclass(frozen=True)
class AuditEntry:
    """One entry of the audit log.

    Attributes:
        at: when, in seconds since the epoch.
        actor: ``operator:NAME``, who has shown a token; ``user:NAME``, as the system knows who
            called a command; ``device:NAME``; or ``fleet`` for what it did by itself.
        kind: what happened.
        subject: the device, group or rollout that it happened to.
        fields: the rest, plain JSON values; which ones follows from the kind, see `audit_text`.
        number: in the log of a database, ascending; 0 before it is there.
    """

    at: float
    actor: str
    kind: AuditKind
    subject: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    number: int = 0


def audit_text(entry: AuditEntry) -> str:
    """What an entry says besides its kind, for people; empty where the kind says it all.

    >>> audit_text(AuditEntry(0, "ada", AuditKind.DEVICE_MOVED, "cam", {"was": "a", "group": "b"}))
    'from a to b'
    """
    given = entry.fields
    if "text" in given:  # written before entries had fields
        return str(given["text"])
    match entry.kind:
        case AuditKind.GROUP_ADDED:
            return f"follows {given['release']}"
        case AuditKind.GROUP_PINNED | AuditKind.DEVICE_PINNED:
            return f"to version {given['version']}"
        case AuditKind.DEVICE_ADDED:
            return f"to group {given['group']}"
        case AuditKind.DEVICE_MOVED:
            return f"from {given['was']} to {given['group']}"
        case AuditKind.DEVICE_TOLD:
            version = given["version"]
            return "keep what runs" if version is None else f"{given['release']} {version}"
        case AuditKind.DEVICE_SILENT:
            return f"rollout {given['rollout']}"
        case AuditKind.RELEASE_FAILED:
            said = f": {given['detail']}" if given["detail"] else ""
            return f"{given['release']} {given['version']}: {given['outcome']}{said}"
        case AuditKind.ROLLOUT_STARTED:
            shares = ", ".join(f"{s:g} %" for s in given["stages"])
            groups = ", ".join(given["groups"])
            return f"{given['release']} {given['version']} to {groups}: {shares}"
        case AuditKind.ROLLOUT_PROMOTED:
            return f"to {given['percent']:g} %: {reason_text(given)}"
        case AuditKind.ROLLOUT_RESUMED:
            return f"was paused: {given['was']}"
        case AuditKind.ROLLOUT_PAUSED | AuditKind.ROLLOUT_COMPLETED | AuditKind.ROLLOUT_ABORTED:
            return reason_text(given)
        case _:
            return ""


def reason_text(fields: Mapping[str, Any]) -> str:
    """Why a rollout went on, paused or ended, for people.

    Args:
        fields: ``cause``, a `Cause`; with ``OPERATOR`` an operator's ``words``, else how many
            devices ``confirmed``, ``failed``, were ``silent``, of how many ``expected``, and with
            ``TOO_FEW_REPORTS`` how many reports are ``needed``, with ``LATE_FAILURES`` the last
            ``device`` and whether the rollout was ``completed``. With ``no_way_back``, the stable
            version of every group that cannot go back, also the name of the ``release``.

    >>> reason_text({"cause": "silence", "confirmed": 1, "failed": 0, "silent": 2, "expected": 3})
    'silence: 1 confirmed, 0 failed, 2 silent of 3'
    """
    lost = fields.get("no_way_back") or {}
    lines = [no_way_back_text(fields["release"], group, stable) for group, stable in lost.items()]
    return "; ".join([_cause_text(fields), *lines])


def no_way_back_text(release: str, group: str, stable: int | None) -> str:
    """Why the devices of a group stay on what they run when a rollout ends.

    >>> no_way_back_text("digits", "lab", 2)
    'group lab cannot go back: digits 2, its stable release, is retired'
    """
    missing = f"{release} {stable}, its stable release, is retired"
    return f"group {group} cannot go back: " + (
        "it has no stable release" if stable is None else missing
    )


def _cause_text(fields: Mapping[str, Any]) -> str:
    if fields["cause"] == Cause.OPERATOR:
        return str(fields["words"])
    if fields["cause"] == Cause.RETIRED:
        return f"{fields['release']} {fields['version']} is retired, so it is told to nobody"
    # entries from before devices confirmed have what they said at once
    good = "confirmed" if "confirmed" in fields else "succeeded"
    counts = ", ".join(f"{fields[key]} {key}" for key in (good, "failed", "silent"))
    figures = f"{counts} of {fields['expected']}"
    match fields["cause"]:
        case Cause.ERROR_RATE:
            return f"error rate: {figures}"
        case Cause.LATE_FAILURES:
            when = "after it had completed" if fields["completed"] else "in an earlier stage"
            return f"failures {when}: {figures}, the last one on {fields['device']}"
        case Cause.SILENCE:
            return f"silence: {figures}"
        case Cause.TOO_FEW_REPORTS:
            return f"too few reports, {fields['needed']} are needed: {figures}"
    return figures
