"""The headline: what ours is compared with, what is kept, and that every figure has a command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import headline as command
from benchmarks.harness import comparisons
from benchmarks.harness.headline import draw, report_lines, reproduced, target_of, verdict
from prunecast.simulations.scenarios import load_scenario

ROOT = Path(__file__).parents[2]


def arm(kind: str, megabytes: float, value: float, **others: Any) -> dict[str, Any]:
    half = round(megabytes * 5e5)
    figures = {"bytes_down": half, "bytes_up": half, "spread": 0.001, "seconds": 2.0}
    return {
        "kind": kind,
        **figures,
        "accuracy": value,
        "best": value,
        "best_spread": 0.001,
        **others,
    }


def document(arms: dict[str, Any], *, lower: bool = False, **others: Any) -> dict[str, Any]:
    scenario = {"name": "x", "description": "x on y", "model": {"factory": "nets:lenet"}}
    task = {"metric": "accuracy", "percent": not lower, "lower_is_better": lower}
    made = {"scenario": scenario, "task": task, "arms": arms, "seeds": [1, 2], "rounds": 20}
    return {
        **made,
        "parameters": 44_426,
        "family": "LeNet",
        "published": {},
        "left_out": {},
        **others,
    }


ARMS = {
    "dense": arm("dense", 100, 0.960),
    "zip": arm("recoded", 90, 0.960, seconds=None),
    "stc": arm("scheme", 4, 0.9535),
    "bits": arm("scheme", 2, 0.70),
    "balanced": arm("prunecast", 1.2, 0.961),
    "small": arm("prunecast", 0.8, 0.957),
    "tiny": arm("prunecast", 0.3, 0.94),
}


def test_ours_is_the_cheapest_preset_and_the_peer_the_cheapest_as_good() -> None:
    found = verdict(document(ARMS), 0.005)
    assert (found["ours"], found["peer"], found["nearest"]) == ("small", "stc", None)
    assert (found["ratio"], found["peer_ratio"]) == (125.0, 5.0)
    assert found["below"] == pytest.approx(0.003)
    assert (found["target"], found["reached"], found["peer_reached"]) == (100.0, True, True)
    exact = verdict(document(ARMS), 0.0)  # nothing that is worse at all will do
    assert (exact["ours"], exact["peer"], exact["nearest"]) == ("balanced", None, "zip")
    assert (exact["reached"], exact["peer_reached"]) == (False, None)


def test_without_a_preset_as_good_as_dense_the_nearest_stands_for_ours() -> None:
    arms = {**ARMS, "balanced": arm("prunecast", 1, 0.93), "small": arm("prunecast", 0.5, 0.92)}
    found = verdict(document({**arms, "tiny": arm("prunecast", 0.3, 0.91)}), 0.005)
    assert (found["ours"], found["within"], found["reached"]) == ("balanced", False, False)
    assert found["peer"] == "stc"


def test_a_metric_that_is_no_fraction_has_a_relative_tolerance_and_may_be_lower() -> None:
    arms = {
        "dense": arm("dense", 100, 2.000),
        "stc": arm("scheme", 4, 2.02),
        "small": arm("prunecast", 1, 2.009),
        "tiny": arm("prunecast", 0.5, 2.011),
    }
    found = verdict(document(arms, lower=True), 0.005)
    assert (found["ours"], found["peer"], found["nearest"]) == ("small", None, "stc")
    assert found["below"] == pytest.approx(0.009)


@pytest.mark.parametrize(
    ("factory", "parameters", "target"),
    [("nets:lenet", 44_426, 100.0), ("nets:cnn", 300_001, 300.0), ("nets:gcn", 1_348, None)],
)
def test_targets_go_by_the_network(factory: str, parameters: int, target: float | None) -> None:
    made = document(ARMS, parameters=parameters)
    made["scenario"]["model"]["factory"] = factory
    assert target_of(made) == target


def test_the_page_says_what_was_missed_and_what_was_reproduced(tmp_path: Path) -> None:
    figure = {"value": 0.9603, "spread": 0.0007, "measured": "best", "bytes": 0, "source": "there"}
    published = {"fedavg": {**figure, "arm": "dense"}, "far": {**figure, "arm": "stc"}}
    made = document(ARMS, published={**published, "none": {**figure, "arm": ""}})
    assert [reproduced(made, name) for name in made["published"]] == [True, False, None]
    arms = {name: ARMS[name] for name in ("dense", "zip", "bits", "tiny")}
    far = document(arms, parameters=409_034, published={})
    for one, tolerance in ((made, 0.005), (far, 0.005)):
        one["verdict"] = verdict(one, tolerance)
    far["arms"]["zip"]["accuracy"] = 0.9
    far["verdict"] = verdict(far, 0.005)
    text = "\n".join(report_lines([made, far], 0.005, "the command"))
    assert "Written by `the command`" in text
    assert "- `small`: 125× fewer bytes than dense, 0.3 points worse. Target 100× reached." in text
    assert "- Best peer as good: `stc`, 5.00× the bytes." in text
    assert (
        "no preset comes within the tolerance of dense. Target 300× missed for that alone." in text
    )
    far["verdict"] = verdict(document({**arms, "tiny": arm("prunecast", 0.4, 0.96)}), 0.005)
    far["verdict"] |= {"target": 300.0, "reached": False}
    assert " Target 300× missed: 83% of it." in "\n".join(report_lines([far], 0.005, ""))
    assert "- No peer is as good; the nearest, `zip`, is 4 points worse for 300× the bytes." in text
    assert re.search(r"fedavg, published: .* \(there\): reproduced\.", text)
    assert re.search(r"far, published: .* \(there\): NOT reproduced within the spread\.", text)
    assert "| `zip` | 45.000 | 45.000 | 90.000 | 90.00 ± 0.10 | – | – |" in text
    draw([made, far], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_at_least_six_families_are_trained_for_the_rounds_of_their_sources(tmp_path: Path) -> None:
    arguments = command._arguments(["--cache", str(tmp_path)])
    assert (arguments.seeds, arguments.rounds) == ([1, 2, 3], None)
    assert arguments.out == ROOT / "docs/results"
    assert len(arguments.scenarios) >= 6
    for name in arguments.scenarios:
        chosen = command.comparison_of(name, arguments)
        assert chosen.scenario.rounds == load_scenario(name).rounds
        assert chosen.scenario.engine.backend == "inline"
        assert {"dense", "stc", "masks", "fine", "balanced", "small", "tiny"} <= chosen.arms.keys()
    smoke = command._arguments(["--smoke"])
    assert (smoke.seeds, smoke.rounds) == ([1], 3)
    assert smoke.out == Path("runs/headline-smoke")  # never where results are


def test_what_other_code_made_is_forgotten_but_not_what_is_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--cache", str(tmp_path), "--arms", "dense", "dense-zstd", "stc", "small"]
    arguments = command._arguments([*given, "--seeds", "1"])
    chosen = command.comparison_of("mlp", arguments)
    comparisons.forget_stale(chosen)
    for _, folder in chosen.runs():
        folder.mkdir(parents=True)
    comparisons.forget_stale(chosen)
    folders = {folder.name: folder for _, folder in chosen.runs()}
    assert all(folder.is_dir() for folder in folders.values())
    digest = comparisons.digest_of

    def other(mapping: dict[str, Any]) -> str:
        dense = all(made["kind"] == "dense" for made in mapping["arms"].values())
        return digest(mapping) if dense else "of other code"

    monkeypatch.setattr(comparisons, "digest_of", other)
    comparisons.forget_stale(chosen)
    assert {name for name, folder in folders.items() if folder.is_dir()} == {"dense"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--scenarios", "nope"], "cannot read nope .*give a TOML file, or one of"),
        (["--scenarios", "mlp", "--arms", "zip"], "arms: is 'zip'; choose one of"),
        (["--scenarios", "mlp", "--arms", "small"], "arms: none is dense; name one"),
        (["--scenarios", "mlp", "--arms", "dense"], "arms: none is prunecast; name one"),
    ],
)
def test_what_cannot_be_compared_is_told_in_a_line(
    tmp_path: Path, given: list[str], says: str
) -> None:
    with pytest.raises(SystemExit, match=says):
        command.main([*given, "--cache", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_every_figure_of_the_readme_has_its_command() -> None:
    text = (ROOT / "docs/figures.md").read_text(encoding="utf-8")
    table = text.partition("## Those of the README")[2].partition("## The headline")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 4
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").replace("**", "").split())
    for figures, commands in rows:
        for figure in re.findall(r"`([^`]*)`", figures):
            assert figure in readme, figure
        assert re.search(r"`(make|flwr|python) [^`]+`", commands)


@pytest.mark.engine
def test_the_command_writes_its_page_and_keeps_what_it_trained(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "simulations/scenarios/mlp.toml"  # a name would do as well
    given = ["--scenarios", str(path), "--rounds", "1", "--seeds", "1", "2"]
    given += ["--arms", "dense", "dense-zstd", "small"]
    given += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    assert command.main(given) == 0
    told = capfd.readouterr().out
    assert "mlp: seed 2, small\n" in told
    found = json.loads((tmp_path / "out/headline.json").read_text())
    [made] = found["scenarios"]
    assert made["parameters"] == 5_699
    assert made["verdict"]["ours"] == "small"
    for name, figures in made["arms"].items():
        assert figures["wire"] > figures["bytes_up"] + figures["bytes_down"] > 0, name
    assert "## mlp" in (tmp_path / "out/headline.md").read_text()
    assert (tmp_path / "out/headline.png").stat().st_size > 1000

    assert command.main(given) == 0
    assert capfd.readouterr().out.count(": kept\n") == 4
