"""What a report says of byte budgets: what was allowed, what was spent, and what was above."""

from __future__ import annotations

from prunecast.common.text import bytes_text, percent
from prunecast.simulations.report.parts import MISSING, Section, Table, bytes_of
from prunecast.simulations.report.study import Spread, Study, StudyArm

__all__ = ["byte_budgets"]

_OF = {"round": "each round", "node": "each client", "run": "the run"}


def byte_budgets(study: Study) -> Section:
    """Every limit of every arm that has some."""
    section = Section(
        "Byte budgets",
        note="Spent is what the round, or the client, that took most took, on average over seeds. "
        "Above is what exceeded the limit: rounds of all seeds, and by how many bytes at most. "
        "Step, zeros and coarser updates are what the budget came to at the end: the first before "
        "it follows learning, the last as the median of the rounds.",
    )
    rows = []
    for arm, run in study.trained():
        for name, limit in (run.figures.get("budget") or {}).get("limits", {}).items():
            rows.append([arm.label, _OF[name], bytes_text(limit), *_numbers(arm, name)])
    if rows:
        header = ["arm", "of", "budget", "spent", "above", "model step", "zeros", "updates coarser"]
        section.tables.append(Table(header, rows))
    return section


def _numbers(arm: StudyArm, name: str) -> list[str]:
    found = [run.figures["budget"] for run in arm.runs if run.figures.get("budget")]
    above = [one["bytes"] for budget in found for one in budget["above"] if one["limit"] == name]
    told = f"{len(above)}, by up to {bytes_text(max(above))}" if above else "none"

    def mean(key: str) -> float:
        return float(sum(budget[key] for budget in found) / len(found))

    return [
        bytes_of(Spread.of(budget["spent"][name] for budget in found)),
        told,
        f"{mean('down_step'):.2g} σ",
        percent(mean("thinned"), 0) if mean("thinned") else MISSING,
        f"{mean('up_coarser'):.1f} times",
    ]
