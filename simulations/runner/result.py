"""``result.json`` and the ledgers of a run; docs/result.md explains every key."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prunecast.common.files import write_atomically
from prunecast.server.federation import Entry, Ledger, LedgerError
from prunecast.simulations.arms import ARMS
from prunecast.simulations.runner import ResultError
from prunecast.simulations.runner.prepared import PreparedRun

__all__ = ["SCHEMA", "build_arms", "read_ledger", "read_result", "write_result"]

SCHEMA = 2


def read_ledger(path: Path) -> list[Entry]:
    """Entries of the last run in a ledger.

    Raises:
        ResultError: missing or damaged.
    """
    try:
        return list(Ledger.read(path))
    except LedgerError as error:
        raise ResultError(str(error)) from error


def build_arms(
    prepared: PreparedRun, outcomes: Iterable[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The ``arms`` part of the result: what every arm reached, and what it cost.

    Args:
        prepared: the finished prepared, with its ledgers.
        outcomes: what training each arm gave, as the engine reports it.
    """
    arms: dict[str, dict[str, Any]] = {}
    by_name = {outcome["name"]: outcome for outcome in outcomes}
    metric = prepared.scenario.task.metric
    for name, arm in prepared.scenario.arms.items():
        source = arm.source(name)
        outcome, path = by_name[source], prepared.ledger(source)
        entries = read_ledger(path)
        size = _size_of(None if arm.trains else name)
        rounds = [dict(row) for row in outcome["rounds"]]
        for row in rounds:
            done = [e for e in entries if e.round <= row["round"]]
            row["bytes_up"] = sum(size(e) for e in done if e.direction == "up")
            row["bytes_down"] = sum(size(e) for e in done if e.direction == "down")
        last = rounds[-1]
        arms[name] = {
            **ARMS.write(arm),
            "label": arm.label(name),
            "text": arm.text(),
            "trained": arm.trains,
            "published": arm.publishes,
            "baseline": arm.baseline,
            metric: last[metric],
            "loss": last["loss"],
            "sparsity": last["sparsity"],
            "bytes_up": sum(size(e) for e in entries if e.direction == "up"),
            "bytes_down": sum(size(e) for e in entries if e.direction == "down"),
            "messages": len(entries),
            "encode_ms": round(sum(e.encode_ms for e in entries), 3),
            "decode_ms": round(sum(e.decode_ms for e in entries), 3),
            "seconds": round(outcome["seconds"], 3) if arm.trains else None,
            "ledger": path.name,
            "by_kind": _by_kind(entries, size),
            "rounds": rounds,
        }
    baseline = next((n for n, a in arms.items() if a["baseline"]), None)
    if baseline is not None:
        base = arms[baseline]["bytes_up"] + arms[baseline]["bytes_down"]
        for figures in arms.values():
            total = figures["bytes_up"] + figures["bytes_down"]
            figures["reduction"] = round(base / total, 3)
    return arms


def _size_of(alternative: str | None) -> Any:
    def size(entry: Entry) -> int:
        return entry.alternatives[alternative] if alternative else entry.payload_bytes

    return size


def _by_kind(entries: list[Entry], size: Any) -> dict[str, dict[str, dict[str, int]]]:
    sums: dict[str, dict[str, dict[str, int]]] = {"down": {}, "up": {}}
    groups = defaultdict(list)
    for entry in entries:
        groups[entry.direction, entry.kind].append(size(entry))
    for (direction, kind), sizes in groups.items():
        sums[direction][kind] = {"messages": len(sizes), "bytes": sum(sizes)}
    return sums


def write_result(folder: Path, document: Mapping[str, Any]) -> None:
    """Write ``result.json``, atomically."""
    text = json.dumps(document, indent=2) + "\n"
    write_atomically(folder / "result.json", text.encode())


def read_result(folder: Path) -> dict[str, Any]:
    """Read ``result.json`` of a run folder.

    Raises:
        ResultError: missing, damaged, or of another schema.
    """
    path = Path(folder) / "result.json"
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(
            f"cannot read {path} ({error.strerror or error}): give the folder of a finished run"
        ) from error
    except ValueError as error:
        raise ResultError(f"{path} is damaged ({error}): run the scenario again") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ResultError(f"{path} is not of schema {SCHEMA}: render it with the version it is of")
    missing = [key for key in ("scenario", "task", "arms", "seconds") if key not in document]
    if missing:
        raise ResultError(f"{path} has no {missing[0]!r}: run the scenario again")
    return document
