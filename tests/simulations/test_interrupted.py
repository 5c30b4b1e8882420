"""A simulation that is stopped goes on where it was, and gives what it would have given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.compression.versions import load_model
from prunecast.simulations.runner import SimulationError
from prunecast.simulations.runner.federate import run_arms, simulated_client
from prunecast.simulations.runner.inprocess import InProcessGrid
from prunecast.simulations.runner.prepared import PreparedRun, prepare
from prunecast.simulations.runner.run import new_run_folder, run_scenario
from prunecast.simulations.scenarios import scenario_from_mapping

FIGURES = ("round", "accuracy", "loss", "sparsity")


class Stopped(BaseException):
    """Ctrl-C, or the end of the process."""


def grid_of(prepared: PreparedRun, first: int = 1) -> InProcessGrid:
    """Nodes whose ids begin with a number: Flower's engine draws others each time."""
    grid = InProcessGrid(simulated_client(prepared), num_nodes=3, run_id=first)
    by = first - 1
    grid._apps = {node + by: app for node, app in grid._apps.items()}
    grid._contexts = {
        node + by: dataclasses.replace(context, node_id=node + by)
        for node, context in grid._contexts.items()
    }
    grid.online = set(grid._contexts)
    return grid


def stopping(arm: str, number: int, event: str) -> Callable[[Any], None]:
    names: list[str] = []

    def hear(told: Any) -> None:
        names.extend([told["name"]] if told["event"] == "run-started" else [])
        if (names[-1], told["event"], told.get("round")) == (arm, event, number):
            raise Stopped

    return hear


def figures(outcomes: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {
        outcome["name"]: [{k: row[k] for k in FIGURES} for row in outcome["rounds"]]
        for outcome in outcomes
    }


def test_arms_go_on_and_those_that_were_trained_are_not_trained_again(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    scenario = scenario_from_mapping(tiny)
    whole, parted = (prepare(scenario, tmp_path / where) for where in ("whole", "parted"))
    expected = run_arms(grid_of(whole), whole, lambda event: None)
    with pytest.raises(Stopped):
        run_arms(grid_of(parted), parted, stopping("dense", 2, "round-finished"))
    with pytest.raises(Stopped):
        run_arms(grid_of(parted, 41), parted, stopping("prunecast", 3, "round-begun"))
    assert parted.resumable
    heard: list[Any] = []
    found = run_arms(grid_of(parted, 81), parted, heard.append)
    assert figures(found) == figures(expected)
    started = [event for event in heard if event["event"] == "run-started"]
    assert [(e["name"], e["from_round"]) for e in started] == [("prunecast", 2)]
    for place in (1, 2):
        one, other = (load_model(run.work / f"prunecast-{place}.model") for run in (whole, parted))
        assert one.digest == other.digest
    assert found[1]["forgotten"] == 0
    assert found[1]["store_bytes"] > 0


def test_a_folder_without_anything_to_go_on_from_is_said(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    scenario = scenario_from_mapping(tiny)
    folder = new_run_folder(tmp_path, "tiny")
    with pytest.raises(SimulationError, match="nothing to go on from"):
        run_scenario(scenario, folder, resume=True)
    for name in ("none", "tiny.toml"):
        done = CliRunner().invoke(app, ["simulate", str(tmp_path / name), "--resume"])
        assert (done.exit_code, "is no folder of a run" in in_a_row(done.output)) == (2, True)


@pytest.mark.parametrize("more", [["--check"], ["--rounds", "9"], ["--seed", "0"]])
def test_what_a_resumed_run_would_not_heed_is_refused(tmp_path: Path, more: list[str]) -> None:
    done = CliRunner().invoke(app, ["simulate", str(tmp_path), "--resume", *more])
    assert done.exit_code == 2
    assert "goes on with the run as it was begun" in in_a_row(done.output)


def in_a_row(text: str) -> str:
    """Without the frame and the line ends that messages get in a terminal."""
    return " ".join(text.replace("│", " ").split())


@pytest.mark.engine
def test_a_scenario_that_was_stopped_is_resumed_by_its_folder(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    scenario = scenario_from_mapping(tiny)
    whole = run_scenario(scenario, new_run_folder(tmp_path, "whole"))
    folder = new_run_folder(tmp_path, "parted")
    told: list[str] = []

    def hear(event: Any) -> None:
        if event["event"] == "step":
            told.append(event["text"])
        if event["event"] == "round-finished" and event["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_scenario(scenario, folder, on_event=hear)
    assert told[-1] == f"stopped; to go on: prunecast simulate {folder} --resume"
    done = CliRunner().invoke(app, ["simulate", str(folder), "--resume"])
    assert done.exit_code == 0, done.output
    assert not (folder / "work").exists()
    from prunecast.simulations.runner.run import read_result

    result = read_result(folder)
    for name, arm in whole["arms"].items():
        for row, other in zip(arm["rounds"], result["arms"][name]["rounds"], strict=True):
            assert {k: row[k] for k in FIGURES} == {k: other[k] for k in FIGURES}
