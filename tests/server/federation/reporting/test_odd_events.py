"""Events of a file that is damaged, or of another version: told as far as that goes, or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.serverapp.strategy import FedAvg
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.server.federation import Run
from prunecast.server.federation.reporting.events import EventTail
from prunecast.server.federation.reporting.metrics import RunMetrics
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import initial_arrays, make_app, to_record


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run")
    inner = InProcessGrid(make_app(folder / "store"), 2)
    Run(inner, FedAvg(), folder=folder).start(to_record(initial_arrays()), num_rounds=1)
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def without(owner: dict[str, Any], name: str) -> None:
    del owner[name]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda event: without(event["kinds"]["up"]["update"], "bytes"),
        lambda event: event.update(sparsity={}, metrics=5),
        lambda event: event.update(dense_bytes_down=[1]),
        lambda event: event.update(status=[{}]),
        lambda event: event["status"].update(nodes=[{}]),
        lambda event: event["status"].update(states=7),
        lambda event: event["status"]["nodes"][0].update(node=1, seen=5, state=None),
        lambda event: without(event["status"]["nodes"][0], "version"),
    ],
)
def test_a_round_that_is_not_as_expected_ends_neither_metrics_nor_status(
    tmp_path: Path, events: list[dict[str, Any]], spoil: Any
) -> None:
    odd = json.loads(json.dumps(events))
    spoil([event for event in odd if event["event"] == "round-finished"][-1])
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in odd))
    told = RunMetrics()
    for event in EventTail(path).read():
        told(event)
    text = told.text().decode()
    assert "prunecast_run_state 2.0" in text
    assert "prunecast_run_rounds 1.0" in text
    result = CliRunner().invoke(app, ["federation", "status", str(path)])
    assert "--debug" not in result.output
    assert "finished, round 1" in result.output or "of another version" in result.output
