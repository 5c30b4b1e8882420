"""``result.json`` and the ledgers of a run; docs/result.md explains every key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunecast.common.files import write_atomically
from prunecast.server.federation import Ledger, Tally
from prunecast.server.federation.ledger import Direction
from prunecast.simulations.arms import ARMS
from prunecast.simulations.runner import ResultError
from prunecast.simulations.runner.prepared import PreparedRun

__all__ = ["SCHEMA", "build_arms", "read_result", "write_result"]

SCHEMA = 2


def build_arms(
    prepared: PreparedRun, outcomes: Iterable[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The ``arms`` part of the result: what every arm reached, and what it cost.

    Args:
        prepared: the finished run, with its ledgers.
        outcomes: what training each arm gave, as the engine reports it.
    """
    arms: dict[str, dict[str, Any]] = {}
    by_name = {outcome["name"]: outcome for outcome in outcomes}
    metric = prepared.scenario.task.metric
    for name, arm in prepared.scenario.arms.items():
        source = arm.source(name)
        outcome, path = by_name[source], prepared.ledger(source)
        tally = _tally(path, None if arm.trains else name)
        rounds = [dict(row) for row in outcome["rounds"]]
        for row in rounds:
            so_far = tally.totals(rounds=range(row["round"] + 1))
            row.update(bytes_up=so_far.bytes_up, bytes_down=so_far.bytes_down)
        total = tally.totals()
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
            "bytes_up": total.bytes_up,
            "bytes_down": total.bytes_down,
            "messages": total.messages,
            "encode_ms": round(total.encode_ms, 3),
            "decode_ms": round(total.decode_ms, 3),
            "seconds": round(outcome["seconds"], 3) if arm.trains else None,
            "ledger": path.name,
            "by_kind": _by_kind(tally),
            "rounds": rounds,
        }
    baseline = next((n for n, a in arms.items() if a["baseline"]), None)
    if baseline is not None:
        base = arms[baseline]["bytes_up"] + arms[baseline]["bytes_down"]
        for figures in arms.values():
            spent = figures["bytes_up"] + figures["bytes_down"]
            figures["reduction"] = round(base / spent, 3)
    return arms


def _tally(path: Path, alternative: str | None) -> Tally:
    """Sums over the last run of a ledger, or over what its messages have under another coding."""
    entries = Ledger.read(path)
    if alternative is None:
        return Tally(entries)
    return Tally(replace(e, payload_bytes=e.alternatives[alternative]) for e in entries)


def _by_kind(tally: Tally) -> dict[str, dict[str, dict[str, int]]]:
    sums: dict[str, dict[str, dict[str, int]]] = {}
    directions: tuple[Direction, ...] = ("down", "up")
    for direction in directions:
        sums[direction] = {}
        for kind in tally.kinds(direction):
            found = tally.totals(direction=direction, kind=kind)
            sums[direction][kind] = {"messages": found.messages, "bytes": found.payload_bytes}
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
