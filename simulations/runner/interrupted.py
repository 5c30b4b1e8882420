"""An arm of a simulation that was stopped while it trained: what goes on, and under which names.

Flower's simulation engine draws the ids of its nodes anew whenever it starts. The n-th smallest is
client n, then as before; so what the server knows of a node goes on under the id that it has now.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from prunecast.common.files import write_atomically
from prunecast.server.federation.state.checkpoints import newest_checkpoint, save_newest
from prunecast.simulations.runner import EngineFailed
from prunecast.simulations.runner.prepared import PreparedRun

__all__ = ["InterruptedArm", "interrupted_arm", "save_rows"]


@dataclass(frozen=True)
class InterruptedArm:
    """What is left of an arm.

    Attributes:
        job: that nodes keep their files for.
        rows: of the rounds that are not trained again, from round 0.
    """

    job: str
    rows: list[dict[str, Any]]


def interrupted_arm(
    prepared: PreparedRun, name: str, nodes: Sequence[int]
) -> InterruptedArm | None:
    """What an arm goes on from; None where it begins.

    Args:
        prepared: the run.
        name: of the arm.
        nodes: ids of the nodes now, ascending: they take the place of those in the checkpoint.

    Raises:
        EngineFailed: the checkpoint is of other clients.
        CheckpointError: there are checkpoints, and none is usable.
    """
    path = prepared.checkpoint(name)
    found = newest_checkpoint(path)
    if found is None or found.state is None:
        return None
    state = found.state
    before = state["run"]["connected"]
    if len(before) != len(nodes):
        raise EngineFailed(f"{path} is of {len(before)} clients, and there are {len(nodes)}")
    if before != list(nodes):
        now = dict(zip(before, nodes, strict=True))
        told = {now[node]: node_state for node, node_state in state["grid"]["nodes"].items()}
        state = {
            **state,
            "grid": {**state["grid"], "nodes": told},
            "run": {**state["run"], "connected": list(nodes)},
        }
        save_newest(replace(found, state=state), path, 2, instead=True)
    rows = json.loads(_rows(prepared, name).read_text(encoding="utf-8"))
    done = [row for row in rows if row["round"] <= state["run"]["round"]]
    return InterruptedArm(state["grid"]["job"], done)


def save_rows(prepared: PreparedRun, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Keep what the rounds of an arm gave so far, before the checkpoint of the last one.

    Raises:
        StorageError: the file system refuses.
    """
    write_atomically(_rows(prepared, name), json.dumps(rows).encode())


def _rows(prepared: PreparedRun, name: str) -> Any:
    return prepared.work / f"arm-{name}.rounds.json"
