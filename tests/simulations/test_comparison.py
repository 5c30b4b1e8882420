"""One scenario under many arms: which there are, what is kept, what the figures are made of."""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.simulations.comparison import (
    DOCUMENT,
    Comparison,
    _figures,
    compared_rows,
    last_rounds,
    peers,
    published_lines,
)
from prunecast.simulations.kinds import written
from prunecast.simulations.runner import EngineFailed
from prunecast.simulations.runner.checks import UnprunableArms
from prunecast.simulations.runner.run import read_result
from prunecast.simulations.scenarios import (
    PublishedSpec,
    ScenarioError,
    load_scenario,
    scenario_from_mapping,
)

DOCS = Path(__file__).parents[2] / "docs/compare.md"


class Begun(Exception):
    """What is trained anew is trained: it need not come to its end."""


def test_every_peer_has_a_policy_and_is_documented() -> None:
    found = peers()
    assert list(found)[:2] == ["dense", "dense-zstd"]
    assert list(found)[-4:] == ["fine", "balanced", "small", "tiny"]
    text = DOCS.read_text(encoding="utf-8")
    for name, arm in found.items():
        arm.check(f"arms.{name}", found)
        if arm.trains:
            arm.grid_policy()
        assert f"| `{name}` |" in text


def test_arms_are_named_and_what_is_wrong_with_them_too(tiny: dict[str, Any]) -> None:
    scenario = scenario_from_mapping(tiny)
    chosen = Comparison.of(scenario, names=["stc", "dense", "prunecast"], seeds=[4, 5], rounds=2)
    assert list(chosen.arms) == ["stc", "dense", "prunecast"]
    assert (chosen.scenario.rounds, chosen.scenario.release) == (2, None)
    assert chosen.arms["prunecast"] == scenario.arms["prunecast"]  # the scenario's own
    places = [(run.seed, list(run.arms), folder.name) for run, folder in chosen.runs()]
    assert places[0] == (4, ["stc"], "stc")
    assert places[-1] == (5, ["prunecast"], "prunecast")
    assert len(places) == 6
    niid = Comparison.of(load_scenario("niid-mnist"), names=["dense"])
    assert niid.published["fedavg"].value == 0.9889
    assert niid.scenario.published == {}  # decides nothing, so a run is kept when it changes
    for names, says in ((["zip"], "choose one of"), (["dense-zstd"], "nothing is trained")):
        with pytest.raises(ScenarioError, match=says):
            Comparison.of(scenario, names=names)
    with pytest.raises(ScenarioError, match="there is none to choose: add one"):
        Comparison.of(scenario, names=["dense-zstd", "stc"])
    with pytest.raises(ScenarioError, match="seeds: 3 is there twice"):
        Comparison.of(scenario, seeds=[3, 1, 3])


def test_a_table_says_what_the_figures_are() -> None:
    arm = {"bytes_down": 2_500_000, "bytes_up": 500, "seconds": 12.4, "spread": 0.0123}
    arms = {
        "dense": {**arm, "ratio": 1.0, "accuracy": 0.9, "spread": None, "seconds": None},
        "ours": {**arm, "ratio": 321.4, "accuracy": 0.8874},
    }
    task = {"metric": "accuracy", "percent": True}
    header, rows = compared_rows({"task": task, "arms": arms})
    assert header == ["arm", "MB down", "MB up", "ratio", "accuracy", "seconds"]
    assert rows[0] == ["dense", "2.500", "0.001", "1.00×", "90.0 %", "–"]
    assert rows[1] == ["ours", "2.500", "0.001", "321×", "88.7 ± 1.2 %", "12"]
    arms["ours"]["wire"] = {"http_up": 1000, "http_down": 3000, "tls_up": 2000, "tls_down": 4000}
    header, rows = compared_rows({"task": task, "arms": arms})
    assert header[-2:] == ["≈ MB by HTTP", "by TLS"]
    assert [row[-2:] for row in rows] == [["–", "–"], ["0.004", "0.006"]]


def test_wire_bytes_are_means_over_seeds_that_know_them() -> None:
    task = {"metric": "accuracy", "percent": True, "lower_is_better": False}
    rows = [{"round": n, "accuracy": 0.5} for n in range(2)]
    run = {"rounds": rows, "bytes_down": 10, "bytes_up": 2, "seconds": 1.0}
    wires = [{"requests": 9, "tls_up": 100}, {"requests": 10, "tls_up": 300}]
    known = _figures([{**run, "wire": wire} for wire in wires], task)
    assert known["wire"] == {"requests": round(9.5), "tls_up": 200}
    assert _figures([{**run, "wire": wires[0]}, run], task)["wire"] is None


def test_published_figures_stand_beside_ours() -> None:
    task = {"metric": "accuracy", "percent": True, "lower_is_better": False}
    rows = [{"round": n, "accuracy": value} for n, value in enumerate((0.1, 0.95, 0.93))]
    run = {"rounds": rows, "bytes_down": 10, "bytes_up": 2, "seconds": 1.0}
    dense = _figures([run], task)
    assert (dense["accuracy"], dense["best"], dense["best_spread"]) == (0.93, 0.95, None)
    published = {
        "fedavg": PublishedSpec(0.9889, "a table", "dense", 0.0007, "best"),
        "other": PublishedSpec(0.83, "a plot", bytes=3_260_205_200),
    }
    document = {"task": task, "arms": {"dense": dense}, "published": written(published)}
    assert published_lines(document) == [
        "fedavg, published: accuracy 98.89 ± 0.07 % in its best round; dense, here: 95.00 %"
        " (a table)",
        "other, published: accuracy 83.00 % for 3,260.2 MB (a plot)",
    ]
    assert published_lines({**document, "published": {}}) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seeds", "1", "two"], "a seed is 'two'"),
        (["7"], "got '7' besides the scenario"),
        (["--arms", "zip"], "choose one of"),
    ],
)
def test_the_command_refuses_in_a_line(tmp_path: Path, arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["compare", "demo", "--out", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


@pytest.mark.engine
def test_an_arm_that_diverges_is_left_out_and_the_others_are_compared(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    mapping = copy.deepcopy({**tiny, "rounds": 2})
    mapping["arms"] = {
        "dense": {"kind": "dense"},
        "wild": {"kind": "masks", "learning_rate": 1e38},
        "coarse": {"kind": "scheme", "scheme": "fp16"},
    }
    scenario = scenario_from_mapping(mapping)
    events: list[dict[str, Any]] = []
    chosen = Comparison.of(scenario, names=["dense", "wild", "coarse"], folder=tmp_path)
    document = chosen.run(lambda event: events.append(dict(event)))
    assert list(document["arms"]) == ["dense", "coarse"]
    [told] = [e["text"] for e in events if e["event"] == "failed"]
    assert told.startswith("wild is left out: seed 3: the simulation failed: arm 'wild'")
    assert document["left_out"] == {"wild": told.removeprefix("wild is left out: ")}
    _, rows = compared_rows(document)
    assert [row[0] for row in rows] == ["dense", "coarse"]

    # what fails first has nothing to be left out of
    with pytest.raises(EngineFailed, match="arm 'wild'"):
        Comparison.of(scenario, names=["wild"], folder=tmp_path / "alone").run()


def test_of_a_model_that_cannot_be_pruned_the_presets_that_prune_are_left_out(
    tmp_path: Path,
) -> None:
    scenario = load_scenario("logistic")
    found = Comparison.of(scenario, folder=tmp_path)._unprunable()
    assert set(found) == {"small", "tiny"}
    assert found["small"].startswith("arms.small: ")
    assert "prunecast.sparsity" in found["small"]
    with pytest.raises(UnprunableArms, match=r"^arms\.small: "):
        Comparison.of(scenario, names=["dense", "small"], folder=tmp_path).run()
    assert not list(tmp_path.iterdir())


@pytest.mark.engine
def test_a_comparison_goes_on_where_it_was(tiny: dict[str, Any], tmp_path: Path) -> None:
    mapping = copy.deepcopy({**tiny, "rounds": 1})
    scenario = scenario_from_mapping(mapping)
    first = Comparison.of(scenario, names=["dense", "dense-zstd"], folder=tmp_path)
    first.run()
    begun = tmp_path / "seed-3/stc"
    begun.mkdir()  # as a run that was interrupted leaves it
    (begun / "ledger-stc.jsonl").write_text("{")

    events: list[dict[str, Any]] = []
    names = ["dense", "dense-zstd", "stc", "small"]
    second = Comparison.of(scenario, names=names, folder=tmp_path)
    document = second.run(lambda event: events.append(dict(event)))
    assert [e["text"] for e in events if e["event"] == "kept"] == ["seed 3, dense: kept"]
    assert [e["name"] for e in events if e["event"] == "run-started"] == ["stc", "small"]
    assert json.loads((tmp_path / DOCUMENT).read_text()) == document
    assert list(document["arms"]) == names
    dense, stc = document["arms"]["dense"], document["arms"]["stc"]
    run = read_result(tmp_path / "seed-3/stc")["arms"]["stc"]
    assert (stc["bytes_down"], stc["bytes_up"]) == (run["bytes_down"], run["bytes_up"])
    assert stc["accuracy"] == statistics.fmean(r["accuracy"] for r in run["rounds"][-1:])
    total = dense["bytes_down"] + dense["bytes_up"]
    assert stc["ratio"] == pytest.approx(total / (run["bytes_down"] + run["bytes_up"]), abs=1e-3)
    assert document["last_rounds"] == last_rounds(1) == 1

    # what was measured beside it does not matter
    events.clear()
    alone = Comparison.of(scenario, names=["dense"], folder=tmp_path)
    assert list(alone.run(lambda event: events.append(dict(event)))["arms"]) == ["dense"]
    assert [e["event"] for e in events] == ["kept"]

    # another scenario is another comparison, in the same folder too
    longer = dataclasses.replace(scenario, rounds=2)

    def stop(event: Any) -> None:
        assert event["event"] != "kept"
        raise Begun

    with pytest.raises(Begun):
        Comparison.of(longer, names=["dense"], folder=tmp_path).run(stop)
