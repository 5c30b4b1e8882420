"""Simulations without Ray: the arms, the ledgers, the delivery, and that runs repeat."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from prunecast.compression.flower import payload_of
from prunecast.compression.flower.envelope import unpack
from prunecast.server.federation import FederationError, Ledger, read_events
from prunecast.simulations.data import DataError
from prunecast.simulations.report import FIGURE, PAGE, write_report
from prunecast.simulations.runner import (
    DeviceMismatch,
    EngineFailed,
    ResultError,
    SimulationError,
)
from prunecast.simulations.runner.checks import check_data_and_model
from prunecast.simulations.runner.delivery import _compare, _Published
from prunecast.simulations.runner.federate import run_arms, simulated_client
from prunecast.simulations.runner.inprocess import InProcessGrid
from prunecast.simulations.runner.prepared import PreparedRun, prepare
from prunecast.simulations.runner.run import (
    build_arms,
    check_scenario,
    new_run_folder,
    read_result,
    run_scenario,
)
from prunecast.simulations.scenarios import ScenarioError, scenario_from_mapping

NETS = "support.networks"


class Recorder(InProcessGrid):
    """Keeps every payload that passes, in both directions."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.payloads: list[bytes] = []

    def push_messages(self, messages):
        messages = list(messages)
        for message in messages:
            self._note(message)
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        for reply in replies:
            self._note(reply)
        return replies

    def _note(self, message):
        records = unpack(message.content).array_records if message.has_content() else {}
        for record in records.values():
            payload = payload_of(record)
            if payload is not None:
                self.payloads.append(payload)


def run_inline(mapping, folder):
    prepared = prepare(scenario_from_mapping(mapping), folder)
    grid = Recorder(simulated_client(prepared), num_nodes=prepared.scenario.clients.count)
    outcomes = run_arms(grid, prepared, lambda event: None)
    return prepared, grid, outcomes


def test_two_runs_give_the_same_payloads_and_accuracy(tiny, tmp_path):
    runs = [run_inline(tiny, tmp_path / name) for name in ("one", "two")]
    (_, first, ours), (_, second, theirs) = runs
    assert len(first.payloads) == 3 * 2 * 3
    assert first.payloads == second.payloads
    for a, b in zip(ours, theirs, strict=True):
        assert [r["accuracy"] for r in a["rounds"]] == [r["accuracy"] for r in b["rounds"]]
        assert [r["loss"] for r in a["rounds"]] == [r["loss"] for r in b["rounds"]]
        assert [r["bytes_up"] for r in a["rounds"]] == [r["bytes_up"] for r in b["rounds"]]


def test_what_pruning_did_is_counted_and_told_of_before_and_after(tiny, tmp_path):
    tiny["strategy"] = {"name": "fedavg", "options": {"fraction_evaluate": 1.0}}
    tiny["rounds"] = 4
    tiny["arms"]["prunecast"]["policy"] |= {"pruning_begin": 2, "pruning_end": 4}
    prepared, _, outcomes = run_inline(tiny, tmp_path)
    arms = build_arms(prepared, outcomes)
    assert arms["dense-zstd"]["pruning"] is None
    dense, ours = (arms[name]["pruning"] for name in ("dense", "prunecast"))
    assert (dense["before"], dense["recovery_ratio"], dense["cost"]) == (None, None, None)
    assert dense["parameters"]["original"] == dense["parameters"]["stored"] == 409_034
    assert dense["macs"] == ours["macs"] == 1_420_032
    layers = ours["layers"]
    assert sum(layer["parameters"] for layer in layers.values()) == 409_034
    assert sum(layer["nonzero"] for layer in layers.values()) == ours["parameters"]["nonzero"]
    assert sum(layer["effective_macs"] for layer in layers.values()) == ours["effective_macs"]
    assert layers["3.weight"]["macs"] == 196 * 4608
    assert layers["3.bias"]["macs"] == 0
    assert ours["effective_macs"] < ours["macs"]
    assert ours["efficiency"] == pytest.approx(1 - ours["parameters"]["nonzero"] / 409_034)
    assert ours["compression_ratio"] == pytest.approx(1 / (1 - ours["efficiency"]))
    # the last round whose model was dense, and the last of all
    rows = arms["prunecast"]["rounds"]
    assert [row["sparsity"] > 0 for row in rows] == [False, False, True, True, True]
    assert (ours["before"]["round"], ours["after"]["round"]) == (1, 4)
    assert ours["pruning_loss"] == rows[1]["accuracy"] - rows[4]["accuracy"]
    assert ours["recovery_ratio"] == rows[1]["loss"] / rows[4]["loss"]
    assert ours["cost"]["made"] == 5
    assert ours["cost"]["peak_bytes"] > 409_034 // 8
    inference = ours["inference"]
    assert inference["per_second"] == pytest.approx(1e3 / inference["ms"])
    assert inference["estimated_bytes"] == 4 * (409_034 + 784 + 16 * 784)
    assert inference["estimated_joules"]["int8"] < inference["estimated_joules"]["fp32"]
    # each of three nodes counts once
    nodes = ours["after"]["nodes"]["eval-accuracy"]
    assert nodes["nodes"] == 3
    assert 0 <= nodes["mean"] <= 1
    assert nodes["deviation"] >= 0


def test_a_pruned_model_is_taught_by_the_dense_one_that_nodes_held(tiny, tmp_path):
    tiny["training"] |= {"distillation": 0.5, "distillation_temperature": 2.0}
    _, _, outcomes = run_inline(tiny, tmp_path)
    rows = {arm["name"]: arm["rounds"] for arm in outcomes}
    assert [row.get("distilled") for row in rows["dense"]] == [None, 0.0, 0.0, 0.0]
    assert [row.get("distilled") for row in rows["prunecast"]] == [None, 0.0, 1.0, 1.0]
    assert [row["sparsity"] > 0 for row in rows["prunecast"]] == [False, True, True, True]


def test_a_model_that_takes_no_single_example_is_not_counted(tiny, tmp_path):
    tiny["model"] = {"factory": f"{NETS}:together"}
    tiny["arms"] = {"dense": {"kind": "dense"}}
    prepared, _, outcomes = run_inline(tiny, tmp_path)
    assert build_arms(prepared, outcomes)["dense"]["pruning"] is None


def test_another_seed_gives_another_run(tiny, tmp_path):
    _, first, _ = run_inline({**tiny, "rounds": 1}, tmp_path / "one")
    _, second, _ = run_inline({**tiny, "rounds": 1, "seed": 4}, tmp_path / "two")
    assert first.payloads != second.payloads


def test_arms_begin_with_the_same_weights(tiny, tmp_path):
    _, _, outcomes = run_inline({**tiny, "rounds": 1}, tmp_path)
    dense, compressed = outcomes
    assert dense["rounds"][0]["loss"] == compressed["rounds"][0]["loss"]


def test_a_drawn_model_has_a_tiny_keyframe(tiny, tmp_path):
    for initial in ("factory", "drawn"):
        mapping = {**tiny, "rounds": 1, "model": {"initial": initial}}
        prepared, _, _ = run_inline(mapping, tmp_path / initial)
        entries = list(Ledger.read(prepared.ledger("prunecast")))
        keyframe = next(e for e in entries if e.kind == "keyframe")
        assert (keyframe.payload_bytes < 3000) == (initial == "drawn")


def test_sampled_clients_are_the_same_in_every_run(tiny, tmp_path):
    mapping = {**tiny, "rounds": 2, "clients": {"count": 5, "fraction": 0.4}}
    ledgers = []
    for name in ("one", "two"):
        prepared, _, _ = run_inline(mapping, tmp_path / name)
        ledgers.append([(e.round, e.node) for e in Ledger.read(prepared.ledger("dense"))])
    assert ledgers[0] == ledgers[1]
    assert len({node for _, node in ledgers[0]}) > 1


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("fedadam", {"eta": 0.01}), ("fedmedian", {}), ("krum", {"num_malicious_nodes": 0})],
)
def test_other_strategies_run_unchanged(tiny, tmp_path, strategy, options):
    mapping = {**tiny, "rounds": 1, "strategy": {"name": strategy, "options": options}}
    _, _, outcomes = run_inline(mapping, tmp_path)
    assert [len(o["rounds"]) for o in outcomes] == [2, 2]


def test_a_failing_client_fails_the_run(tiny, tmp_path):
    mapping = {**tiny, "training": {**tiny["training"], "learning_rate": 1e30}}
    with pytest.raises(EngineFailed, match=r"arm 'dense', round 1: 3 clients answered with an err"):
        run_inline(mapping, tmp_path)


@pytest.mark.engine
def test_a_run_from_data_to_device(tiny, tmp_path):
    events = []
    scenario = scenario_from_mapping({**tiny, "release": {"name": "tiny", "every": 2}})
    folder = new_run_folder(tmp_path, "tiny")
    result = run_scenario(scenario, folder, on_event=events.append)
    assert read_result(folder) == result
    dense, recoded, ours = (result["arms"][n] for n in ("dense", "dense-zstd", "prunecast"))
    assert dense["reduction"] == 1.0
    assert dense["bytes_up"] > recoded["bytes_up"] > ours["bytes_up"] > 0
    assert dense["bytes_down"] > recoded["bytes_down"] > ours["bytes_down"] > 0
    assert recoded["accuracy"] == dense["accuracy"]
    for arm in (dense, recoded, ours):
        assert [row["round"] for row in arm["rounds"]] == [0, 1, 2, 3]
        assert arm["rounds"][-1]["bytes_up"] == arm["bytes_up"]
        kinds = [k for sums in arm["by_kind"].values() for k in sums.values()]
        assert sum(k["bytes"] for k in kinds) == arm["bytes_up"] + arm["bytes_down"]
    assert ours["sparsity"] == pytest.approx(0.8, abs=0.02)
    ledger = list(Ledger.read(folder / "ledger.jsonl"))
    assert len(ledger) == ours["messages"] == 3 * 3 * 2
    assert sum(e.payload_bytes for e in ledger if e.direction == "up") == ours["bytes_up"]
    assert (folder / "ledger-dense.jsonl").is_file()

    release = result["release"]
    assert release["device_accuracy"] == release["published_accuracy"] == ours["accuracy"]
    assert release["identical_examples"] == release["examples"] == 60
    assert release["patch_bytes"] < release["keyframe_bytes"] < release["onnx_bytes"]
    assert [d["payload"] for d in release["downloads"]] == ["keyframe", "patch"]
    assert release["foreign_modules"] == []
    gains = release["gains"]
    assert gains["before"]["macs"] == gains["after"]["macs"] == ours["pruning"]["macs"]
    assert gains["after"]["nonzero"] < gains["before"]["nonzero"]
    assert gains["after"]["int8"]["ms"] > 0
    [automatic] = release["automatic"]
    assert (automatic["round"], automatic["version"]) == (2, 1)
    assert automatic["metrics"]["accuracy"] == ours["rounds"][2]["accuracy"]
    assert [d["version"] for d in release["downloads"]] == [2, 3]

    told = ["run-started", "round-begun", "round-finished", "release", "run-finished"]
    assert {e["event"] for e in events} - {"warning"} == {"step", *told}
    for arm in ("dense", "prunecast"):  # the same is in the folder
        kept = list(read_events(folder / "events.jsonl", arm))
        heard = [e for e in events if e.get("run") == kept[0]["run"]]
        for event in heard:
            event.pop("score", None)
        assert kept == heard
        reached = [e["metrics"]["accuracy"] for e in kept if e["event"] == "round-finished"]
        assert reached == [row["accuracy"] for row in result["arms"][arm]["rounds"]]
    assert not (folder / "work").exists()
    documented = (Path(__file__).parents[2] / "docs/result.md").read_text()
    pruning = ours["pruning"]
    layer = next(iter(pruning["layers"].values()))
    parts = (*pruning, *pruning["inference"], *pruning["cost"], *layer, *pruning["parameters"])
    for key in [*result, *dense, *recoded, *release, *gains, *dense["rounds"][0], *parts]:
        assert f"`{key}" in documented, key
    figure, page = write_report(folder, result)
    assert (figure.name, page.name) == (FIGURE, PAGE)


@pytest.mark.engine
def test_flowers_engine_gives_what_the_inline_grid_gives(tiny, tmp_path):
    losses = {}
    for backend in ("inline", "ray"):
        mapping = {**tiny, "rounds": 2, "engine": {"backend": backend, "concurrent": 1}}
        folder = new_run_folder(tmp_path, backend)
        result = run_scenario(scenario_from_mapping(mapping), folder)
        losses[backend] = {n: [r["loss"] for r in a["rounds"]] for n, a in result["arms"].items()}
    assert losses["ray"] == losses["inline"]


@pytest.mark.engine
def test_channels_go_in_flowers_engine_then_weights_and_the_device_runs_what_is_left(
    tiny, tmp_path
):
    events = []
    policy = {"channels": 0.5, "channels_at": [1], "pruning_begin": 1, "pruning_end": 3}
    resnet = "prunecast.simulations.networks.residual:small_resnet_batch"
    mapping = {
        **tiny,
        "model": {"factory": resnet, "initial": "drawn"},
        "engine": {"backend": "ray"},
        "arms": {"hybrid": {"kind": "prunecast", "preset": "small", "policy": policy}},
        "release": {"name": "narrow", "every": 1},
    }
    folder = new_run_folder(tmp_path, "tiny")
    result = run_scenario(scenario_from_mapping(mapping), folder, on_event=events.append)
    (removed,) = [event for event in events if event["event"] == "channels-removed"]
    assert removed["weights"][1] < 0.27 * removed["weights"][0]
    arm, release = result["arms"]["hybrid"], result["release"]
    assert arm["sparsity"] == pytest.approx(0.8, abs=0.02)
    assert release["identical_examples"] == release["examples"] == 60
    assert [made["round"] for made in release["automatic"]] == [1, 2, 3]
    assert release["weights_bytes"] < 4 * 1.1 * removed["weights"][1]
    kinds = [e.kind for e in Ledger.read(folder / "ledger.jsonl") if e.direction == "down"]
    assert sorted(kinds) == ["delta"] * 6 + ["keyframe"] * 3


@pytest.mark.engine
def test_a_failing_engine_names_its_log(tiny, tmp_path):
    mapping = {**tiny, "training": {**tiny["training"], "learning_rate": 1e30}}
    folder = new_run_folder(tmp_path, "tiny")
    with pytest.raises(
        EngineFailed,
        match=r"clients answered with an error, the first, client \d: TrainerError: the training "
        r"loss is nan: lower the learning rate.*\(see .*engine\.log\)",
    ):
        run_scenario(scenario_from_mapping(mapping), folder)
    assert "lower the learning rate" in (folder / "engine.log").read_text()
    assert not (folder / "work").exists()


def test_names_are_checked_before_anything_starts(tiny, tmp_path):
    policy = {**tiny["arms"]["prunecast"], "policy": {"up_stride": 3}}
    cases = [
        ({"arms": {**tiny["arms"], "prunecast": policy}}, FederationError, "unknown knob"),
        ({"strategy": {"name": "fedsgd"}}, FederationError, "unknown strategy"),
        ({"strategy": {"name": "fedavg", "options": {"eta": 1}}}, FederationError, "no option"),
        ({"model": {"factory": "nope:net"}}, ValueError, "no module 'nope'"),
        ({"data": {**tiny["data"], "held_out": 240}}, DataError, "there are 240 examples"),
        ({"data": {**tiny["data"], "path": "none.npz"}}, DataError, "cannot read"),
        ({"clients": {"count": 100}}, DataError, r"lower partition\.min_size"),
        ({"clients": {"count": 300}}, DataError, r"180 examples .* 300 clients: lower clients"),
        ({"model": {"factory": f"{NETS}:fails"}}, ScenarioError, "ZeroDivisionError: division"),
        ({"model": {"factory": f"{NETS}:number"}}, ScenarioError, "returns a int; return a torch"),
        ({"model": {"factory": f"{NETS}:pair"}}, DataError, "returns a tuple: return one tensor"),
        ({"model": {"factory": f"{NETS}:two"}}, DataError, "from 0 to 2, and the model has 2 outp"),
    ]
    for change, error, message in cases:
        scenario, folder = scenario_from_mapping({**tiny, **change}), new_run_folder(tmp_path, "x")
        with pytest.raises(error, match=message):
            run_scenario(scenario, folder)
    assert list(tmp_path.iterdir()) == []


LABELS = np.arange(60) % 3
BROKEN = {
    "labels from 1": ({"y": LABELS + 8}, "from 8 to 10, and the model has 10 outputs.*give it 11"),
    "labels from one": (
        {"y": np.arange(60) % 10 + 1}, "from 1 to 10.*subtract 1 from labels that count from 1"
    ),
    "negative labels": ({"y": LABELS - 1}, "count from 0, these from -1: add 1"),
    "float labels": ({"y": LABELS.astype(float)}, r"not float64.*y\.astype\('int64'\)"),
    "rows": ({"y": np.eye(3)[LABELS]}, r"y\.argmax\(axis=1\)"),
    "column": ({"y": LABELS[:, None]}, r"y\[:, 0\]"),
    "texts": ({"y": LABELS.astype(str)}, "return_inverse=True"),
    "another size": ({"x": np.zeros((60, 1, 32, 32))}, r"\[16, 1, 32, 32\]\) cannot be trained"),
    "channels last": ({"x": np.zeros((60, 28, 28, 1))}, "make data and model fit"),
    "no numbers": ({"x": np.full((60, 4), "a"), "dtype": "stored"}, "'x' is <U1: networks"),
    "no examples": ({"x": np.zeros((0, 1, 28, 28)), "y": LABELS[:0]}, "hold no examples"),
    "no such array": ({"targets": "z"}, r"no array 'z', it holds 'x', 'y': .*data\.targets"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_data_that_cannot_be_trained_on_are_refused_before_training(tiny, tmp_path, what):
    change, says = BROKEN[what]
    arrays = {"x": np.zeros((60, 1, 28, 28)), "y": LABELS}
    arrays |= {name: change[name] for name in arrays if name in change}
    np.savez(tmp_path / "data.npz", **arrays)
    keys = {name: value for name, value in change.items() if name not in arrays}
    data = {"source": "npz", "path": str(tmp_path / "data.npz"), "held_out": 9, **keys}
    with pytest.raises(DataError, match=says):
        check_scenario(scenario_from_mapping({**tiny, "data": data}))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.nan, "'x' holds NaN in 2 of 60 examples, the first is example 7"),
        (np.inf, r"of client \d gives a loss of nan before any training: input 'x' holds an inf"),
    ],
)
def test_values_that_are_no_numbers_are_named(tiny, tmp_path, value, says):
    images = np.zeros((60, 1, 28, 28), np.float32)
    images[[7, 11], 0, 3, 3] = value
    np.savez(tmp_path / "data.npz", x=images, y=LABELS)
    data = {"source": "npz", "path": str(tmp_path / "data.npz"), "held_out": 9}
    with pytest.raises(DataError, match=says):
        check_scenario(scenario_from_mapping({**tiny, "data": data, "partition": {"kind": "iid"}}))


def test_a_batch_of_one_example_is_refused_where_the_model_cannot(tiny, tmp_path):
    np.savez(tmp_path / "data.npz", x=np.zeros((60, 1, 28, 28)), y=LABELS)
    mapping = {
        **tiny,
        "data": {"source": "npz", "path": str(tmp_path / "data.npz"), "held_out": 9},
        "partition": {"kind": "iid"},  # 17 examples each, in batches of 16
        "model": {"factory": f"{NETS}:normalised"},
    }
    with pytest.raises(DataError, match=r"clients 0, 1, 2 are left .* training\.batch_size = 17"):
        check_scenario(scenario_from_mapping(mapping))
    fits = {**mapping, "training": {**tiny["training"], "batch_size": 17}}
    check_scenario(scenario_from_mapping(fits))
    mapping["data"]["held_out"], mapping["clients"] = 55, {"count": 4}
    with pytest.raises(DataError, match=r"clients 1, 2, 3 are left .*lower clients\.count"):
        check_scenario(scenario_from_mapping(mapping))
    check_scenario(scenario_from_mapping({**mapping, "model": tiny["model"]}))
    mapping["data"]["held_out"] = 56
    with pytest.raises(DataError, match=r"clients 0, 1, 2, \.\.\. are left .*lower clients\.count"):
        check_scenario(scenario_from_mapping(mapping))


def test_outputs_of_another_shape_than_the_targets_are_refused(tiny, tmp_path):
    np.savez(tmp_path / "data.npz", x=np.zeros((60, 1, 28, 28)), y=np.zeros((60, 3)))
    data = {"source": "npz", "path": str(tmp_path / "data.npz"), "held_out": 9}
    mapping = {**tiny, "data": data, "task": {"kind": "regression"}}
    with pytest.raises(DataError, match=r"returns \[10\] numbers .* targets are \[3\]"):
        check_scenario(scenario_from_mapping(mapping))


def test_clients_without_examples_are_named(tiny):
    scenario = scenario_from_mapping(tiny)
    training, held_out, clients = check_scenario(scenario)
    with pytest.raises(DataError, match="client 2 is without examples, of 180"):
        check_data_and_model(scenario, (training, held_out, [*clients[:2], clients[2][:0]]))


def test_a_run_that_fails_removes_what_it_made_alone(tiny, tmp_path):
    scenario = scenario_from_mapping({**tiny, "model": {"factory": f"{NETS}:fails"}})
    there = tmp_path / "there"
    there.mkdir()
    for output in (there, tmp_path / "new" / "deep"):
        folder = new_run_folder(output, "x")
        assert folder.is_dir()
        with pytest.raises(ScenarioError):
            run_scenario(scenario, folder)
    assert list(tmp_path.iterdir()) == [there]
    given = there / "mine"
    given.mkdir()
    with pytest.raises(ScenarioError):
        run_scenario(scenario, given)
    assert given.is_dir()


def test_the_first_failure_of_a_client_is_told_with_its_type(tiny, tmp_path):
    mapping = {**tiny, "training": {**tiny["training"], "learning_rate": 1e30}}
    with pytest.raises(EngineFailed) as told:
        run_inline(mapping, tmp_path)
    assert "the first, client 0: TrainerError: the training loss is nan" in str(told.value)
    assert str(told.value).count("TrainerError") == 1


def test_one_example_that_differs_is_an_error(tiny, tmp_path):
    prepared = PreparedRun(tmp_path, scenario_from_mapping(tiny), (1,))
    prepared.work.mkdir()
    outputs = np.eye(10, dtype=np.float32)[np.arange(60) % 3]
    published = _Published(None, None, outputs, 1.0)  # type: ignore[arg-type]
    report = {
        "version": 2,
        "outcome": "updated",
        "payload": "patch",
        "imported": [],
        "reason": None,
    }
    np.savez(prepared.work / "device-2.npz", outputs=outputs)
    _compare(prepared, 2, published, report, patched=True)
    changed = outputs.copy()
    changed[17, 9] = 2
    np.savez(prepared.work / "device-2.npz", outputs=changed)
    with pytest.raises(DeviceMismatch, match=r"1 of 60 examples .* first example 17"):
        _compare(prepared, 2, published, report, patched=True)
    with pytest.raises(SimulationError, match="without a patch"):
        _compare(prepared, 2, published, {**report, "payload": "keyframe"}, patched=True)
    with pytest.raises(DeviceMismatch, match="imported torch"):
        _compare(prepared, 2, published, {**report, "imported": ["torch"]}, patched=True)


def test_the_devices_module_imports_no_training_framework(tmp_path):
    import subprocess

    code = (
        "import sys, prunecast.simulations.runner.device as d;"
        "print([m for m in d.FOREIGN if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_results_of_other_schemas_are_refused(tmp_path):
    with pytest.raises(ResultError, match="give the folder of a finished run"):
        read_result(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ResultError, match="damaged"):
        read_result(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(ResultError, match="not of schema 2"):
        read_result(tmp_path)


def test_run_folders_never_collide(tmp_path):
    folders = {new_run_folder(tmp_path, "x") for _ in range(3)}
    assert len(folders) == 3
