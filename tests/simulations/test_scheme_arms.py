"""Arms whose updates travel by a scheme of the literature, beside dense and prunecast arms."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from prunecast.common.references import load_callable
from prunecast.compression.schemes.registry import SCHEMES
from prunecast.server.federation import Ledger
from prunecast.simulations.arms.majority_vote import MajorityVote
from prunecast.simulations.arms.masks import coded_masks, decoded_masks, posterior
from prunecast.simulations.runner.federate import run_arms, simulated_client
from prunecast.simulations.runner.inprocess import InProcessGrid
from prunecast.simulations.runner.prepared import PreparedRun, prepare
from prunecast.simulations.runner.run import build_arms
from prunecast.simulations.scenarios import ScenarioError, scenario_from_mapping
from support.federation import to_record


def with_arms(tiny: dict[str, Any], **arms: dict[str, Any]) -> dict[str, Any]:
    mapping = copy.deepcopy(tiny)
    mapping["arms"] = arms
    return mapping


def run_inline(mapping: dict[str, Any], folder: Path) -> tuple[PreparedRun, dict[str, Any]]:
    prepared = prepare(scenario_from_mapping(mapping), folder)
    grid = InProcessGrid(simulated_client(prepared), num_nodes=prepared.scenario.clients.count)
    outcomes = run_arms(grid, prepared, lambda event: None)
    return prepared, build_arms(prepared, outcomes)


def test_every_scheme_trains_as_an_arm(tiny: dict[str, Any], tmp_path: Path) -> None:
    arms: dict[str, dict[str, Any]] = {"dense": {"kind": "dense"}}
    for name in SCHEMES:
        arms[name] = {"kind": "scheme", "scheme": name}
    arms["signsgd"]["options"] = {"step": 0}
    arms["topk"]["options"] = {"density": 0.1}
    arms["stc"]["options"] = {"density": 0.1}
    prepared, results = run_inline(with_arms({**tiny, "rounds": 2}, **arms), tmp_path)
    dense = results["dense"]
    for name in SCHEMES:
        arm = results[name]
        assert (arm["kind"], arm["scheme"]) == ("scheme", name)
        assert set(arm["by_kind"]["down"]) == {"dense"}
        assert set(arm["by_kind"]["up"]) == {name}
        # the same model down, with an instruction; the update alone is small
        assert 0 < arm["bytes_down"] - dense["bytes_down"] < 600 * 6
        assert arm["bytes_up"] < {"fp16": 0.55, "int8": 0.3}.get(name, 0.2) * dense["bytes_up"]
        assert arm["rounds"][0]["loss"] == dense["rounds"][0]["loss"]
        assert arm["encode_ms"] > 0
        assert arm["decode_ms"] > 0
        entries = list(Ledger.read(prepared.ledger(name)))
        assert sum(e.dense_bytes for e in entries) == dense["bytes_up"] + dense["bytes_down"]
    # fp16 and int8 hardly change what is learnt
    for name in ("fp16", "int8"):
        assert results[name]["loss"] == pytest.approx(dense["loss"], rel=0.02)


def test_two_runs_agree_and_error_feedback_is_kept(tiny: dict[str, Any], tmp_path: Path) -> None:
    options = {"density": 0.05}
    arms = {
        "stc": {"kind": "scheme", "scheme": "stc", "options": options},
        "forgets": {
            "kind": "scheme",
            "scheme": "stc",
            "options": {**options, "error_feedback": False},
        },
        "qsgd": {"kind": "scheme", "scheme": "qsgd", "options": {"coding": "prunecast"}},
    }
    runs = [run_inline(with_arms(tiny, **arms), tmp_path / place)[1] for place in ("a", "b")]
    losses = [{n: [r["loss"] for r in arm["rounds"]] for n, arm in run.items()} for run in runs]
    assert losses[0] == losses[1]
    # the first updates are the same, what was kept tells from then on
    kept, lost = losses[0]["stc"], losses[0]["forgets"]
    assert kept[:2] == lost[:2]
    assert kept[2:] != lost[2:]


def test_scheme_arms_mix_with_drawn_models_and_recodings(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    mapping = {**tiny, "rounds": 1}
    mapping["arms"] = {**tiny["arms"], "stc": {"kind": "scheme", "scheme": "stc"}}
    _, results = run_inline(mapping, tmp_path)
    assert list(results) == ["dense", "dense-zstd", "prunecast", "stc"]
    first = {arm["rounds"][0]["loss"] for arm in results.values()}
    assert len(first) == 1
    assert results["stc"]["reduction"] > 1


def test_both_directions_cost_what_travels(tiny: dict[str, Any], tmp_path: Path) -> None:
    options = {"density": 0.05}
    arms = {
        "dense": {"kind": "dense"},
        "up": {"kind": "scheme", "scheme": "stc", "options": options},
        "both": {"kind": "scheme", "scheme": "stc", "options": options, "directions": "both"},
    }
    prepared, results = run_inline(with_arms(tiny, **arms), tmp_path)
    both = results["both"]
    # the first model is drawn from a seed; afterwards the change alone travels
    assert set(both["by_kind"]["down"]) == {"keyframe", "scheme"}
    assert both["bytes_down"] < 0.02 * results["up"]["bytes_down"]
    assert both["bytes_up"] == pytest.approx(results["up"]["bytes_up"], rel=0.05)
    assert both["rounds"][0]["loss"] == results["dense"]["rounds"][0]["loss"]
    assert both["rounds"][1]["loss"] != results["up"]["rounds"][1]["loss"]  # of what clients hold
    entries = [e for e in Ledger.read(prepared.ledger("both")) if e.direction == "down"]
    assert sum(e.payload_bytes for e in entries) == both["bytes_down"]


def test_mappings_come_back_the_same(tiny: dict[str, Any]) -> None:
    arm = {"kind": "scheme", "scheme": "topk", "options": {"momentum": 0.9}}
    arm |= {"directions": "up", "down_options": {}}
    scenario = scenario_from_mapping(with_arms(tiny, ours=arm))
    assert scenario.to_mapping()["arms"] == {"ours": arm}
    assert scenario_from_mapping(scenario.to_mapping()) == scenario


@pytest.mark.parametrize(
    ("arm", "key", "says"),
    [
        ({"scheme": "zip"}, "arms.ours.scheme", "choose one of fp16"),
        ({}, "arms.ours.scheme", "choose one of"),
        ({"scheme": "stc", "options": {"density": 7}}, "arms.ours.options", "density"),
        ({"scheme": "stc", "options": {"speed": 7}}, "arms.ours.options", "no option 'speed'"),
        ({"scheme": "stc", "preset": "small"}, "arms.ours.preset", "means nothing"),
        ({"scheme": 3}, "arms.ours.scheme", "string"),
        ({"scheme": "stc", "options": 3}, "arms.ours.options", "table"),
        ({"scheme": "stc", "directions": "down"}, "arms.ours.directions", "choose one of both, up"),
        ({"scheme": "stc", "down_options": {"density": 1}}, "arms.ours.down_options", "directions"),
    ],
)
def test_mistakes_are_named(tiny: dict[str, Any], arm: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        scenario_from_mapping(with_arms(tiny, ours={"kind": "scheme", **arm}))
    assert key in str(caught.value)
    assert says in str(caught.value)


def test_a_dense_arm_takes_no_scheme(tiny: dict[str, Any]) -> None:
    with pytest.raises(ScenarioError, match=r"arms\.ours\.scheme"):
        scenario_from_mapping(with_arms(tiny, ours={"kind": "dense", "scheme": "stc"}))


def test_a_majority_moves_every_weight_by_the_step(tiny: dict[str, Any], tmp_path: Path) -> None:
    arms = {"dense": {"kind": "dense"}, "vote": {"kind": "majority-vote", "step": 0.002}}
    prepared, results = run_inline(with_arms({**tiny, "rounds": 4}, **arms), tmp_path)
    vote, dense = results["vote"], results["dense"]
    assert set(vote["by_kind"]["down"]) == {"keyframe", "scheme"}
    assert set(vote["by_kind"]["up"]) == {"signsgd"}
    weights = dense["bytes_up"] / 3 / 4 / 4  # three clients, four rounds, four bytes
    for direction, rounds in (("up", 4), ("down", 3)):
        sums = vote["by_kind"][direction]["signsgd" if direction == "up" else "scheme"]
        assert sums["bytes"] / 3 / rounds == pytest.approx(weights / 8, rel=0.05)
    assert vote["rounds"][-1]["loss"] < vote["rounds"][0]["loss"]
    assert "majority-vote" in prepared.scenario.to_mapping()["arms"]["vote"]["kind"]


def test_votes_are_counted_and_statistics_averaged() -> None:
    grid = InProcessGrid({}, num_nodes=0)  # messages are of its run
    sent = {"w": np.float32([0, 0, 0, 1]), "bn.running_var": np.float32([1])}
    wanted = [[1, -2, 3, 1.5], [9, -1, -1, 0.5], [-1, -3, -9, 2]]
    content = [
        {"w": np.float32(w), "bn.running_var": np.float32([k])} for k, w in enumerate(wanted)
    ]
    replies = []
    for arrays in content:
        metrics = MetricRecord({"num-examples": 1})
        replies.append(
            Message(RecordDict({"arrays": to_record(arrays), "metrics": metrics}), 1, "train")
        )
    strategy = MajorityVote(step=0.5, decay=0.5).strategy(
        FedAvg(fraction_train=0, min_train_nodes=0, min_available_nodes=0)
    )
    strategy.configure_train(2, to_record(sent), ConfigRecord(), grid)
    merged, _ = strategy.aggregate_train(2, replies)
    assert merged["w"].numpy().tolist() == [0.25, -0.25, -0.25, 1.25]
    assert merged["bn.running_var"].numpy().tolist() == [1]


def test_masks_over_frozen_weights_are_learnt(tiny: dict[str, Any], tmp_path: Path) -> None:
    arms = {"dense": {"kind": "dense"}, "masks": {"kind": "masks"}}
    mapping = with_arms({**tiny, "rounds": 4}, **arms)
    prepared, results = run_inline(mapping, tmp_path / "a")
    masks, dense = results["masks"], results["dense"]
    # about a bit for each weight up, with the message around it; a float down
    assert masks["bytes_up"] < 1.02 * dense["bytes_up"] / 32
    assert masks["bytes_down"] == pytest.approx(dense["bytes_down"], rel=0.01)
    losses = [row["loss"] for row in masks["rounds"]]
    assert min(losses[1:]) < 0.9 * losses[0]
    again = run_inline(mapping, tmp_path / "b")[1]["masks"]
    assert [row["loss"] for row in again["rounds"]] == losses
    types = {e.message_type for e in Ledger.read(prepared.ledger("masks"))}
    assert types == {"train.masks"}


def test_masks_lie_over_the_network_that_its_options_make(tiny):
    options = {"mean": 0.1307, "deviation": 0.3081}  # a layer before the others, so other names
    model = {"factory": "prunecast.simulations.networks.convolutional:cnn", "options": options}
    scenario = scenario_from_mapping({**with_arms(tiny, masks={"kind": "masks"}), "model": model})
    module = scenario.model.network()()
    found = scenario.arms["masks"].initial(ArrayRecord(module.state_dict()), scenario)
    assert list(found) == list(module.state_dict())
    assert {float(found["1.weight"].numpy().ravel()[0]), found["1.bias"].numpy()[0]} == {0.5, 0.0}


@pytest.mark.parametrize("kind", ["masks", "majority-vote"])
def test_running_statistics_are_averaged(tiny: dict[str, Any], tmp_path: Path, kind: str) -> None:
    factory = {"factory": "support.networks:normalised"}
    mapping = with_arms({**tiny, "rounds": 2, "model": factory}, ours={"kind": kind})
    _, results = run_inline(mapping, tmp_path)
    assert np.isfinite([row["loss"] for row in results["ours"]["rounds"]]).all()


def test_masked_weights_are_frozen_ones_or_zero(tiny: dict[str, Any]) -> None:
    scenario = scenario_from_mapping(with_arms(tiny, masks={"kind": "masks"}))
    arm = scenario.arms["masks"]
    module = load_callable(scenario.model.factory)()
    begun = arm.initial(ArrayRecord(module.state_dict()), scenario)
    assert np.unique(begun["2.weight" if "2.weight" in begun else "0.weight"].numpy()) == [0.5]
    assert not begun["0.bias"].numpy().any()
    sizes = []
    for number in (1, 2):
        weights = arm.weights(begun, scenario, number)["0.weight"].numpy()
        fan_in = np.prod(weights.shape[1:])
        assert set(np.unique(np.abs(weights))) == {0, np.float32(np.sqrt(2 / fan_in))}
        sizes.append(weights)
    kept = (sizes[0] != 0) & (sizes[1] != 0)
    assert np.array_equal(sizes[0][kept], sizes[1][kept])  # other masks, the same weights
    assert not np.array_equal(sizes[0], sizes[1])


@pytest.mark.parametrize("chance", [0.02, 0.5])
def test_masks_take_a_bit_or_less_for_each_weight(chance: float) -> None:
    rng = np.random.default_rng(1)
    masks = {"a": rng.random((50, 30)) < chance, "b": rng.random((7, 11, 3)) < chance}
    data = coded_masks(masks)
    assert len(data) <= 1 + (1500 + 231 + 7) // 8
    assert chance == 0.5 or len(data) < 80
    found = decoded_masks(data, {name: mask.shape for name, mask in masks.items()})
    assert all(np.array_equal(found[name], mask) for name, mask in masks.items())


def test_the_posterior_counts_votes_since_the_prior() -> None:
    kept, dropped = np.array([1.0, 3.0, 2.0]), np.array([1.0, 1.0, 6.0])
    assert posterior(kept, dropped).tolist() == [0.5, 1.0, pytest.approx(1 / 6)]
