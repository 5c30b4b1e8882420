"""Every kind of entry is said in words, and only what concerns one device wakes one device."""

from __future__ import annotations

import json

import pytest

from prunecast.server.control.watches import concerned_devices
from prunecast.server.fleet.audit import AuditEntry, AuditKind, Cause, audit_text, reason_text
from prunecast.server.fleet.views import audit_view

COUNTS = {"confirmed": 3, "failed": 1, "silent": 0, "expected": 5}
PAUSED = {"cause": Cause.TOO_FEW_REPORTS, "needed": 4, **COUNTS}
SETTLED = {"cause": Cause.SETTLED, **COUNTS}
SAID = {
    AuditKind.GROUP_ADDED: ({"release": "digits", "stable": 1}, "follows digits"),
    AuditKind.GROUP_PINNED: ({"version": 3}, "to version 3"),
    AuditKind.GROUP_UNPINNED: ({}, ""),
    AuditKind.DEVICE_ADDED: ({"group": "lab"}, "to group lab"),
    AuditKind.DEVICE_MOVED: ({"was": "lab", "group": "field"}, "from lab to field"),
    AuditKind.DEVICE_REVOKED: ({}, ""),
    AuditKind.DEVICE_PINNED: ({"version": 3}, "to version 3"),
    AuditKind.DEVICE_UNPINNED: ({}, ""),
    AuditKind.DEVICE_TOLD: ({"release": "digits", "version": None}, "keep what runs"),
    AuditKind.DEVICE_SILENT: ({"rollout": "r2"}, "rollout r2"),
    AuditKind.TOKEN_RENEWED: ({}, ""),
    AuditKind.OPERATOR_ADDED: ({}, ""),
    AuditKind.OPERATOR_REMOVED: ({}, ""),
    AuditKind.RELEASE_FAILED: (
        {"release": "digits", "version": 2, "outcome": "crash loop", "detail": ""},
        "digits 2: crash loop",
    ),
    AuditKind.ROLLOUT_STARTED: (
        {"release": "digits", "version": 2, "groups": ["a", "b"], "stages": [2.5, 100.0]},
        "digits 2 to a, b: 2.5 %, 100 %",
    ),
    AuditKind.ROLLOUT_PROMOTED: (
        {"percent": 100.0, **SETTLED},
        "to 100 %: 3 confirmed, 1 failed, 0 silent of 5",
    ),
    AuditKind.ROLLOUT_PAUSED: (
        PAUSED,
        "too few reports, 4 are needed: 3 confirmed, 1 failed, 0 silent of 5",
    ),
    AuditKind.ROLLOUT_RESUMED: ({"was": "lunch"}, "was paused: lunch"),
    AuditKind.ROLLOUT_COMPLETED: (SETTLED, "3 confirmed, 1 failed, 0 silent of 5"),
    AuditKind.ROLLOUT_ABORTED: ({"cause": Cause.OPERATOR, "words": "blurred"}, "blurred"),
}


@pytest.mark.parametrize("kind", AuditKind)
def test_every_kind_has_words(kind: AuditKind) -> None:
    fields, words = SAID[kind]
    stored = json.loads(json.dumps(fields))  # as the database gives them back
    entry = AuditEntry(86400, "ada", kind, "x", stored, 7)
    assert audit_text(entry) == words
    shown = audit_view(entry)
    assert json.loads(json.dumps(shown)) == {
        "number": 7,
        "at": "1970-01-02T00:00:00+00:00",
        "actor": "ada",
        "kind": kind.value,
        "action": kind.value.replace("_", " "),
        "subject": "x",
        "detail": words,
        "fields": stored,
    }


@pytest.mark.parametrize("cause", Cause)
def test_every_cause_has_words(cause: Cause) -> None:
    named = {"release": "digits", "version": 2, "device": "cam", "completed": True}
    assert reason_text({"cause": cause.value, "words": "w", "needed": 4, **named, **COUNTS})


def test_only_what_concerns_one_device_wakes_one_device() -> None:
    alone = {kind for kind in AuditKind if concerned_devices([AuditEntry(0, "", kind, "x")])}
    assert alone == {
        *(kind for kind in AuditKind if kind.value.startswith("device_")),
        AuditKind.RELEASE_FAILED,
        AuditKind.TOKEN_RENEWED,
        AuditKind.OPERATOR_ADDED,
        AuditKind.OPERATOR_REMOVED,
    }
    mixed = [AuditEntry(0, "", kind, "x") for kind in (*alone, AuditKind.GROUP_PINNED)]
    assert concerned_devices(mixed) is None
