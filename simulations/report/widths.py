"""What a report says of width classes: what each trains, sends, and is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prunecast.common.text import percent
from prunecast.simulations.report.parts import MISSING, Section, Table, bytes_of, spread_text
from prunecast.simulations.report.study import ArmRun, Spread, Study, StudyArm

__all__ = ["width_classes"]


def width_classes(study: Study) -> Section:
    """Every class of every arm that has some: its slice, and one client's bytes."""
    section = Section(
        "Width classes",
        note=f"Clients of a class train the same slice of the model. The {study.metric} is that of "
        "the published model, or of its slice, on the held-out examples; bytes are those of one "
        "client of the class, in both directions, on average.",
    )
    rows = []
    for arm, run in study.trained():
        for name in run.figures.get("widths") or {}:
            rows.append([arm.label, name, *_numbers(study, arm, name)])
    if rows:
        header = ["arm", "class", "clients", "channels", "weights", study.metric, "bytes of each"]
        section.tables.append(Table(header, rows))
    return section


def _numbers(study: Study, arm: StudyArm, name: str) -> list[str]:
    def over(found: Callable[[Mapping[str, Any]], float | None]) -> Spread | None:
        parts = [(run.figures.get("widths") or {}).get(name) for run in arm.runs]
        return Spread.of(None if part is None else found(part) for part in parts)

    def reached(run: ArmRun) -> float | None:
        parts = [row.get("widths", {}).get(name) for row in run.rounds[-arm.last_rounds :]]
        found = [part[study.metric] for part in parts if part is not None]
        return sum(found) / len(found) if found else None

    clients, share = over(lambda part: part["nodes"]), over(lambda part: part["share"])
    weights = over(lambda part: part["weights"])
    return [
        MISSING if clients is None else f"{clients.mean:,.0f}",
        MISSING if share is None else percent(share.mean),
        MISSING if weights is None else f"{weights.mean:,.0f}",
        spread_text(Spread.of(map(reached, arm.runs)), study.text),
        bytes_of(over(_of_one)),
    ]


def _of_one(part: Mapping[str, Any]) -> float | None:
    spent: int = part["bytes_up"] + part["bytes_down"]
    return spent / part["nodes"] if part["nodes"] else None
