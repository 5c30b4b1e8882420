"""Accuracy against sparsity: arms, what is known to hold, the page, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pruning as command
from benchmarks.harness import pruning as harness
from benchmarks.harness import pruning_tasks

ROOT = Path(__file__).parents[2]


def arm(*values: float, mean: float | None = None) -> dict[str, Any]:
    reached = sum(values) / len(values) if mean is None else mean
    figures = {"bytes_down": 500_000, "bytes_up": 500_000, "seconds": 2.0, "spread": 0.001}
    return {"accuracy": reached, "by_seed": list(values), **figures}


def rows(**arms: dict[str, Any]) -> list[dict[str, Any]]:
    ways = [name for name in arms if name != "unpruned"]
    found = {f"{name}-95": figures for name, figures in arms.items() if name != "unpruned"}
    document = {
        "task": {"metric": "accuracy"},
        "arms": {**found, "unpruned": arms["unpruned"]},
        "left_out": {},
    }
    return harness.rows_of(document, ways, [0.95], dict.fromkeys(found, 0.949))


def test_arms_are_policies_by_the_names_of_the_registries() -> None:
    arms = harness.arms_of(["uniform", "taylor:lamp:cubic"], [0.5, 0.98], 20)
    assert list(arms) == [
        *("dense", "unpruned", "uniform-50", "uniform-98"),
        *("taylor-lamp-cubic-50", "taylor-lamp-cubic-98"),
    ]
    assert arms["unpruned"] == {"kind": "prunecast", "preset": "balanced"}
    policy = arms["taylor-lamp-cubic-98"]["policy"]
    assert (policy["sparsity"], policy["pruning_criterion"]) == (0.98, "taylor")
    assert (policy["pruning_scope"], policy["pruning_schedule"]) == ("lamp", "cubic")
    assert policy["pruning_begin"] < policy["pruning_end"] == 10  # rounds are left to recover
    rounds, beside = harness.automatic_arms(20)
    assert (rounds, beside["unpruned"]) == (26, arms["unpruned"])
    automatic = beside["automatic"]["policy"]
    assert automatic["pruning_schedule"] == "automatic"
    assert "sparsity" not in automatic


def test_every_way_and_task_can_be_run(tmp_path: Path) -> None:
    arguments = command._arguments(["--cache", str(tmp_path)])
    assert arguments.sparsities == [0.5, 0.8, 0.9, 0.95, 0.98]
    assert (arguments.seeds, arguments.out) == ([1, 2, 3], ROOT / "docs/results")
    assert arguments.tasks == [*pruning_tasks.TASKS, "cora"]
    for task in arguments.tasks:
        chosen = command.comparison_of(task, arguments)
        assert chosen.scenario.engine.backend == "inline"
        assert ("static-90" in chosen.arms) == (task != "cora")
        longer = command.automatic_of(task, arguments)
        assert longer is not None
        assert (longer.scenario.rounds, set(longer.arms)) == (39, {"unpruned", "automatic"})
        for found in (*chosen.arms.values(), *longer.arms.values()):
            found.grid_policy()  # every name is in its registry
    arguments = command._arguments(["--cache", str(tmp_path), "--ways", "uniform"])
    assert command.automatic_of("fashion", arguments) is None  # nothing to be held against
    smoke = command._arguments(["--smoke"])
    assert smoke.out == Path("runs/pruning-smoke")  # never where results are


def test_points_are_lost_against_the_same_policy_without_pruning() -> None:
    [row] = rows(unpruned=arm(0.90, 0.92), uniform=arm(0.89, 0.90))
    assert row["lost_by_seed"] == pytest.approx([1.0, 2.0])
    assert row["lost"] == pytest.approx(1.5)
    assert (row["zeros"], row["bytes"]) == (0.949, 1_000_000)
    [entry] = harness.within_limits([row])
    assert (entry["limit"], entry["met"]) == (1.5, entry["lost"] <= 1.5)


def test_orderings_compare_ways_seed_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    orderings = (("b above a", "b", "a"), ("a above c", "a", "c"), ("a above z", "a", "z"))
    monkeypatch.setattr(harness, "ORDERINGS", orderings)
    ways = dict.fromkeys("abc", harness.WAYS["uniform"])
    monkeypatch.setattr(harness, "WAYS", ways)
    found = harness.compare_orderings(
        rows(unpruned=arm(0.9, 0.9), a=arm(0.80, 0.84), b=arm(0.81, 0.86), c=arm(0.85, 0.86))
    )
    assert [(e["name"], e["met"]) for e in found] == [("b above a", True), ("a above c", False)]
    assert found[0]["points"] == pytest.approx(1.5)
    assert found[0]["error"] == pytest.approx(0.5)  # of the differences, not of what was reached


@pytest.mark.parametrize(
    ("lost", "zeros", "fixed", "tolerated", "as_sparse"),
    [
        (0.004, 0.93, 0.95, True, True),  # two points less are spared
        (0.004, 0.92, 0.95, True, False),
        (0.006, 0.96, 0.95, False, True),
    ],
)
def test_the_automatic_way_is_judged_by_the_sweep(
    lost: float, zeros: float, fixed: float, tolerated: bool, as_sparse: bool
) -> None:
    figures = {"unpruned": arm(0.9), "global-80": arm(0.89), "global-95": arm(0.896)}
    figures |= {"global-98": arm(0.88), "automatic": arm(0.9 - lost)}
    document: dict[str, Any] = {"task": {"metric": "accuracy"}, "arms": figures, "left_out": {}}
    reached = {**dict.fromkeys(figures, 0.5), "automatic": zeros}
    measured = harness.rows_of(document, ["global"], [0.8, 0.95, 0.98], reached)
    longer = {**document, "arms": {**figures, "unpruned": arm(0.92)}}
    found = harness.compare_automatic(longer, 39, [0.9], measured, reached)
    assert found is not None
    assert (found["fixed"], found["tolerated"]) == (fixed, tolerated)
    assert found["as_sparse"] == as_sparse
    assert found["lost"] == pytest.approx(100 * lost)
    assert found["lost_in_as_many"] == pytest.approx(100 * lost + 2)
    none_held = [row for row in measured if row["sparsity"] != 0.95]
    other = harness.compare_automatic(document, 39, [0.9], none_held, reached)
    assert other is not None
    assert other["fixed"] == 0
    figures.pop("automatic")
    document["left_out"] = {"global-80": "it diverged"}
    figures.pop("global-80")
    rest = harness.rows_of(document, ["global"], [0.8, 0.95, 0.98], reached)
    assert [row["sparsity"] for row in rest] == [0.95, 0.98]
    assert harness.compare_automatic(document, 39, [0.9], measured, reached) is None


def test_the_page_says_what_was_met_and_what_was_missed(tmp_path: Path) -> None:
    measured = rows(unpruned=arm(0.9, 0.9), uniform=arm(0.89, 0.88), **{"global": arm(0.85, 0.87)})
    task = {
        "name": "fashion",
        "description": "images",
        "rounds": 24,
        "seeds": [1, 2],
        "dense": arm(0.91, 0.91),
        "unpruned": arm(0.9, 0.9),
        "rows": measured,
        "orderings": [
            {"name": "one", "better": "b", "worse": "a", "sparsity": 0.95, "points": 0.5,
             "error": 0.1, "met": True},
            {"name": "two", "better": "b", "worse": "c", "sparsity": 0.95, "points": -0.5,
             "error": None, "met": False},
        ],
        "limits": harness.within_limits(measured),
        "left_out": {"random-98": "seed 2: it diverged"},
        "automatic": {
            "rounds": 31, "accuracy": 0.896, "lost": 0.4, "lost_by_seed": [0.3, 0.5],
            "lost_in_as_many": 0.7, "zeros": 0.964, "bytes": 1_500_000,
            "fixed": 0.95, "tolerated": True, "as_sparse": False,
        },
    }  # fmt: skip
    text = "\n".join(harness.report_lines([task], "the command"))
    assert "Written by `the command`" in text
    assert "Plain Flower reaches 91.00 ± 0.10 %, the same policy without pruning 90.00" in text
    row = "| `uniform` | 95 % | 88.50 ± 0.10 % | +1.50 | +1.00, +2.00 | 94.9 % | 1.00 | 2 |"
    assert row in text
    assert "- one at 95 % (`b`, `a`): met, +0.50 ± 0.10 points" in text
    assert "- two at 95 % (`b`, `c`): MISSED, -0.50 points" in text
    assert "- no more than 1.5 points lost at 95 %" in text
    assert "- `random-98` was left out: seed 2: it diverged." in text
    assert "- automatic, 31 rounds: 96.4 % of zeros in 1.50 MB, +0.40 points lost" in text
    assert "(+0.30, +0.50), its tolerance 0.5: within; the highest" in text
    assert "of `global` that lost no more is 95 %, no more than 2 points above: MISSED" in text
    assert "Against no pruning in as many rounds it lost +0.70" in text
    harness.draw([task, {**task, "name": "activity", "automatic": None}], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--tasks", "nope"], "tasks: is 'nope'; choose of fashion, activity, cora"),
        (
            ["--tasks", "movielens"],
            "tasks: movielens measures rmse; choose one that has an accuracy",
        ),
        (["--ways", "nope"], "'nope' is no way of pruning: name one of uniform"),
        (["--ways", "no:layer:cubic"], "pruning_criterion"),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_line(
    tmp_path: Path, given: list[str], says: str
) -> None:
    with pytest.raises(SystemExit, match=says):
        command.main([*given, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path)])


@pytest.mark.engine
def test_the_command_writes_its_page_and_keeps_what_it_trained(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {
        **pruning_tasks.TASKS["activity"],
        "data": {"source": "synthetic", "shape": "sensors", "count": 300, "held_out": 100},
        "partition": {"kind": "iid"},
        "model": {"factory": "prunecast.simulations.networks.convolutional:sensor_cnn"},
    }
    monkeypatch.setitem(pruning_tasks.TASKS, "small", table)
    given = ["--tasks", "small", "--smoke", "--ways", "uniform", "--sparsities", "0.9", "0.95"]
    given += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    assert command.main(given) == 0
    assert "small: seed 1, uniform-95\n" in capfd.readouterr().out
    [made] = json.loads((tmp_path / "out/pruning.json").read_text())["tasks"]
    assert [row["sparsity"] for row in made["rows"]] == [0.9, 0.95]
    assert made["rows"][0]["zeros"] == pytest.approx(0.9, abs=0.01)
    assert "## small" in (tmp_path / "out/pruning.md").read_text()
    assert (tmp_path / "out/pruning.png").stat().st_size > 1000

    assert command.main(given) == 0
    assert capfd.readouterr().out.count(": kept\n") == 4
