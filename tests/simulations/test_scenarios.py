"""Scenario files: what is read, and how mistakes are named."""

from __future__ import annotations

import copy
import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from prunecast.simulations.scenarios import (
    ScenarioError,
    load_scenario,
    packaged_scenarios,
    scenario_from_mapping,
)


def test_packaged_scenarios_are_usable():
    assert "demo" in packaged_scenarios()
    for name in packaged_scenarios():
        scenario = load_scenario(name)
        assert scenario.name == name
        assert scenario_from_mapping(scenario.to_mapping()) == scenario


def test_the_demo_compares_and_releases():
    demo = load_scenario("demo")
    assert list(demo.arms) == ["dense", "dense-zstd", "prunecast"]
    assert list(demo.trained_arms()) == ["dense", "prunecast"]
    assert list(demo.recodings_of("dense")) == ["dense-zstd"]
    assert demo.released_arm() == "prunecast"
    assert (demo.clients.count, demo.partition.alpha, demo.data.held_out) == (10, 0.3, 1000)


# By scenario: data, parameters, clients, those in a round, rounds, epochs, batch, rate, momentum.
PUBLISHED = {
    "niid-mnist": ("mnist", 44_426, 10, 10, 50, 10, 64, 0.01, 0.9),
    "niid-fashion": ("fashion-mnist", 44_426, 10, 10, 50, 10, 64, 0.01, 0.9),
    "tamuna": ("mnist", 1_663_370, 1000, 10, 35, 3, 32, 0.01, 0.0),
    "fedbat-fashion": ("fashion-mnist", 390_880, 100, 10, 100, 10, 64, 0.1, 0.0),
    "fedpm-mnist": ("mnist", 1_933_258, 200, 10, 50, 3, 128, 0.01, 0.9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_those_of_their_sources(name):
    scenario = load_scenario(name)
    trained, training = scenario.clients, scenario.training
    module = scenario.model.network()()
    assert PUBLISHED[name] == (
        scenario.data.name,
        sum(parameter.numel() for parameter in module.parameters()),
        trained.count,
        int(trained.count * trained.fraction),
        scenario.rounds,
        training.epochs,
        training.batch_size,
        training.learning_rate,
        training.momentum,
    )
    assert scenario.data.held_out == "test"
    assert scenario.arms["dense"].baseline


def test_published_figures_are_in_the_scenario():
    figures = {n: f for name in PUBLISHED for n, f in load_scenario(name).published.items()}
    assert figures.keys() == {"fedavg", "tamuna"}
    mnist, fashion = (load_scenario(f"niid-{name}").published for name in ("mnist", "fashion"))
    assert (mnist["fedavg"].value, mnist["fedavg"].spread) == (0.9889, 0.0007)
    assert (fashion["fedavg"].value, fashion["fedavg"].spread) == (0.8809, 0.0029)
    assert mnist["fedavg"].measured == "best"
    weights, sent = 1_663_370, 4 / 10  # of those that a client receives
    assert figures["tamuna"].bytes == round(10 * 4 * 35 * weights * (1 + sent))
    nameless = {"schema": 1, "published": {"x": {"value": 0.9}}}
    with pytest.raises(ScenarioError, match=r"published\.x\.source: is missing; say where"):
        scenario_from_mapping(nameless)


def test_paths_are_relative_to_the_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('schema = 1\n[data]\nsource = "npz"\npath = "mine.npz"\n')
    assert load_scenario(path).data.path == str(tmp_path / "mine.npz")


def test_an_empty_path_does_no_harm_where_no_file_is_read(tiny):
    scenario = scenario_from_mapping({**tiny, "data": {"source": "mnist-5k", "path": ""}})
    assert scenario_from_mapping(scenario.to_mapping()) == scenario
    assert scenario.to_mapping()["data"] == {
        "source": "mnist-5k",
        "held_out": 1000,
        "examples": 0,
    }
    with pytest.raises(ScenarioError, match=r"data\.path: means nothing where source = 'mnist-5k'"):
        scenario_from_mapping({**tiny, "data": {"source": "mnist-5k", "path": "x.npz"}})


def test_the_documented_scenario_is_read():
    text = (Path(__file__).parents[2] / "docs/scenarios.md").read_text()
    found = re.search(r"```toml\n(.*?)```", text, re.S)
    assert found
    scenario = scenario_from_mapping(tomllib.loads(found.group(1)))
    for name, table in scenario.to_mapping().items():
        if isinstance(table, dict) and name != "arms":
            for key in table:
                assert re.search(rf"^(\[{name}\.)?{key}\b", found.group(1), re.M), (name, key)


def change(mapping, key, value):
    changed = copy.deepcopy(mapping)
    *tables, last = key.split("/")
    table = changed
    for name in tables:
        table = table.setdefault(name, {})
    table[last] = value
    return changed


@pytest.mark.parametrize(
    ("key", "value", "named", "said"),
    [
        ("schema", 2, "schema", "reads schema = 1"),
        ("round", 3, "round", "did you mean 'rounds'?"),
        ("rounds", 0, "rounds", "at least 1"),
        ("rounds", "ten", "rounds", "whole number"),
        ("rounds", True, "rounds", "whole number"),
        ("seed", -1, "seed", "at least 0"),
        ("name", "Mine!", "name", "use a-z"),
        ("clients", 3, "clients", r"write \[clients\]"),
        ("clients/count", 1.5, "clients.count", "whole number"),
        ("clients/fraction", 1.5, "clients.fraction", "at most 1"),
        ("partition/kind", "random", "partition.kind", "dirichlet, flower, iid, natural"),
        ("partition/alpha", 0, "partition.alpha", "above 0"),
        ("partition/alpha", float("nan"), "partition.alpha", "finite"),
        ("data/source", "cifar", "data.source", "idx, mnist-5k, named, npz"),
        ("data/held_out", 0, "data.held_out", "at least 1"),
        ("data/held_out", "all", "data.held_out", "a whole number, or 'test'"),
        ("data/held_out", 0.2, "data.held_out", "a whole number"),
        ("data/path", "", "data.path", "source = 'npz'"),
        ("model/factory", "net", "model.factory", "package.module:function"),
        ("model/initial", "zeros", "model.initial", "drawn, factory"),
        ("training/learning_rate", "fast", "training.learning_rate", "a number"),
        ("training/learning_rate_decay", 1.1, "training.learning_rate_decay", "at most 1"),
        ("training/device", "tpu", "training.device", "auto, cpu, cuda"),
        ("engine/backend", "dask", "engine.backend", "inline, ray"),
        ("engine/concurrent", 0, "engine.concurrent", "at least 1"),
        ("engine/address", "ray://head", "engine.address", "HOST:PORT"),
        ("engine/store_bytes", -1, "engine.store_bytes", "at least 0"),
        ("arms/Dense", {"kind": "dense"}, "arms.Dense", "use a-z"),
        ("arms/dense/level", 3, "arms.dense.level", "keys: kind"),
        (
            "arms/dense/kind",
            "sparse",
            "arms.dense.kind",
            "dense, majority-vote, masks, nncodec, prunecast, recoded",
        ),
        ("arms/dense-zstd/of", "prunecast", "arms.dense-zstd.of", "choose one of dense"),
        ("arms/dense-zstd/level", 30, "arms.dense-zstd.level", "at most 22"),
        ("arms", {"a": {"kind": "recoded"}}, "arms", "add an arm"),
        ("release/arm", "dense", "release.arm", "choose one of prunecast"),
        ("release/name", "A b", "release.name", "use a-z"),
        ("release/selftest_images", 0, "release.selftest_images", "at least 1"),
        ("release/every", -1, "release.every", "at least 0"),
        ("release/metric", "f1", "release.metric", "accuracy, loss"),
        ("release/reach", "high", "release.reach", "a number"),
        ("release/improve", 0, "release.improve", "above 0"),
    ],
)
def test_every_mistake_names_its_key_and_the_remedy(tiny, key, value, named, said):
    with pytest.raises(ScenarioError, match=said) as caught:
        scenario_from_mapping(change(tiny, key, value))
    assert caught.value.key == named


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ScenarioError, match=r"cannot read .*or one of: .*\bdemo\b"):
        load_scenario(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("rounds = ")
    with pytest.raises(ScenarioError, match="is not TOML"):
        load_scenario(broken)


def test_schema_must_be_stated():
    with pytest.raises(ScenarioError, match="schema: is missing"):
        scenario_from_mapping({"rounds": 3})


def test_null_says_that_there_are_no_such_tables(tiny):
    del tiny["arms"]
    same = scenario_from_mapping(tiny)
    assert scenario_from_mapping({**tiny, "arms": None, "release": None}) == same


def test_integers_do_for_numbers(tiny):
    scenario = scenario_from_mapping(change(tiny, "partition/alpha", 1))
    assert scenario.partition.alpha == 1.0
    assert dataclasses.replace(scenario, rounds=5).rounds == 5


def test_distillation_needs_outputs_that_are_classes(tiny):
    given = scenario_from_mapping({**tiny, "training": {"distillation": 0.5}})
    assert given.local_training().distillation == 0.5
    assert given.local_training().distillation_temperature == 4.0
    for kind in ("positions", "regression", "rating"):
        with pytest.raises(ScenarioError, match=f"task.kind = '{kind}' .*; set it to 0") as caught:
            scenario_from_mapping(
                {**tiny, "task": {"kind": kind}, "training": {"distillation": 0.5}}
            )
        assert caught.value.key == "training.distillation"
