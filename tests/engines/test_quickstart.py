"""The examples run with `flwr run .` from their own folders, as their README says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from prunecast.compression.versions import load_model
from prunecast.server.federation import Checkpoint, read_events

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).parents[2] / "examples"
ONE_PROCESS = "client-resources-num-cpus=1 init-args-num-cpus=1"


@pytest.mark.parametrize("name", ["quickstart-prunecast"])
def test_quickstart_learns(simulation: Any, name: str) -> None:
    run = simulation.run(
        EXAMPLES / name,
        *("--run-config", "num-server-rounds=3"),
        *("--federation-config", ONE_PROCESS),
    )
    accuracies = [float(a) for a in re.findall(r"'eval_acc': ([0-9.]+)", run.log)]
    assert max(accuracies) > 0.8, run.log
    sent = re.search(r"([0-9,]+) bytes on the wire, ([0-9,]+) without Prunecast", run.log)
    assert sent, run.log
    ours, dense = (int(number.replace(",", "")) for number in sent.groups())
    assert ours * 20 < dense, run.log


def test_a_federation_without_rounds_learns_and_prunes_by_models(simulation: Any) -> None:
    """Twice as many updates as models: a schedule that counted messages would be over early."""
    run = simulation.run(
        EXAMPLES / "async",
        "--run-config",
        "models=6 buffer=2 learning-rate=0.1 prunecast.pruning-end=5",
        *("--federation-config", ONE_PROCESS),
        seconds=900,
    )
    answers = re.findall(r"model (\d+): node \d+ answers (\d+) behind", run.log)
    assert len(answers) >= 12, run.log
    assert {int(number) for number, _ in answers} == set(range(1, 7))
    (found,) = re.findall(r"accuracy ([0-9.]+) with (\d+)% zeros", run.log)
    assert float(found[0]) > 0.4, run.log
    assert 70 <= int(found[1]) <= 92, run.log  # 80 % of weights, and what the lattice rounds away
    (sent,) = re.findall(r"([0-9,]+) bytes on the wire, ([0-9,]+) without Prunecast", run.log)
    ours, dense = (int(number.replace(",", "")) for number in sent)
    assert ours * 15 < dense, run.log
    assert "Prunecast: " not in run.log, "something did not travel as the policy has it"


def test_ready_apps_need_a_model_and_data_only(simulation: Any, tmp_path: Path) -> None:
    run = simulation.run(
        EXAMPLES / "ready-apps",
        "--run-config",
        f'num-server-rounds=2 output="{tmp_path / "digits.model"}" '
        f'ledger="{tmp_path / "ledger.jsonl"}" folder="{tmp_path / "run"}" learning-rate=0.1',
        *("--federation-config", ONE_PROCESS),
    )
    model = load_model(tmp_path / "digits.model")
    assert model.arrays()["0.weight"].shape == (16, 1, 3, 3)
    assert (tmp_path / "ledger.jsonl").read_text().count("keyframe") == 2
    *_, last, end = read_events(tmp_path / "run" / "events.jsonl")
    assert last["nodes"]["trained"] == 2
    assert end["event"] == "run-finished"
    assert Checkpoint.load(tmp_path / "run" / "checkpoint.safetensors").counter == 3
    assert "Prunecast: " in run.log
