"""Flower's simulation engine, started with `flwr run`."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunecast.server.federation import Ledger, Tally

pytestmark = pytest.mark.engine

ROUNDS, NODES, ROWS = 3, 2, 64


@pytest.fixture(scope="module")
def output(simulation: Any, tiny_app: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tiny app left behind after three rounds of FedAvg."""
    folder = tmp_path_factory.mktemp("output")
    simulation.run(
        tiny_app,
        *("--run-config", f'output="{folder}" rows={ROWS} num-server-rounds={ROUNDS}'),
        *("--federation-config", f"num-supernodes={NODES} client-resources-num-cpus=1"),
    )
    return folder


def test_every_node_gets_one_keyframe_then_deltas_and_reuse(output: Path) -> None:
    kinds = defaultdict(list)
    for entry in Ledger.read(output / "ledger.jsonl"):
        if entry.direction == "down":
            kinds[entry.node].append((entry.message_type, entry.kind))
    expected = [("train", "keyframe"), ("evaluate", "delta")]
    for _ in range(ROUNDS - 1):
        expected += [("train", "reuse"), ("evaluate", "delta")]
    assert list(kinds.values()) == [expected] * NODES


def test_bytes_are_saved_in_both_directions(output: Path) -> None:
    tally = Tally(Ledger.read(output / "ledger.jsonl"))
    for direction, factor in (("down", 5), ("up", 5)):
        totals = tally.totals(direction=direction)
        sent, dense = totals.payload_bytes, totals.dense_bytes
        assert sent * factor < dense, f"{direction}: {sent} bytes instead of {dense}"


def test_arrays_are_those_of_federated_averaging(output: Path) -> None:
    tiny = _load(Path(__file__).parent / "tiny" / "tiny" / "task.py")
    expected = tiny.initial(ROWS)
    targets = [tiny.target(node, ROWS) for node in range(NODES)]
    for _ in range(ROUNDS):
        expected = {
            name: np.mean([tiny.step(array, goal[name]) for goal in targets], axis=0)
            for name, array in expected.items()
        }
    losses = list(json.loads((output / "losses.json").read_text()).values())
    assert losses == sorted(losses, reverse=True)
    with np.load(output / "final.npz") as final:
        for name, array in expected.items():
            error = np.linalg.norm(final[name] - array) / np.linalg.norm(array)
            assert error < 0.1, f"{name} is {error:.0%} away from plain FedAvg"


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("tiny_task", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
