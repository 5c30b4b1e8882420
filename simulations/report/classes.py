"""What a report says of capability classes: how many clients, and what one of them costs."""

from __future__ import annotations

from prunecast.simulations.report.parts import MISSING, Section, Table, bytes_of
from prunecast.simulations.report.study import Spread, Study, StudyArm

__all__ = ["capability_classes"]


def capability_classes(study: Study) -> Section:
    """Every class of every arm that has some, and the clients of none."""
    section = Section(
        "Capability classes",
        note="Clients of a class are treated alike for what they can do. Bytes are those of one "
        "client of the class, on average over clients and seeds.",
    )
    rows = [
        [arm.label, name, *_numbers(arm, name)]
        for arm, run in study.trained()
        for name in run.figures.get("classes") or {}
    ]
    if rows:
        header = ["arm", "class", "clients", "bytes up of each", "bytes down of each"]
        section.tables.append(Table(header, rows))
    return section


def _numbers(arm: StudyArm, name: str) -> list[str]:
    found = [found[name] for run in arm.runs if name in (found := run.figures.get("classes") or {})]

    def of_one(way: str) -> Spread | None:
        return Spread.of(part[way] / part["nodes"] for part in found if part["nodes"])

    clients = Spread.of(float(part["nodes"]) for part in found)
    told = MISSING if clients is None else f"{clients.mean:,.0f}"
    return [told, bytes_of(of_one("bytes_up")), bytes_of(of_one("bytes_down"))]
