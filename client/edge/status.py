"""What a device runs and what its last check did, for people and for scripts."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prunecast.client.edge.config import AGENT_VERSION, UpdateResult
from prunecast.client.edge.errors import StateError
from prunecast.client.edge.state import StateFolder
from prunecast.client.edge.telemetry import read_telemetry

__all__ = ["read_status", "record_check"]

_FILE = "status.json"


def record_check(
    folder: StateFolder, result: UpdateResult | None, counted: Counter[str], error: str | None
) -> None:
    """Keep what a check for updates did.

    Args:
        folder: of the agent.
        result: None if the check failed.
        counted: bytes received by kind, added to those of earlier checks.
        error: why it failed, or why a release was rejected.

    Raises:
        StateError: the file system refuses.
    """
    earlier = folder.read_json(_FILE).get("downloaded_total")
    total = Counter(earlier if isinstance(earlier, dict) else {})
    total.update(counted)
    report = {
        "last_check": datetime.now(UTC).isoformat(timespec="seconds"),
        "last_result": asdict(result) if result else None,
        "last_error": error,
        "downloaded_total": dict(total),
    }
    folder.write_json(_FILE, report)


def _control(folder: StateFolder) -> dict[str, Any] | None:
    """What the fleet wants and what it has not heard yet; None without a fleet."""
    found = folder.read_json("control.json")
    if not found:
        return None
    reports = found.get("reports")
    waiting = len(reports) if isinstance(reports, list) else 0
    told = {key: found.get(key) for key in ("device", "directive", "answered")}
    return {**told, "waiting_reports": waiting}


def read_status(state: Path | str) -> dict[str, Any]:
    """Status of a state folder, without an agent: active and previous release, last check.

    Raises:
        StateError: there is no such folder, or its state is unreadable.
    """
    folder = StateFolder(state)
    if not folder.path.is_dir():
        raise StateError(
            f"{folder.path} does not exist: name the folder given to prunecast edge update or run"
        )
    found = folder.read()
    telemetry = read_telemetry(folder.path)
    return {
        "agent": AGENT_VERSION,
        "name": found.name if found else None,
        "active": asdict(found.active) if found and found.active else None,
        "previous": asdict(found.previous) if found and found.previous else None,
        "rejected": found.rejected if found else {},
        "telemetry": telemetry.to_json() if telemetry else None,
        "control": _control(folder),
        **folder.read_json(_FILE),
    }
