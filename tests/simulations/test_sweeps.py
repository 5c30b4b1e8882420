"""Sweeps: the space and its mistakes, which points are drawn, going on, and what is left."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
import pytest
import tomli_w

from prunecast.server.federation import FederationError
from prunecast.simulations.kinds import ScenarioError, build
from prunecast.simulations.runner import SimulationError
from prunecast.simulations.scenarios import scenario_from_mapping
from prunecast.simulations.sweeps import SweepSpec, applied, load_spec
from prunecast.simulations.sweeps.drawing import draw, quiet_optuna, unfinished
from prunecast.simulations.sweeps.results import (
    PLOT,
    TABLE,
    document_of,
    front_rows,
    write_results,
)
from prunecast.simulations.sweeps.study import DATABASE, Sweep, jobs_for

SPARSITY, EPOCHS, RATE = (
    "arms.prunecast.policy.sparsity",
    "training.epochs",
    "training.learning_rate",
)
SPACE = {SPARSITY: {"low": 0.5, "high": 0.9}, EPOCHS: {"low": 1, "high": 3}, RATE: [0.02, 0.05]}


def spec_of(**keys: Any) -> SweepSpec:
    table = {"sampler": "random", "trials": 12, "parameters": SPACE, **keys}
    return build(SweepSpec, table, "sweep")


# -- the space ------------------------------------------------------------------------------------


def test_keys_with_dots_may_be_quoted_or_not():
    text = """
        [parameters]
        training.epochs = {low = 1, high = 3}
        "training.learning_rate" = [0.02, 0.05]
        arms.prunecast.policy.sparsity = {low = 0.5, high = 0.9}
    """
    spec = build(SweepSpec, tomllib.loads(text), "sweep")
    assert [parameter.key for parameter in spec.space()] == sorted(SPACE)


@pytest.mark.parametrize(
    ("given", "points"),
    [
        ([3, 1], (3, 1)),
        ({"low": 1, "high": 3}, (1, 2, 3)),
        ({"low": 1, "high": 6, "step": 2}, (1, 3, 5)),
        ({"low": 0.5, "high": 0.8, "step": 0.1}, (0.5, 0.6, 0.7, 0.8)),
        ({"low": 1, "high": 2, "step": 0.5}, (1.0, 1.5, 2.0)),
        ({"low": 0.5, "high": 0.8}, ()),
        ({"low": 1, "high": 8, "log": True}, ()),
    ],
)
def test_points_of_a_grid(given, points):
    [parameter] = spec_of(parameters={"rounds": given}).space()
    assert parameter.points() == points
    assert {type(p) for p in parameter.points()} == {type(p) for p in points}


def test_how_many_points_are_trained():
    assert (
        spec_of(sampler="grid", trials=0, parameters={EPOCHS: [1, 2], RATE: [1, 2, 3]}).count == 6
    )
    assert (
        spec_of(sampler="grid", trials=4, parameters={EPOCHS: [1, 2], RATE: [1, 2, 3]}).count == 4
    )
    assert spec_of(sampler="random", trials=0).count == 20


def test_corners_are_looked_at_together_unless_they_are_too_many():
    corners = list(spec_of().probes())
    assert len(corners) == 2 * 2 * 2
    assert {SPARSITY: 0.9, EPOCHS: 1, RATE: 0.05} in corners
    many = {f"model.options.k{n}": [1, 2] for n in range(20)}
    assert len(list(spec_of(parameters=many).probes())) == 40


def test_values_are_put_in_their_places_and_nothing_else_changes(tiny):
    before = json.dumps(tiny)
    changed = applied(tiny, {SPARSITY: 0.6, "strategy.options.eta": 1.0})
    assert changed["arms"]["prunecast"]["policy"]["sparsity"] == 0.6
    assert changed["strategy"] == {"options": {"eta": 1.0}}
    assert changed["arms"]["dense"] == tiny["arms"]["dense"]
    assert json.dumps(tiny) == before


@pytest.mark.parametrize(
    ("keys", "named", "said"),
    [
        ({"sampler": "tpe"}, "sweep.sampler", "grid, nsga2, random"),
        ({"parameters": {}}, "sweep.parameters", "nothing is varied; name keys"),
        ({"parameters": {RATE: []}}, RATE, "list values, or give a table with low and high"),
        ({"parameters": {RATE: 0.1}}, RATE, "list values"),
        ({"parameters": {RATE: [0.1, 0.1]}}, RATE, "name each value once"),
        ({"parameters": {RATE: [0.1, "fast"]}}, RATE, "numbers, strings or booleans alone"),
        ({"parameters": {RATE: [0.1, math.inf]}}, RATE, "finite"),
        ({"parameters": {RATE: {"low": 0.1}}}, f"{RATE}.high", "is missing; it must be a number"),
        ({"parameters": {RATE: {"low": 0.1, "high": "1"}}}, f"{RATE}.high", "must be a number"),
        ({"parameters": {RATE: {"low": 2, "high": 1}}}, RATE, "low must be below high"),
        ({"parameters": {RATE: {"low": 0, "high": 1, "log": True}}}, RATE, "begins at 0"),
        ({"parameters": {RATE: {"low": 1, "high": 2, "log": 1}}}, f"{RATE}.log", "true or false"),
        ({"parameters": {RATE: {"low": 1, "high": 2, "step": 3}}}, f"{RATE}.step", "within"),
        ({"parameters": {RATE: {"low": 1, "high": 2, "by": 3}}}, f"{RATE}.by", "low, high, step"),
        ({"parameters": {"data.path": ["a", "b"]}}, "data.path", "vary keys of arms"),
        ({"parameters": {"clients.count": [3, 4]}}, "clients.count", "vary keys of arms"),
        ({"sampler": "grid"}, SPARSITY, "has no step, and a grid needs one"),
        (
            {"sampler": "grid", "parameters": {RATE: {"low": 0.0, "high": 1.0, "step": 1e-5}}},
            "sweep.parameters",
            "a grid of 100,001 points",
        ),
        ({"sampler": "nsga2", "trials": 8}, "sweep.trials", "the first 10 at random; raise it"),
        ({"trials": -1}, "sweep.trials", "at least 0"),
    ],
)
def test_a_space_that_cannot_be_is_named_when_the_scenario_is_read(tiny, keys, named, said):
    table = {"sampler": "random", "parameters": SPACE, **keys}
    with pytest.raises(ScenarioError, match=said) as caught:
        scenario_from_mapping({**tiny, "sweep": table})
    assert caught.value.key == named


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"training.epoch": [1, 2]}, r"training\.epoch: unknown key; did you mean 'epochs'"),
        ({EPOCHS: [0, 1]}, r"training\.epochs: is 0; it must be at least 1"),
        ({EPOCHS: {"low": 0.5, "high": 2.0}}, r"training\.epochs: is 0\.5; it must be a whole"),
        ({"arms.prunecast.policy.sparsities": [0.5, 0.6]}, "unknown knob 'sparsities'"),
        ({SPARSITY: {"low": 0.5, "high": 1.5}}, r"sparsity\) = 1\.5"),
        ({"arms.dense.policy.sparsity": [0.5, 0.6]}, "is no key of the arm 'prunecast'"),
        ({"training.epochs.more": [1, 2]}, r"training\.epochs is no table"),
        ({"arms.prunecast.preset": ["small", "smaller"]}, r"preset = 'smaller' is unknown"),
    ],
)
def test_every_end_is_read_as_a_scenario_and_a_policy(tiny, tmp_path, parameters, said):
    scenario = scenario_from_mapping(tiny)
    with pytest.raises((ScenarioError, FederationError), match=said):
        Sweep.of(scenario, spec=spec_of(parameters=parameters), folder=tmp_path / "sweep")
    assert list(tmp_path.glob("sweep*")) == []


def test_what_only_data_and_model_show_is_found_before_anything_trains(tiny, tmp_path):
    scenario = scenario_from_mapping(tiny)
    options = {"model.options.width": [1, 2]}
    sweep = Sweep.of(scenario, spec=spec_of(parameters=options), folder=tmp_path / "sweep")
    with pytest.raises(ScenarioError, match=r"model\.options\.width.*means nothing"):
        sweep.run()
    assert not (tmp_path / "sweep" / "baseline").exists()


def test_a_scenario_without_the_table_is_refused(tiny, tmp_path):
    with pytest.raises(ScenarioError, match=r"^sweep: .* --space"):
        Sweep.of(scenario_from_mapping(tiny))
    other = tmp_path / "space.toml"
    other.write_text("[sweeps]\n")
    with pytest.raises(ScenarioError, match=r"^sweeps: .*holds the table \[sweep\] alone"):
        load_spec(other)
    with pytest.raises(ScenarioError, match=r"cannot read .*none\.toml"):
        load_spec(tmp_path / "none.toml")


def test_only_the_arm_and_the_baseline_are_trained(tiny):
    scenario = scenario_from_mapping({**tiny, "release": {"name": "x"}})
    sweep = Sweep.of(scenario, spec=spec_of(), rounds=2)
    assert (sweep.arm, sweep.baseline) == ("prunecast", "dense")
    assert list(sweep.scenario.arms) == ["dense", "prunecast"]
    assert (sweep.scenario.release, sweep.scenario.rounds) == (None, 2)
    point = sweep.at({SPARSITY: 0.55, EPOCHS: 2})
    assert list(point.arms) == ["prunecast"]
    assert (point.training.epochs, point.arms["prunecast"].grid_policy().sparsity) == (2, 0.55)


def test_trials_run_beside_each_other_as_the_cores_have_room_for(tiny, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))

    def jobs(**engine: Any) -> int:
        return jobs_for(scenario_from_mapping({**tiny, "engine": engine}))

    assert jobs(backend="inline") == 8
    assert jobs(backend="ray", concurrent=2, cpus=2) == 2
    assert jobs(backend="ray", concurrent=16) == 1
    assert jobs(backend="ray", address="head:6379") == 1


# -- what is drawn --------------------------------------------------------------------------------


class Drawn:
    """Draws points, and tells figures that follow from them, without training anything."""

    def __init__(self, folder: Path, spec: SweepSpec) -> None:
        self.spec = spec
        with quiet_optuna():
            self.study = optuna.create_study(
                storage=f"sqlite:///{folder / 'study.db'}",
                study_name="s",
                directions=["minimize", "maximize"],
                load_if_exists=True,
            )

    def run(self, *, jobs: int = 1, until: int = 10**6) -> list[dict[str, Any]]:
        """Trials end in the reverse of the order in which they began; stops early at `until`."""
        with quiet_optuna():
            waiting = list(unfinished(self.study, self.spec))
            running: list[tuple[int, dict[str, Any]]] = []
            while True:
                while len(running) < jobs:
                    waiting += [] if waiting else draw(self.study, self.spec, idle=not running)
                    if not waiting:
                        break
                    running.append(waiting.pop(0))
                if not running or len(self.study.trials) >= until:
                    return [trial.params for trial in self.study.trials]
                number, point = running.pop()
                self.study.sampler = optuna.samplers.RandomSampler(seed=0)
                self.study.tell(number, [1 / (1.001 - point[SPARSITY]), -abs(point[RATE] - 0.03)])


@pytest.mark.parametrize("sampler", ["grid", "random", "nsga2"])
def test_one_seed_draws_the_same_points_whatever_happens(tmp_path, sampler):
    space = {**SPACE, SPARSITY: {"low": 0.5, "high": 0.9, "step": 0.1}}
    spec = spec_of(sampler=sampler, parameters=space, trials=18, population=6)
    points = {}
    for name, jobs in (("one", 1), ("three", 3)):
        (tmp_path / name).mkdir()
        points[name] = Drawn(tmp_path / name, spec).run(jobs=jobs)
    (tmp_path / "cut").mkdir()
    for until in (3, 8, 14):  # in the middle of the first, the second and the third generation
        Drawn(tmp_path / "cut", spec).run(jobs=2, until=until)
    points["cut"] = Drawn(tmp_path / "cut", spec).run(jobs=2)
    assert points["one"] == points["three"] == points["cut"]
    assert len(points["one"]) == 18
    (tmp_path / "other").mkdir()
    other = spec_of(sampler=sampler, parameters=space, trials=18, population=6, seed=2)
    assert Drawn(tmp_path / "other", other).run() != points["one"]


def test_a_grid_is_every_combination_once(tmp_path):
    spec = spec_of(sampler="grid", trials=0, parameters={SPARSITY: [0.5, 0.6], RATE: [0.1, 0.2]})
    points = Drawn(tmp_path, spec).run(jobs=2)
    assert sorted((p[SPARSITY], p[RATE]) for p in points) == [
        (0.5, 0.1),
        (0.5, 0.2),
        (0.6, 0.1),
        (0.6, 0.2),
    ]


def test_later_generations_are_nearer_to_the_front(tmp_path):
    spec = spec_of(sampler="nsga2", trials=60, population=10, parameters={
        SPARSITY: {"low": 0.5, "high": 0.9}, RATE: {"low": 0.0, "high": 1.0},
    })  # fmt: skip
    points = Drawn(tmp_path, spec).run()
    near = [abs(point[RATE] - 0.03) < 0.1 for point in points]
    assert sum(near[-20:]) > 2 * sum(near[:20])


# -- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "sweep.seed"),
        ({"sampler": "nsga2", "population": 5}, "sweep.sampler"),
        ({"repeats": 2}, "sweep.repeats"),
        ({"parameters": {**SPACE, RATE: [0.02, 0.06]}}, f"sweep.parameters.{RATE}"),
        ({"parameters": {k: SPACE[k] for k in (SPARSITY, RATE)}}, f"sweep.parameters.{EPOCHS}"),
        ({"parameters": {**SPACE, "rounds": [1, 2]}}, "sweep.parameters.rounds"),
    ],
)
def test_a_sweep_that_was_another_is_refused_by_what_changed(tiny, tmp_path, change, named):
    scenario = scenario_from_mapping(tiny)
    Sweep.of(scenario, spec=spec_of(), folder=tmp_path)._study()
    Sweep.of(scenario, spec=spec_of(trials=50), folder=tmp_path)._study()  # more of the same
    with pytest.raises(ScenarioError, match="--out") as caught:
        Sweep.of(scenario, spec=spec_of(**change), folder=tmp_path)._study()
    assert caught.value.key == named


def test_another_scenario_is_another_sweep(tiny, tmp_path):
    Sweep.of(scenario_from_mapping(tiny), spec=spec_of(), folder=tmp_path)._study()
    faster = {**tiny, "engine": {"backend": "ray"}}
    Sweep.of(scenario_from_mapping(faster), spec=spec_of(), folder=tmp_path)._study()
    other = scenario_from_mapping({**tiny, "seed": 4})
    with pytest.raises(ScenarioError, match=r"^seed: is 4, and was 3 when the sweep in"):
        Sweep.of(other, spec=spec_of(), folder=tmp_path)._study()


def test_a_damaged_or_busy_folder_is_named(tiny, tmp_path):
    sweep = Sweep.of(scenario_from_mapping(tiny), spec=spec_of(), folder=tmp_path)
    (tmp_path / DATABASE).write_bytes(b"no database at all, but long enough to be read as one")
    with pytest.raises(SimulationError, match=r"study\.db cannot be read"):
        sweep.run()
    with sweep._locked(), pytest.raises(SimulationError, match="another process runs the sweep"):
        sweep.run()


# -- what it leaves -------------------------------------------------------------------------------


def told(tmp_path: Path, tiny: dict[str, Any]) -> tuple[Sweep, dict[str, Any]]:
    """A sweep of four trials, of which one failed and one is like another, without training."""
    sweep = Sweep.of(scenario_from_mapping(tiny), spec=spec_of(trials=4), folder=tmp_path)
    with quiet_optuna():
        study = sweep._study()
        study.set_user_attr("baseline", {"bytes_down": 900, "bytes_up": 100, "reached": 0.9})
        outcomes: list[dict[str, Any]] = [
            {"bytes_down": 50, "bytes_up": 50, "reached": 0.8, "seconds": 1.0, "spread": 0.01},
            {"reason": "TrainerError: the training loss is nan"},
            {"bytes_down": 90, "bytes_up": 90, "reached": 0.7, "seconds": 2.0, "spread": None},
            {"bytes_down": 100, "bytes_up": 100, "reached": 0.9, "seconds": 2.0, "same_as": 0},
        ]
        for outcome in outcomes:
            [(number, _)] = draw(study, sweep.spec, idle=True)
            sweep._tell(study, number, outcome, lambda event: None)
        return sweep, document_of(sweep, study)


def test_the_table_has_every_trial_and_the_front(tiny, tmp_path):
    _, document = told(tmp_path, tiny)
    write_results(tmp_path, document)
    table = pq.read_table(tmp_path / TABLE)
    rows = table.to_pylist()
    assert [row["state"] for row in rows] == ["complete", "fail", "complete", "complete"]
    assert [row["bytes"] for row in rows] == [100, None, 180, 200]
    assert [row["front"] for row in rows] == [True, False, False, True]
    assert [row["ratio"] for row in rows] == [10.0, None, 5.556, 5.0]
    assert [row["same_as"] for row in rows] == [None, None, None, 0]
    assert rows[1]["reason"] == "TrainerError: the training loss is nan"
    assert [row[EPOCHS] for row in rows] == [trial["point"][EPOCHS] for trial in document["trials"]]
    assert {str(table.schema.field(key).type) for key in (SPARSITY, RATE)} == {"double"}
    assert str(table.schema.field(EPOCHS).type) == "int64"
    rest = json.loads(table.schema.metadata[b"prunecast"])
    assert rest == {key: value for key, value in document.items() if key != "trials"}
    assert (tmp_path / PLOT).read_bytes().startswith(b"\x89PNG")
    documented = (Path(__file__).parents[2] / "docs/sweeps.md").read_text()
    for column in {*table.column_names} - {SPARSITY, EPOCHS, RATE}:
        assert f"`{column}`" in documented, column


def test_the_front_is_printed_with_the_fewest_bytes_first(tiny, tmp_path):
    _, document = told(tmp_path, tiny)
    header, rows = front_rows(document)
    assert header == ["trial", "sparsity", "epochs", "learning_rate", "bytes", "ratio", "accuracy"]
    assert [(row[0], *row[-3:]) for row in rows] == [
        ("0", "100 B", "10.0×", "80.0 ± 1.0 %"),
        ("3", "200 B", "5.00×", "90.0 %"),
        ("dense", "1.00 kB", "1.00×", "90.0 %"),
    ]


def test_a_sweep_in_which_nothing_can_be_trained_ends(tiny, tmp_path):
    sweep = Sweep.of(scenario_from_mapping(tiny), spec=spec_of(trials=9), folder=tmp_path)
    with quiet_optuna():
        study = sweep._study()
        failed = {"reason": "OSError: no space left"}
        for _ in range(2):
            [(number, _)] = draw(study, sweep.spec, idle=True)
            sweep._tell(study, number, failed, lambda event: None)
        [(number, _)] = draw(study, sweep.spec, idle=True)
        with pytest.raises(
            SimulationError, match="no trial was trained, the last because of: OSEr"
        ):
            sweep._tell(study, number, failed, lambda event: None)


@pytest.mark.engine
def test_a_killed_sweep_goes_on_with_the_same_points(tiny, tmp_path):
    scenario = tmp_path / "tiny.toml"
    space = {"sampler": "random", "trials": 4, "parameters": {RATE: [0.05, 1e30]}}
    arms = {name: tiny["arms"][name] for name in ("dense", "prunecast")}
    scenario.write_text(tomli_w.dumps({**tiny, "rounds": 1, "arms": arms, "sweep": space}))
    command = [sys.executable, "-m", "prunecast.cli", "sweep", str(scenario), "--jobs", "2"]
    command += ["--json", "--out", str(tmp_path / "sweep")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("trial"):
                process.send_signal(signal.SIGKILL)
                break
    went_on = subprocess.run(command, capture_output=True, check=True, timeout=300, text=True)
    document = json.loads(went_on.stdout)
    told = [line for line in went_on.stderr.splitlines() if line.startswith(("trial", "baseline"))]
    assert len(told) < 5
    spec = build(SweepSpec, space, "sweep")
    with quiet_optuna():
        study = optuna.create_study(directions=["minimize", "maximize"])
        expected = [draw(study, spec, idle=True)[0][1] for _ in range(4)]
    rows = document["trials"]
    assert [row["point"] for row in rows] == expected
    for row in rows:
        if row["point"][RATE] == 0.05:
            assert row["state"] == "complete"
            assert row["bytes"] > 0
            assert row["ratio"] > 1
        else:
            assert row["state"] == "fail"
            assert "lower the learning rate" in row["reason"]
    assert {row["point"][RATE] for row in rows} == {0.05, 1e30}
    # trained once more, beside the other, or not again: the same points come to the same
    trained = [row for row in rows if row["state"] == "complete"]
    assert len({(row["bytes"], row["accuracy"]) for row in trained}) == 1
    assert pq.read_table(tmp_path / "sweep" / TABLE).num_rows == 4
