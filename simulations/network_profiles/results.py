"""Simulated time in the result of a run, while it is made or long after: from its ledgers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunecast.simulations.network_profiles import NetworkSpec
from prunecast.simulations.network_profiles.clock import simulated_time

if TYPE_CHECKING:
    from prunecast.server.federation.reporting.ledger import Entry

__all__ = ["SIMULATED", "add_simulated_time", "entries_of"]

SIMULATED = "simulated_seconds"
"""Key of a round: simulated seconds from the beginning of the run to its end."""


def entries_of(path: Path, alternative: str | None = None) -> Iterator[Entry]:
    """Messages of the last run of a ledger, or what they would be under another coding.

    Args:
        path: of the ledger.
        alternative: name of a coding that was measured on the same messages.

    Raises:
        StorageError: the file cannot be read or is damaged.
    """
    from prunecast.server.federation import Ledger

    entries = Ledger.read(path)
    if alternative is None:
        return entries
    return (replace(e, payload_bytes=e.alternatives[alternative]) for e in entries)


def add_simulated_time(result: dict[str, Any], folder: Path, network: NetworkSpec) -> None:
    """Note in the arms of a result what their messages take over a network.

    Every arm gets ``simulated`` (see docs/result.md), every round of it ``simulated_seconds``.

    Args:
        result: content of a ``result.json``; changed.
        folder: of the run, where the ledgers are.
        network: what lies between clients and server.

    Raises:
        ScenarioError: a profile or trace cannot be used.
        StorageError: a ledger cannot be read.
    """
    scenario, examples = result["scenario"], result["data"]["per_client"]
    metric, lower = result["task"]["metric"], result["task"]["lower_is_better"]
    for name, arm in result["arms"].items():
        entries = list(entries_of(folder / arm["ledger"], None if arm["trained"] else name))
        # results of before nodes were noted: ids ascend as the clients do where they are not drawn
        nodes = arm.get("nodes") or sorted({entry.node for entry in entries})
        timeline = simulated_time(
            entries,
            network,
            clients={int(node): number for number, node in enumerate(nodes)},
            examples=examples,
            epochs=scenario["training"]["epochs"],
            seed=scenario["seed"],
        )
        for row in arm["rounds"]:
            row[SIMULATED] = round(timeline.seconds_at(row["round"]), 3)
        arm["simulated"] = {"network": network.profile, **timeline.to_mapping()}
        if network.target is not None:
            arm["simulated"]["seconds_to_target"] = _first(
                arm["rounds"], metric, network.target, lower
            )


def _first(rows: list[Mapping[str, Any]], metric: str, target: float, lower: bool) -> float | None:
    """Simulated seconds to the first round that is as good; None where none is."""
    for row in rows:
        if row["round"] and (row[metric] <= target if lower else row[metric] >= target):
            return float(row[SIMULATED])
    return None
