"""What became of an arm's byte budgets, from the rows of its rounds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["budget_figures"]


def budget_figures(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What docs/result.md says of ``budget``; None without one.

    Args:
        rounds: rows of the arm, whose ``budget`` is that of the run's events.
    """
    told = [(row["round"], row["budget"]) for row in rounds if row.get("budget")]
    if not told:
        return None
    number, last = told[-1]
    above = [
        {"limit": "round", "round": at, "bytes": found["above"]["round"]}
        for at, found in told
        if "round" in found["above"]
    ]
    above += [
        {"limit": name, "round": number, "bytes": size}
        for name, size in last["above"].items()
        if name != "round"
    ]
    trained = [found for at, found in told if at]
    return {
        "limits": last["limits"],
        "spent": {**last["spent"], "round": max(found["spent"]["round"] for _, found in told)},
        "above": above,
        "down_step": last["down_step"],
        "thinned": last["thinned"],
        "up_coarser": statistics.median(found["up_coarser"] for found in trained or [last]),
    }
