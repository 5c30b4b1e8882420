"""Releases that come by themselves: when, what, and what happens if one fails."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from prunecast.compression.onnx import ExportError
from prunecast.compression.onnx.graph import ExportedGraph, save_graph
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.release.selftest import pack_arrays
from prunecast.compression.versions import PublishedModel
from prunecast.server.federation import (
    AutomaticReleases,
    ReleaseRule,
    ReleaseRuleError,
    Run,
    server_app,
)
from prunecast.server.federation.releasing import ReleaseWatch, releases_from_config
from prunecast.server.fleet.events import AddGroup
from prunecast.server.fleet.model import Release
from prunecast.server.fleet.service import FleetService
from prunecast.server.repository import (
    Change,
    KeyRing,
    Repository,
    RepositoryError,
    verify_repository,
)
from prunecast.server.repository.authoring import ReleaseRecipe, Samples
from prunecast.server.repository.authoring.sources import from_arrays
from prunecast.server.repository.fleets import remember_fleet
from prunecast.simulations.runner.inprocess import InProcessGrid
from support import narrowable
from support.ceremonies import Circle
from support.classifier import classifier_graph, classifier_inputs
from support.federation import RUN_ID, initial_arrays, make_app, to_record
from support.releases import publish_model


def _due(rule: ReleaseRule, values: list[float], held: float | None = None) -> list[int]:
    """Rounds after which a metric with these values releases."""
    watch, made = ReleaseWatch(rule, held), []
    for number, value in enumerate(values, start=1):
        if watch.due(number, {"m": value}):
            watch.released({"m": value})
            made.append(number)
    return made


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        (ReleaseRule(every=3), [0] * 7, [3, 6]),
        (ReleaseRule(metric="m", reach=0.5), [0.4, 0.5, 0.4, 0.6], [2]),
        (ReleaseRule(metric="m", improve=0.1), [0.4, 0.45, 0.5, 0.55, 0.61], [1, 3, 5]),
        (ReleaseRule(metric="m", reach=0.5, improve=0.1), [0.4, 0.55, 0.6, 0.7], [2, 4]),
        (ReleaseRule(every=4, metric="m", reach=0.5), [0.1, 0.6, 0.7, 0.7], [2, 4]),
        (ReleaseRule(metric="m", reach=0.5, lower_is_better=True), [0.9, 0.5, 0.1], [2]),
        (ReleaseRule(metric="m", improve=0.1, lower_is_better=True), [0.9, 0.85, 0.7], [1, 3]),
        (ReleaseRule(metric="m", improve=0.1), [math.nan, math.inf, 0.2], [3]),
    ],
)
def test_when_a_release_is_due(rule: ReleaseRule, values: list[float], expected: list[int]) -> None:
    assert _due(rule, values) == expected


def test_a_new_run_is_measured_against_the_newest_release() -> None:
    rule = ReleaseRule(metric="m", improve=0.1)
    assert _due(rule, [0.4, 0.7, 0.95], held=0.8) == [3]
    assert _due(ReleaseRule(metric="m", reach=0.5), [0.6], held=0.8) == [1]


def test_the_initial_model_is_never_released() -> None:
    watch = ReleaseWatch(ReleaseRule(every=1, metric="m", reach=0.0))
    assert watch.due(0, {"m": 1.0}) is None


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, "release.every"),
        ({"every": -1}, "release.every = -1"),
        ({"metric": "m"}, "release.reach or release.improve"),
        ({"every": 2, "reach": 0.5}, "set release.metric"),
        ({"metric": "m", "improve": -0.1}, "release.lower-is-better"),
        ({"metric": "m", "reach": math.nan}, "release.reach"),
    ],
)
def test_rules_that_cannot_work_name_their_key(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ReleaseRuleError, match=key):
        ReleaseRule(**options)


# on the grid


class _Recorder:
    def __init__(self) -> None:
        self.models: list[PublishedModel] = []
        self.fail = 0

    def __call__(self, model: PublishedModel, metrics: Mapping[str, float]) -> int:
        if self.fail:
            self.fail -= 1
            raise RepositoryError("the disk is full")
        self.models.append(model)
        return len(self.models)


def _train(
    grid: Any, releases: AutomaticReleases, rounds: int = 4, *, evaluate_fn: Any = None
) -> Any:
    run = Run(grid, FedAvg(), evaluate_fn=evaluate_fn, releases=releases)
    return run.start(to_record(initial_arrays()), num_rounds=rounds)


def test_every_other_round_the_published_model_is_released(federation: Callable[..., Any]) -> None:
    grid, _, seen = federation("small")
    recorder = _Recorder()
    releases = AutomaticReleases(ReleaseRule(every=2), recorder)
    _train(grid, releases)
    assert [(r.round, r.version) for r in releases.made] == [(2, 1), (4, 2)]
    evaluated = [arrays for _, kind, arrays in seen if kind == "evaluate"]
    for made, received in zip(recorder.models, (evaluated[3], evaluated[9]), strict=True):
        for name, array in made.arrays().items():  # bit for bit what the nodes evaluated
            assert array.tobytes() == received[name].tobytes()


def test_releases_do_not_change_the_training(
    federation: Callable[..., Any], tmp_path: Path
) -> None:
    plain, _, _ = federation("small")
    random.seed(0)
    expected = FedAvg().start(grid=plain, initial_arrays=to_record(initial_arrays()), num_rounds=3)
    grid, _, _ = federation("small", app=make_app(tmp_path / "another store"))
    result = _train(grid, AutomaticReleases(ReleaseRule(every=1), _Recorder()), rounds=3)
    for name, array in expected.arrays.items():
        assert result.arrays[name].numpy().tobytes() == array.numpy().tobytes()
    kinds = [[e.kind for e in g.ledger.entries] for g in (plain, grid)]
    assert kinds[0] == kinds[1]


def test_the_clients_metric_decides(federation: Callable[..., Any]) -> None:
    """`norm` falls from round to round, see `support.federation.local_step`."""
    grid, _, _ = federation("balanced")
    releases = AutomaticReleases(
        ReleaseRule(metric="norm", improve=1e-9, lower_is_better=True), _Recorder()
    )
    result = _train(grid, releases, rounds=3)
    norms = {n: m["norm"] for n, m in result.evaluate_metrics_clientapp.items()}
    assert norms[1] > norms[2] > norms[3]
    assert [r.round for r in releases.made] == [1, 2, 3]
    assert releases.made[1].metrics["norm"] == norms[2]


def test_the_servers_metric_comes_before_the_clients(federation: Callable[..., Any]) -> None:
    grid, _, _ = federation("balanced")

    def measure(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord({"norm": float(server_round), "curve": [1.0, 2.0]})

    releases = AutomaticReleases(ReleaseRule(metric="norm", reach=3.0), _Recorder())
    result = _train(grid, releases, evaluate_fn=measure)
    assert [(r.round, r.metrics["norm"]) for r in releases.made] == [(3, 3.0)]
    assert "curve" not in releases.made[0].metrics
    assert result.evaluate_metrics_serverapp[4]["norm"] == 4.0


def test_a_release_that_fails_is_tried_again(federation: Callable[..., Any]) -> None:
    grid, _, _ = federation("balanced")
    recorder = _Recorder()
    recorder.fail = 1
    releases = AutomaticReleases(ReleaseRule(every=2), recorder)
    result = _train(grid, releases, rounds=4)
    assert result.arrays is not None
    assert [(r.round, r.reason) for r in releases.made] == [
        (3, "round 2, one of every 2"),
        (4, "round 4, one of every 2"),
    ]


def test_a_metric_that_nobody_measures_is_found_in_the_first_round(
    federation: Callable[..., Any],
) -> None:
    grid, _, _ = federation("balanced")
    releases = AutomaticReleases(ReleaseRule(metric="acuracy", reach=0.5), _Recorder())
    with pytest.raises(ReleaseRuleError, match="choose one of norm"):
        _train(grid, releases)


# by the run config


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A run config whose repository has its offline keys elsewhere."""
    circle = Circle(tmp_path / "circle")
    repository = circle.found(tmp_path / "served")
    circle.online("host", "robot")
    change = Change(delegate={"robot": ["toy"]}, add={"robot": circle.keys("host.robot")})
    circle.change(repository, change, "alice", "bob")
    save_graph(classifier_graph(), tmp_path / "graph.onnx")
    (tmp_path / "selftest.npz").write_bytes(pack_arrays({"input": classifier_inputs()}))
    return {
        "release.repository": str(repository.path),
        "release.keys": str(circle.folder / "host"),
        "release.name": "toy",
        "release.selftest": str(tmp_path / "selftest.npz"),
        "release.graph": str(tmp_path / "graph.onnx"),
        "release.every": 2,
    }


def _factory() -> Any:
    from support.torch_classifier import Classifier

    return Classifier()


def test_the_ready_server_app_releases_as_it_trains(config: dict[str, Any], tmp_path: Path) -> None:
    run_config = {
        **config,
        "model": "support.torch_classifier:Classifier",
        "evaluate": "support.torch_classifier:spread",
        "num-server-rounds": 4,
        "release.metric": "spread",
        "release.reach": 1e9,
        "output": str(tmp_path / "final.model"),
    }
    inner = InProcessGrid(make_app(tmp_path / "store"), 3, run_id=RUN_ID)
    context = Context(RUN_ID, 0, {}, RecordDict(), run_config)
    server_app.app(inner, context)
    repository = Repository(config["release.repository"], None)
    manifests = [repository.show("toy", e.version) for e in repository.releases()]
    assert [m.version for m in manifests] == [1, 2]
    assert all(m.metrics["spread"] > 0 for m in manifests)
    assert [p.base_version for p in manifests[1].patches] == [1]
    from prunecast.compression.versions import load_model

    final = load_model(tmp_path / "final.model")
    assert manifests[1].model_digest == final.digest.hex()


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_a_release_that_a_fleet_stands_on_outlives_the_window(
    config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, variant: str
) -> None:
    repository = Repository(config["release.repository"], None)
    url = f"sqlite:///{tmp_path / 'fleet.db'}"
    FleetService.create(url, list).close()
    remember_fleet(repository.path, url)
    inner = InProcessGrid(make_app(tmp_path / "store"), 2, run_id=RUN_ID)
    run_config = {
        **config,
        "model": "support.torch_classifier:Classifier",
        "release.variant": variant,
        "release.window": 1,
        "release.every": 1,
    }

    def run(rounds: int) -> list[int]:
        context = Context(RUN_ID, 0, {}, RecordDict(), {**run_config, "num-server-rounds": rounds})
        server_app.app(inner, context)
        return [entry.version for entry in repository.releases()]

    assert run(1) == [1]
    with FleetService(url, lambda: [Release("toy", 1)]) as fleet:
        fleet.operate(AddGroup(at=0, group="lab", release="toy", stable=1))
    assert run(2) == [1, 3]
    assert "Release 1 stays live outside the window: group lab has it as its stable" in caplog.text


def test_the_newest_release_is_what_an_improvement_is_measured_from(
    config: dict[str, Any], graph: ExportedGraph, model: Any, images: np.ndarray
) -> None:
    keys = KeyRing(config["release.keys"])
    publish_model(
        Repository(config["release.repository"], keys),
        "toy",
        model(1),
        graph,
        selftest_inputs=images,
        metrics={"accuracy": 0.9},
    )
    config = {**config, "release.every": 0, "release.metric": "accuracy", "release.improve": 0.05}
    releases = releases_from_config(config, _factory)
    assert releases is not None
    for number, accuracy in ((1, 0.85), (2, 0.94), (3, 0.96)):
        releases.after_round(number, {"accuracy": accuracy}, lambda: model(2))
    assert [(r.round, r.version) for r in releases.made] == [(3, 2)]


@pytest.mark.parametrize("variant", ["fp32", "int8", "int8-qdq", "structured"])
@pytest.mark.parametrize("source", ["module", "graph"])
def test_every_variant_comes_by_itself(
    config: dict[str, Any], tmp_path: Path, variant: str, source: str
) -> None:
    images = np.random.default_rng(9).random((40, 1, 6, 6))
    labels = np.arange(40) % 3
    np.savez(tmp_path / "samples.npz", x=images, labels=labels)
    del config["release.selftest"], config["release.graph"]
    config |= {
        "release.every": 1,
        "release.variant": variant,
        "release.calibration": str(tmp_path / "samples.npz"),
        "release.graph-cache": str(tmp_path / "graphs"),
        "release.licence": "MIT",
    }
    if source == "graph":  # as `release create --save-graph` keeps it
        recipe = ReleaseRecipe(
            module=narrowable.make,
            samples=Samples({"x": images}, labels),
            variant=variant,
            cache=tmp_path / "graphs",
        )
        exported = recipe.make(_narrowable(1)).exported
        assert exported is not None
        save_graph(exported, tmp_path / "narrowable.onnx")
        config["release.graph"] = str(tmp_path / "narrowable.onnx")
    releases = releases_from_config(config, narrowable.make)
    assert releases is not None
    for number in (1, 2):
        made = releases.after_round(number, {"accuracy": number / 4}, partial(_narrowable, number))
        assert made is not None
        assert made.version == number
    repository = Repository(config["release.repository"], None)
    first, second = (repository.show("toy", number) for number in (1, 2))
    assert [m.kind for m in (first, second)] == [variant] * 2
    assert [p.base_version for p in second.patches] == [1]
    assert second.metrics["accuracy"] == 0.5
    assert second.licence == "MIT"
    assert second.numerics["samples"] == 40
    assert {"accuracy", "reference_accuracy", "classes_changed"} <= set(second.numerics)
    assert first.files["model.onnx"] == second.files["model.onnx"]
    same = second.model_digest == _narrowable(2).digest.hex()
    assert same == (variant in ("fp32", "int8"))
    assert len(verify_repository(repository, repository.trusted_root())) == 2


def _narrowable(number: int) -> PublishedModel:
    arrays = {name: tensor.numpy() for name, tensor in narrowable.weights(number).items()}
    return from_arrays(arrays, bits=8, counter=number)


def test_no_repository_means_no_releases() -> None:
    assert releases_from_config({"lr": 0.1}, _factory) is None
    off = {"release.repository": "", "release.every": 0, "release.reach": ""}
    assert releases_from_config(off, _factory) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"release.repository": ""}, "set release.repository"),
        ({"release.keys": ""}, "release.keys is missing"),
        ({"release.keys": "nowhere"}, "release.repository = .*robot.pem is not in nowhere"),
        ({"release.name": "other"}, "keys change --delegate"),
        ({"release.selftest": "nowhere.npz"}, "release.selftest = 'nowhere.npz'"),
        ({"release.graph": "nowhere.onnx"}, "release.graph = 'nowhere.onnx'"),
        ({"release.every": 2.5}, "release.every = 2.5 in the run config is no int"),
        ({"release.variant": "int4"}, "release.variant = 'int4': must be fp32, int8"),
        ({"release.variant": "int8-qdq"}, "release.calibration = '': is missing"),
        ({"release.channels": 0.5}, "release.channels = 0.5: the graph has all channels"),
        (
            {"release.graph": "", "release.variant": "structured"},
            "release.calibration = '': is missing",
        ),
        ({"release.calibration": "nowhere.npz"}, "release.calibration = 'nowhere.npz'"),
        ({"release.selftest": ""}, "release.selftest = '': a release needs inputs"),
        ({"release.evry": 2}, "unknown run config key release.evry"),
        ({"release.reach": 0.5}, "set release.metric"),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_training(
    config: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ReleaseRuleError, match=message):
        releases_from_config({**config, **changed}, _factory)


def test_a_model_that_cannot_be_exported_is_refused_before_training(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config |= {"release.graph": "", "release.graph-cache": str(tmp_path / "graphs")}
    with pytest.raises(ReleaseRuleError, match="makes a dict, not a torch module"):
        releases_from_config(config, dict)  # type: ignore[arg-type]


class _Narrowing(_Recorder):
    """Cannot be told of fewer channels the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[ChannelPlan] = []

    def narrow(self, removed: ChannelPlan) -> _Narrowing:
        if self.fail:
            self.fail -= 1
            raise ExportError("cannot be exported")
        self.told.append(removed)
        return self


def test_a_narrow_module_that_cannot_be_exported_is_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder, plan = _Narrowing(), ChannelPlan({}, share=0.5)
    releases = AutomaticReleases(ReleaseRule(every=1), recorder)
    recorder.fail = 1
    releases.narrow(plan)  # nothing yet
    made = [releases.after_round(n, {}, partial(_narrowable, n)) for n in (1, 2, 3)]
    assert [found.version if found else None for found in made] == [None, 1, 2]
    assert "No release after round 1, trying again: cannot be exported" in caplog.text
    assert recorder.told == [plan]
