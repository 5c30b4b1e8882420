"""Every family of models, dense and compressed, for a few rounds in this process."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from prunecast.client.training.store import NodeStore
from prunecast.compression.versions import load_model
from prunecast.server.federation import Ledger
from prunecast.simulations.data import DATA, DataError
from prunecast.simulations.runner.delivery import deliver
from prunecast.simulations.runner.federate import run_arms, simulated_client
from prunecast.simulations.runner.inprocess import InProcessGrid
from prunecast.simulations.runner.prepared import PreparedRun, prepare
from prunecast.simulations.runner.run import build_arms, check_scenario
from prunecast.simulations.scenarios import (
    ScenarioError,
    load_scenario,
    packaged_scenarios,
    scenario_from_mapping,
)
from prunecast.simulations.tasks import TASKS

CLIENTS, ROUNDS, RUN_ID = 3, 3, 1
SMALL = {"pruning_begin": 1, "pruning_end": 3, "sparsity": 0.5}

# Of the packaged scenario of each family, what is changed so that three rounds take seconds.
IMAGES = ("lenet", "cnn", "resnet-batch", "resnet-group", "autoencoder")
SYNTHETIC = {
    "lstm": {"count": 300, "held_out": 60},
    "transformer": {"count": 300, "held_out": 60},
    "lora": {"count": 300, "held_out": 60},
    "graph": {"count": 15, "held_out": 12},
    "ratings": {"count": 6500, "held_out": 500},
    "sensors": {"count": 700, "held_out": 100},
    "logistic": {"count": 700, "held_out": 100},
    "mlp": {"count": 700, "held_out": 100},
}
DELIVERED = ("autoencoder", "graph", "lora", "lstm", "ratings", "sensors", "transformer")


def shrunken(name, digits):
    """The packaged scenario as a mapping, with three clients and few examples."""
    mapping = load_scenario(name).to_mapping()
    if name in IMAGES:
        mapping["data"] = {"source": "npz", "path": str(digits), "held_out": 60}
    else:
        mapping["data"] |= SYNTHETIC[name]
    if mapping["partition"]["kind"] == "dirichlet":  # three rounds are few for skewed ones
        mapping["partition"] = {"kind": "iid"}
    mapping |= {"rounds": ROUNDS, "clients": {"count": CLIENTS}, "engine": {"backend": "inline"}}
    preset = mapping["arms"]["prunecast"]["preset"]
    stated = mapping["arms"]["prunecast"]["policy"]
    policy = SMALL if preset == "small" and "sparsity" not in stated else stated
    mapping["arms"] = {
        "dense": {"kind": "dense"},
        "small": {"kind": "prunecast", "preset": preset, "policy": policy},
    }
    return mapping


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> Callable[[str], tuple[PreparedRun, list[dict[str, Any]]]]:
    """A function: the name of a family -> its run, and what its arms gave; made once."""

    @cache
    def trained(name):
        release = {"release": {"name": name}} if name in DELIVERED else {}
        scenario = scenario_from_mapping(shrunken(name, digits) | release)
        prepared = prepare(scenario, tmp_path_factory.mktemp(name), check_scenario(scenario))
        grid = InProcessGrid(simulated_client(prepared), CLIENTS, run_id=RUN_ID)
        return prepared, run_arms(grid, prepared, lambda event: None)

    return trained


def test_every_family_has_a_scenario():
    assert {*IMAGES, *SYNTHETIC} <= set(packaged_scenarios())
    for name in (*IMAGES, *SYNTHETIC):
        assert load_scenario(name).description


@pytest.mark.parametrize("name", [*IMAGES, *SYNTHETIC])
def test_a_family_trains_and_travels(name, trained):
    prepared, (dense, small) = trained(name)
    task = prepared.scenario.task
    for arm in (dense, small):
        assert [row["round"] for row in arm["rounds"]] == list(range(ROUNDS + 1))
        figures = [row[key] for row in arm["rounds"] for key in (task.metric, "loss")]
        assert all(math.isfinite(figure) for figure in figures)
        assert arm["rounds"][-1]["loss"] < arm["rounds"][0]["loss"], arm["name"]
    first, last = dense["rounds"][0][task.metric], dense["rounds"][-1][task.metric]
    assert last < first if task.lower_is_better else last > first

    for arm in (dense, small):
        entries = list(Ledger.read(prepared.ledger(arm["name"])))
        assert len(entries) == 2 * CLIENTS * ROUNDS
        for way in ("up", "down"):
            counted = sum(entry.payload_bytes for entry in entries if entry.direction == way)
            assert counted == arm["rounds"][-1][f"bytes_{way}"] > 0
    spent = {
        arm["name"]: arm["rounds"][-1]["bytes_up"] + arm["rounds"][-1]["bytes_down"]
        for arm in (dense, small)
    }
    assert spent["dense"] / spent["small"] > 1.0

    # nodes trained what was published after the last round but one
    published = load_model(prepared.work / "small-1.model")
    for node in range(1, CLIENTS + 1):
        held = NodeStore(prepared.store, RUN_ID, node).held("arrays")
        assert held is not None
        assert held.digest == published.digest
    # masks of large tensors may end where lattice cells end
    sparsity = small["rounds"][-1]["sparsity"]
    assert 0.45 < sparsity < 0.67 if name not in ("ratings", "logistic") else sparsity == 0.0


@pytest.mark.engine
@pytest.mark.parametrize("name", DELIVERED)
def test_a_device_answers_what_the_server_does(name, trained):
    prepared, _ = trained(name)
    scenario, release = prepared.scenario, deliver(prepared)
    assert release["identical_examples"] == release["examples"] == scenario.data.held_out
    metric = scenario.task.metric
    assert release[f"device_{metric}"] == pytest.approx(release[f"published_{metric}"], rel=1e-4)
    assert release["patch_bytes"] < release["keyframe_bytes"] < release["onnx_bytes"]
    if name == "lora":  # the base is a constant of the graph: weights are adapters and head
        assert release["weights_bytes"] < 0.1 * release["onnx_bytes"]


@pytest.mark.parametrize("shape", ["sequences", "graphs", "ratings", "sensors", "tables"])
def test_made_up_examples_are_the_same_every_time(shape):
    one, two, other = (
        DATA.make("synthetic", shape=shape, count=40, seed=seed).read() for seed in (3, 3, 4)
    )
    for name, values in one.inputs.items():
        assert values.tobytes() == two.inputs[name].tobytes()
        assert len(values) == len(one.targets) == 40
    assert one.targets.tobytes() == two.targets.tobytes()
    assert one.targets.tobytes() != other.targets.tobytes()


def test_made_up_graphs_are_normalised_and_symmetric():
    graphs = DATA.make("synthetic", shape="graphs", count=5).read().inputs["adjacency"]
    assert np.array_equal(graphs, graphs.transpose(0, 2, 1))
    linked = graphs > 0
    degree = linked.sum(2)
    assert linked[:, np.arange(60), np.arange(60)].all()
    expected = linked / np.sqrt(degree[:, :, None] * degree[:, None, :])
    np.testing.assert_allclose(graphs, expected, rtol=1e-6)


def test_made_up_sequences_say_the_next_token():
    found = DATA.make("synthetic", shape="sequences", count=5).read()
    assert np.array_equal(found.inputs["tokens"][:, 1:], found.targets[:, :-1])
    assert 0 <= found.targets.min() <= found.targets.max() < 32


class Silent(TASKS.find("classification")):
    """A task that cannot tell what a device answers."""

    def different(self, server, device):
        raise NotImplementedError


class Suspicious(TASKS.find("classification")):
    """A task for which no answer is as good as another."""

    def different(self, server, device):
        return np.arange(len(server))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("Silent", r"cannot compare what a device answers \(NotImplementedError\); mend its"),
        ("Suspicious", r"finds \d+ of \d+ answers other than themselves; mend its method"),
    ],
)
def test_a_task_that_cannot_compare_answers_is_refused_where_there_is_a_release(digits, kind, said):
    mapping = shrunken("lenet", digits) | {"task": {"kind": f"{__name__}:{kind}"}}
    check_scenario(scenario_from_mapping(mapping))
    with pytest.raises(ScenarioError, match=said) as caught:
        check_scenario(scenario_from_mapping(mapping | {"release": {}}))
    assert caught.value.key == "task.kind"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("ratings", {"items": 299}, r"'item' reaches from 0 to 299, .* set in model\.options how"),
        ("lstm", {"vocabulary": 31}, r"'tokens' reaches from 0 to 31, for which the model has no"),
        ("transformer", {"steps": 16}, r"cannot be trained on: .*make data and model fit"),
        ("graph", {"features": 8}, r"features float32\[1, 60, 16\].*cannot be trained on"),
        ("graph", {"classes": 3}, r"labels reach from 0 to 3, and the model has 3 outputs"),
        ("autoencoder", {"shape": [28, 28]}, r"\[28, 28\] for an input of \[1, 28, 28\]: return"),
        ("sensors", {"channels": 3}, r"\[16, 6, 64\]\) cannot be trained on"),
        ("mlp", {"classes": 2}, r"labels reach from 0 to 2, and the model has 2 outputs"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_before_training(name, options, said, digits):
    mapping = shrunken(name, digits)
    mapping["model"]["options"] = options
    with pytest.raises(DataError, match=said):
        check_scenario(scenario_from_mapping(mapping))


@pytest.mark.engine
def test_channels_that_went_are_told_of_the_result_and_of_the_device(digits, tmp_path):
    mapping = load_scenario("mobile").to_mapping()
    mapping |= {
        "data": {"source": "npz", "path": str(digits), "held_out": 60},
        "rounds": ROUNDS,
        "clients": {"count": CLIENTS},
        "engine": {"backend": "inline"},
    }
    mapping["model"]["options"] = {"width": 0.25, "classes": 3}
    mapping["arms"]["mobile"]["policy"] |= {"channels_at": [2], "pruning_begin": 2}
    scenario = scenario_from_mapping(mapping)
    prepared = prepare(scenario, tmp_path, check_scenario(scenario))
    grid = InProcessGrid(simulated_client(prepared), CLIENTS, run_id=RUN_ID)
    outcomes = run_arms(grid, prepared, lambda event: None)
    pruning = build_arms(prepared, outcomes)["mobile"]["pruning"]
    parameters = pruning["parameters"]
    assert parameters["stored"] < 0.25 * parameters["original"]  # of two fifths of the channels
    assert pruning["efficiency"] > 0.75
    gains = deliver(prepared)["gains"]
    before, after = gains["before"], gains["after"]
    assert gains["structured"]
    assert after["macs"] == pruning["macs"] < 0.3 * before["macs"]
    assert after["onnx_bytes"] < 0.4 * before["onnx_bytes"]
    assert gains["int8"] == "int8-qdq"
    assert min(before["int8"]["ms"], after["int8"]["ms"]) > 0
    assert (pruning["before"]["round"], pruning["after"]["round"]) == (1, ROUNDS)
