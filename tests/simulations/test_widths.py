"""Width classes in scenarios: which clients state them, who takes part, what is told of them."""

from __future__ import annotations

import json

import pytest

from prunecast.server.federation import Ledger
from prunecast.simulations.report import write_report
from prunecast.simulations.runner.federate import run_arms, simulated_client
from prunecast.simulations.runner.inprocess import InProcessGrid
from prunecast.simulations.runner.prepared import prepare
from prunecast.simulations.runner.run import build_arms
from prunecast.simulations.scenarios import ScenarioError, scenario_from_mapping

CLASSES = {"small": 0.5, "tiny": 0.25}


@pytest.fixture
def classes(tiny):
    """Four clients, of which two are small and one is tiny."""
    ours = {"kind": "prunecast", "preset": "balanced"}
    return {
        **tiny,
        "rounds": 2,
        "model": {},
        "clients": {"count": 4, "widths": CLASSES},
        "arms": {
            "wide": ours,
            "classes": {**ours, "policy": {"widths": {"small": 0.5, "tiny": 0.25}}},
            "without": {
                **ours,
                "policy": {"widths": {"small": 0.5}},
                "left_out": ["tiny"],
            },
        },
    }


def test_classes_are_those_of_the_last_clients(classes):
    scenario = scenario_from_mapping(classes)
    assert scenario.clients.classes() == ["", "small", "small", "tiny"]
    assert scenario_from_mapping(scenario.to_mapping()) == scenario


def test_bytes_and_accuracy_of_every_class_are_in_the_result(classes, tmp_path, finished_run):
    folder = finished_run(classes, tmp_path / "run")
    result = json.loads((folder / "result.json").read_text())
    arms = result["arms"]
    assert arms["wide"]["widths"] is None
    found = arms["classes"]["widths"]
    assert list(found) == ["whole", "small", "tiny"]
    assert [part["nodes"] for part in found.values()] == [1, 2, 1]
    assert found["whole"]["weights"] == 409_034
    assert found["tiny"]["weights"] < found["small"]["weights"] < 409_034 / 3
    assert found["whole"]["accuracy"] == arms["classes"]["accuracy"]
    for part in found.values():
        assert 0 < part["accuracy"] <= 1
        assert part["loss"] > 0
    # a node of each: half of the channels are about a quarter of the bytes
    a_small = (found["small"]["bytes_down"] + found["small"]["bytes_up"]) / 2
    assert a_small < 0.5 * (found["whole"]["bytes_down"] + found["whole"]["bytes_up"])
    for way in ("bytes_down", "bytes_up"):
        assert sum(part[way] for part in found.values()) == arms["classes"][way]
    rows = arms["classes"]["rounds"]
    assert rows[-1]["widths"] == found
    assert rows[-1]["parameters"] == 409_034
    assert rows[0]["widths"]["small"]["nodes"] == 0  # nobody has said anything yet
    write_report(folder, result)
    page = (folder / "report.html").read_text()
    assert "Width classes" in page
    assert f"{found['small']['weights']:,}" in page


def test_an_arm_may_leave_a_class_out(classes, tmp_path):
    classes["arms"] = {"without": classes["arms"]["without"]}
    prepared = prepare(scenario_from_mapping(classes), tmp_path)
    grid = InProcessGrid(simulated_client(prepared), num_nodes=4)
    (outcome,) = run_arms(grid, prepared, lambda event: None)
    asked = {entry.node for entry in Ledger.read(prepared.ledger("without"))}
    assert asked == set(outcome["nodes"][:3])
    assert build_arms(prepared, [outcome])["without"]["text"].endswith("without tiny")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["clients"].update(widths={"small": 0.0}), "clients.widths.small"),
        (lambda s: s["clients"].update(widths={"small": 0.1}), "none of 4 clients"),
        (lambda s: s["clients"].update(widths={"small": 1.0, "tiny": 0.5}), "more clients"),
        (lambda s: s["clients"].update(widths={"a/b": 0.5}), "no name of a class"),
        (lambda s: s["clients"].update(widths={"other": 0.5}), "'other'"),
        (lambda s: s["arms"]["without"].update(left_out=["huge"]), "'huge'"),
        (
            lambda s: (
                s["clients"].update(widths={"tiny": 1.0}),
                s["arms"].pop("classes"),
            ),
            "leaves no client",
        ),
    ],
)
def test_classes_that_cannot_be_are_refused(classes, change, words):
    change(classes)
    with pytest.raises(ScenarioError, match=words):
        scenario_from_mapping(classes)
