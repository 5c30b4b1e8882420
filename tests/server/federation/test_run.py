"""A run: what it leaves, what it tells while it goes on, and how it ends."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg

from prunecast.client.training import compression_mod
from prunecast.common.files import StorageError
from prunecast.compression.versions import load_model
from prunecast.server.federation import (
    AutomaticReleases,
    Checkpoint,
    CheckpointError,
    CompressedGrid,
    FederationError,
    Ledger,
    NodesFailed,
    Policy,
    ReleaseRule,
    Run,
    read_events,
    server_app,
)
from prunecast.server.federation.reporting.layers import layers_in, samples_round
from prunecast.server.federation.wrapper import GridWrapper
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import RUN_ID, initial_arrays, make_app, to_arrays, to_record

SMALL = Policy.preset("small", pruning_begin=1, pruning_end=3)


def arrays() -> Any:
    return to_record(initial_arrays())


@pytest.fixture
def inner(tmp_path: Path) -> InProcessGrid:
    return InProcessGrid(make_app(tmp_path / "store"), 3, run_id=RUN_ID)


def norm(server_round: int, published: Any) -> MetricRecord:
    weights = to_arrays(published)["fc.weight"]
    zeros = float((weights == 0).mean())
    return MetricRecord({"norm": float(np.linalg.norm(weights)), "zeros": zeros})


def test_a_folder_holds_what_the_run_did(inner: InProcessGrid, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    run = Run(inner, FedAvg(), policy=SMALL, folder=folder, evaluate_fn=norm, seed=4, name="digits")
    result = run.start(arrays(), num_rounds=3)
    assert {path.name for path in folder.iterdir()} == {
        "ledger.jsonl", "events.jsonl", "checkpoint.safetensors", "final.model",
    }  # fmt: skip

    begin, *middle, end = read_events(folder / "events.jsonl")
    assert begin["event"] == "run-started"
    assert begin["schema"] == 1
    assert (begin["name"], begin["seed"], begin["rounds"]) == ("digits", 4, 3)
    assert (begin["strategy"], begin["flower_run"], begin["resumed"]) == (
        "FedAvg",
        str(RUN_ID),
        False,
    )
    assert begin["policy"]["sparsity"] == 0.8
    kinds = [event["event"] for event in middle]
    assert kinds == ["round-finished", *["round-begun", "round-finished"] * 3]
    rounds = [event for event in middle if event["event"] == "round-finished"]
    assert [event["round"] for event in rounds] == [0, 1, 2, 3]
    nobody = {"late": 0, "late_applied": 0, "failures": 0, "failed": []}
    assert rounds[0]["nodes"] == {"asked": 0, "trained": 0, **nobody}
    assert rounds[2]["nodes"] == {"asked": 3, "trained": 3, **nobody}
    assert rounds[3]["client_metrics"].keys() == {"train", "evaluate"}
    assert rounds[3]["client_metrics"]["evaluate"] == dict(result.evaluate_metrics_clientapp[3])
    assert rounds[0]["node_metrics"] == {}
    for name, over in rounds[3]["node_metrics"].items():
        assert name in rounds[3]["client_metrics"]["evaluate"]
        assert over["nodes"] == 3
        assert over["deviation"] >= 0
    assert rounds[3]["node_metrics"]
    assert end["pruning"]["made"] == 4
    assert end["pruning"]["peak_bytes"] > 0
    assert [event["metrics"] for event in rounds] == [
        dict(result.evaluate_metrics_serverapp[number]) for number in range(4)
    ]
    assert all(event["run"] == begin["run"] for event in (*middle, end))
    times = [event["time"] for event in (begin, *middle, end)]
    assert times == sorted(times)

    # what was measured is what nodes get, and what the last event says is what the ledger says
    assert rounds[3]["metrics"]["zeros"] > 0.5
    assert rounds[3]["sparsity"] == pytest.approx(0.8, abs=0.05)
    entries = list(Ledger.read(folder / "ledger.jsonl", begin["run"]))
    assert end["event"] == "run-finished"
    for way in ("down", "up"):
        chosen = [entry for entry in entries if entry.direction == way]
        assert end[f"bytes_{way}"] == sum(entry.payload_bytes for entry in chosen) > 0
        assert end[f"dense_bytes_{way}"] == sum(entry.dense_bytes for entry in chosen)
        assert [e[f"bytes_{way}"] for e in rounds] == sorted(e[f"bytes_{way}"] for e in rounds)
    model = load_model(folder / "final.model")
    assert run.published is not None
    assert model.digest == run.published.digest
    saved = Checkpoint.load(folder / "checkpoint.safetensors").arrays
    for name, array in to_arrays(result.arrays).items():
        assert saved[name].tobytes() == array.tobytes()


def test_events_tell_what_every_tensor_holds_and_costs(
    inner: InProcessGrid, tmp_path: Path
) -> None:
    run = Run(inner, FedAvg(), policy=SMALL, folder=tmp_path)
    run.start(arrays(), num_rounds=3)
    told = list(read_events(tmp_path / "events.jsonl"))
    rounds = [event for event in told if event["event"] == "round-finished"]
    entries = list(Ledger.read(tmp_path / "ledger.jsonl"))
    model = load_model(tmp_path / "final.model")
    assert rounds[3]["layers"] == {
        "tensors": {
            name: [array.size, int((array == 0).sum())] for name, array in model.arrays().items()
        }
    }
    masks = [event["masks"] for event in rounds]
    assert masks[3]["kept"] == masks[2]["kept"] + masks[3]["grown"] - masks[3]["removed"]
    assert 1 - masks[3]["kept"] / masks[3]["of"] == pytest.approx(rounds[3]["sparsity"])
    assert rounds[0]["sampled"] == []
    for event in rounds[1:]:
        mine = [entry for entry in entries if entry.round == event["round"]]
        kinds = {(entry.direction, entry.kind) for entry in mine}
        assert {(s["direction"], s["kind"]) for s in event["sampled"]} == kinds
        for sample in event["sampled"]:
            assert sample["bytes"] in {e.payload_bytes for e in mine if e.kind == sample["kind"]}
            assert set(sample["tensors"]) <= set(model.specs)
            assert 0 <= sum(sample["tensors"].values()) < sample["bytes"]
    catching_up = told[-1]["catching_up"]
    assert list(catching_up["missed"]) == ["1", "3"]
    assert catching_up["missed"]["1"] < catching_up["missed"]["3"] < catching_up["whole"]


@pytest.mark.parametrize("policy", ["dense", "stc"])
def test_tensors_are_told_apart_under_every_coding(inner, tmp_path, policy) -> None:
    chosen = Policy(down="stc", up="stc") if policy == "stc" else Policy.preset("dense")
    Run(inner, FedAvg(), policy=chosen, folder=tmp_path).start(arrays(), num_rounds=2)
    *_, last, end = read_events(tmp_path / "events.jsonl")
    names = set(arrays())
    assert set(last["layers"]["tensors"]) == names
    assert last["masks"] == {}
    coded = [s for s in last["sampled"] if s["kind"] not in ("none", "reuse")]
    assert {sample["direction"] for sample in coded} == {"down", "up"}
    for sample in coded:
        # running statistics follow a scheme's payloads together
        exact = {"bn.running_mean", "bn.running_var"} if sample["kind"] == "scheme" else set()
        assert set(sample["tensors"]) == names - exact
        whole = sum(sample["tensors"].values())
        assert 0 < whole < sample["bytes"]
        if policy == "dense":  # each array is its bytes and a header of NumPy's
            assert sample["tensors"] == {n: len(a.data) for n, a in arrays().items()}
            assert not sample["estimated"]
    assert end["catching_up"]["whole"] > 0
    assert list(end["catching_up"]["missed"]) == ([] if policy == "dense" else ["1", "2"])


def test_some_twenty_rounds_of_a_long_run_are_sampled() -> None:
    for rounds in (1, 7, 20, 30, 1000):
        chosen = [n for n in range(1, rounds + 1) if samples_round(n, rounds)]
        assert chosen[0] == 1
        assert chosen[-1] == rounds
        assert min(rounds, 10) <= len(chosen) <= 22


def test_of_many_tensors_the_largest_are_named() -> None:
    many = ArrayRecord({str(n): Array(np.ones(n, np.float32)) for n in range(1, 131)})
    found = layers_in(many, None)
    assert list(found["tensors"]) == [str(n) for n in range(31, 131)]
    assert found["others"] == [sum(range(1, 31)), 0]


def test_a_run_trains_what_the_strategy_alone_trains(tmp_path: Path) -> None:
    def grid(number: int) -> InProcessGrid:
        return InProcessGrid(make_app(tmp_path / f"store{number}"), 4, run_id=RUN_ID)

    random.seed(0)
    options = {"fraction_train": 0.5, "eta": 0.01}
    alone = FedAdam(**options).start(CompressedGrid(grid(0), "small"), arrays(), num_rounds=3)
    strategy = FedAdam(**options)
    before = dict(vars(strategy))
    run = Run(grid(1), strategy, policy="small", folder=tmp_path / "run", evaluate_fn=norm)
    within = run.start(arrays(), num_rounds=3)
    for name, array in to_arrays(alone.arrays).items():
        assert to_arrays(within.arrays)[name].tobytes() == array.tobytes()
    assert "aggregate_train" not in before
    assert not {"aggregate_train", "aggregate_evaluate"} & vars(strategy).keys()


def test_a_second_run_goes_on_from_the_checkpoint_below_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for number, name in enumerate(("first", "second")):
        grid = InProcessGrid(make_app(tmp_path / f"store{number}"), 3, run_id=RUN_ID + number)
        run = Run(grid, FedAvg(), policy=SMALL, folder=folder, name=name)
        path = folder / "checkpoint.safetensors"
        start = Checkpoint.load(path) if path.exists() else arrays()
        run.start(start, num_rounds=2)
    events = [list(read_events(folder / "events.jsonl", name)) for name in ("first", "second")]
    assert [found[0]["resumed"] for found in events] == [False, True]
    assert events[1][1]["sparsity"] >= events[0][-2]["sparsity"]  # the schedule goes on
    assert Checkpoint.load(folder / "checkpoint.safetensors").counter > 3
    ledgers = [list(Ledger.read(folder / "ledger.jsonl", found[0]["run"])) for found in events]
    assert all(len(entries) == 2 * 2 * 2 * 3 for entries in ledgers)


def test_a_drawn_model_begins_with_a_tiny_keyframe(inner: InProcessGrid) -> None:
    grid = CompressedGrid(inner, "balanced", ledger=Ledger(keep=100))
    Run(grid, FedAvg(), seed=3).start(arrays(), num_rounds=1, drawn=True)
    first = next(e for e in grid.ledger.entries if e.kind == "keyframe")
    assert first.payload_bytes * 3 < first.dense_bytes


def test_the_grids_own_ledger_is_used_unless_another_is_named(
    inner: InProcessGrid, tmp_path: Path
) -> None:
    grid = CompressedGrid(inner, ledger=tmp_path / "own.jsonl")
    Run(grid, FedAvg(), ledger=tmp_path / "other.jsonl").start(arrays(), num_rounds=1)
    assert len(list(Ledger.read(tmp_path / "other.jsonl"))) == 12
    assert list(Ledger.read(tmp_path / "own.jsonl")) == []


def test_failed_nodes_are_told_and_left_out(inner: InProcessGrid, tmp_path: Path) -> None:
    broken = ClientApp()
    inner = InProcessGrid({1: make_app(tmp_path / "store"), 2: broken}, 2, run_id=RUN_ID)
    heard: list[Any] = []
    run = Run(inner, FedAvg(), on_event=heard.append)
    run.start(arrays(), num_rounds=1)
    [failed, again] = heard[-2]["nodes"]["failed"]
    assert heard[-2]["nodes"]["asked"] == 2
    assert heard[-2]["nodes"]["trained"] == 1
    assert heard[-2]["nodes"]["failures"] == 2
    assert failed["node"] == again["node"] == "2"
    assert failed["reason"]
    warnings = [event["text"] for event in heard if event["event"] == "warning"]
    # its own words, each once; nothing of a mod that it may lack
    assert [text for text in warnings if "Node 2" in text] == [
        f"Node 2: ValueError: No {kind} function registered with name 'default'"
        for kind in ("train", "evaluate")
    ]


@pytest.mark.parametrize("evaluate", [0.0, 1.0])
def test_a_run_without_a_reply_that_could_be_used_ends_with_an_error(
    tmp_path: Path, evaluate: float
) -> None:
    app = make_app(tmp_path / "store")

    @app.train("broken")
    def train(message: Message, context: Any) -> Message:
        raise RuntimeError("CUDA out of memory")

    app._registered_funcs["train.default"] = app._registered_funcs["train.broken"]
    heard: list[Any] = []
    run = Run(
        InProcessGrid(app, 3, run_id=RUN_ID),
        FedAvg(fraction_evaluate=evaluate),
        folder=tmp_path / "run",
        on_event=heard.append,
    )
    with pytest.raises(NodesFailed, match=r"no reply .* node \d: .*CUDA out of memory"):
        run.start(arrays(), num_rounds=2)
    assert heard[-1]["event"] == "run-failed"
    assert not (tmp_path / "run" / "final.model").exists()
    warnings = [event["text"] for event in heard if event["event"] == "warning"]
    causes = [text for text in warnings if text.startswith("Node")]
    assert sorted(causes) == [
        f"Node {node}: RuntimeError: CUDA out of memory" for node in (1, 2, 3)
    ]


def test_a_run_whose_nodes_cannot_evaluate_is_no_failure(tmp_path: Path) -> None:
    app = make_app(tmp_path / "store")
    del app._registered_funcs["evaluate.default"]
    result = Run(InProcessGrid(app, 2, run_id=RUN_ID), FedAvg()).start(arrays(), num_rounds=1)
    assert result.arrays


def test_a_run_that_must_not_lose_a_node_stops(tmp_path: Path) -> None:
    inner = InProcessGrid({1: make_app(tmp_path / "store"), 2: ClientApp()}, 2, run_id=RUN_ID)
    run = Run(inner, FedAvg(), folder=tmp_path / "run", stop_on_failure=True)
    with pytest.raises(NodesFailed, match=r"round 1: 1 clients answered with an error"):
        run.start(arrays(), num_rounds=2)
    *_, last = read_events(tmp_path / "run" / "events.jsonl")
    assert last["event"] == "run-failed"
    assert "NodesFailed: round 1" in last["reason"]
    entries = list(Ledger.read(tmp_path / "run" / "ledger.jsonl"))
    assert {e.node: e.kind for e in entries if e.direction == "up"} == {1: "update", 2: "error"}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_evaluation_that_fails_ends_the_run_in_order(
    inner: InProcessGrid, tmp_path: Path, number: int
) -> None:
    def evaluate(server_round: int, published: Any) -> None:
        if server_round == number:
            raise KeyboardInterrupt

    run = Run(inner, FedAvg(), folder=tmp_path / "run", evaluate_fn=evaluate)
    with pytest.raises(KeyboardInterrupt):
        run.start(arrays(), num_rounds=3)
    *_, last = read_events(tmp_path / "run" / "events.jsonl")
    assert last["event"] == "run-failed"
    assert len(list(Ledger.read(tmp_path / "run" / "ledger.jsonl"))) == number * 12
    # everything is closed, the strategy is as it was: the next run can begin
    inner = InProcessGrid(make_app(tmp_path / "another"), 3, run_id=RUN_ID + 1)
    Run(inner, run.strategy, folder=tmp_path / "run").start(arrays(), num_rounds=1)


def test_a_listener_that_fails_at_once_leaves_no_file_open(
    inner: InProcessGrid, tmp_path: Path
) -> None:
    def fails(event: Any) -> None:
        raise RuntimeError("no listener")

    with pytest.raises(RuntimeError, match="no listener"):
        Run(inner, FedAvg(), folder=tmp_path, on_event=fails).start(arrays(), num_rounds=1)
    Run(inner, FedAvg(), folder=tmp_path).start(arrays(), num_rounds=1)


def test_training_by_a_named_function_counts_as_training(tmp_path: Path) -> None:
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])

    @app.train("head")
    def train(message: Message, context: Context) -> Message:
        content = RecordDict({"arrays": message.content["arrays"]})
        content["metrics"] = MetricRecord({"num-examples": 1})
        return Message(content, reply_to=message)

    class Named(FedAvg):
        def configure_train(self, *args: Any) -> Any:
            asked = super().configure_train(*args)
            return [Message(m.content, m.metadata.dst_node_id, "train.head") for m in asked]

    told: list[Any] = []
    inner = InProcessGrid(app, 2, run_id=RUN_ID)
    run = Run(inner, Named(fraction_evaluate=0.0), on_event=told.append)
    run.start(arrays(), num_rounds=1)
    assert [e["nodes"] for e in told if e["event"] == "round-begun"] == [2]
    assert [e["nodes"]["trained"] for e in told if e["event"] == "round-finished"] == [0, 2]


def test_two_runs_cannot_share_a_folder_at_a_time(inner: InProcessGrid, tmp_path: Path) -> None:
    second = InProcessGrid(make_app(tmp_path / "another"), 3, run_id=RUN_ID + 1)

    def meanwhile(server_round: int, published: Any) -> None:
        with pytest.raises(StorageError, match="another run is writing"):
            Run(second, FedAvg(), folder=tmp_path / "run").start(arrays(), num_rounds=1)

    Run(inner, FedAvg(), folder=tmp_path / "run", evaluate_fn=meanwhile).start(arrays(), 1)


def test_releases_are_events(inner: InProcessGrid) -> None:
    heard: list[Any] = []
    versions = itertools.count(1)
    releases = AutomaticReleases(ReleaseRule(every=2), lambda model, metrics: next(versions))
    run = Run(inner, FedAvg(), evaluate_fn=norm, releases=releases, on_event=heard.append)
    run.start(arrays(), num_rounds=4)
    told = [event for event in heard if event["event"] == "release"]
    assert [(event["round"], event["version"]) for event in told] == [(2, 1), (4, 2)]
    assert [event["metrics"] for event in told] == [dict(m.metrics) for m in releases.made]
    assert told[0]["metrics"].keys() == {"norm", "zeros"}


def test_numbers_that_json_lacks_become_null(inner: InProcessGrid, tmp_path: Path) -> None:
    def evaluate(server_round: int, published: Any) -> MetricRecord:
        return MetricRecord({"loss": float("nan"), "per class": [1.0, float("inf")]})

    Run(inner, FedAvg(), folder=tmp_path, evaluate_fn=evaluate).start(arrays(), num_rounds=1)
    text = (tmp_path / "events.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    [*_, last, _] = read_events(tmp_path / "events.jsonl")
    assert last["metrics"] == {"loss": None, "per class": [1.0, None]}


@pytest.mark.parametrize(
    ("values", "mean", "deviation"),
    [
        ((1e308, 1e308), None, 0.0),
        ((-1e308, 1e308), 0.0, pytest.approx(2**0.5 * 1e308)),
        ((-1.7e308, 1.7e308), 0.0, None),
    ],
)
def test_huge_metrics_of_two_nodes_end_no_run(
    tmp_path: Path, values: tuple[float, float], mean: Any, deviation: Any
) -> None:
    app = make_app(tmp_path / "store")
    other = ClientApp(mods=[compression_mod(tmp_path / "store")])

    @other.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1, "huge": values[context.node_id % 2], "one": 1.0})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @other.train()
    def train(message: Message, context: Context) -> Message:
        return app(message, context)

    Run(InProcessGrid(other, 2, run_id=RUN_ID), FedAvg(), folder=tmp_path).start(arrays(), 1)
    [*_, last, _] = read_events(tmp_path / "events.jsonl")
    found = last["node_metrics"]
    assert found["huge"] == {"mean": mean, "deviation": deviation, "nodes": 2}
    assert found["one"] == {"mean": 1.0, "deviation": 0.0, "nodes": 2}


def test_events_of_a_newer_schema_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(json.dumps({"schema": 2, "event": "run-started"}) + "\n")
    with pytest.raises(StorageError, match="update Prunecast"):
        list(read_events(path))
    with pytest.raises(StorageError, match="cannot read"):
        next(read_events(tmp_path / "none"))


def test_the_ready_server_app_keeps_a_folder(
    inner: InProcessGrid, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config: dict[str, Any] = {
        "model": "support.torch_classifier:Classifier",
        "evaluate": "support.torch_classifier:spread",
        "num-server-rounds": 2,
        "folder": str(tmp_path / "run"),
        "name": "toy",
        "ledger": "",
        "output": "",
        "seed": 5,
        "timeout": 60.5,
        "prunecast.hysteresis": 0.5,  # what stays for its sake is not in a checkpoint
    }
    caplog.set_level("INFO")
    server_app.app(inner, Context(RUN_ID, 0, {}, RecordDict(), config))
    begin, *_, last, end = read_events(tmp_path / "run" / "events.jsonl", "toy")
    assert (begin["seed"], begin["rounds"]) == (5, 2)
    assert last["metrics"]["spread"] > 0
    assert load_model(tmp_path / "run" / "final.model").arrays()
    said = f"Prunecast: {end['bytes_down']} bytes down, {end['bytes_up']} up; plain Flower: "
    assert said in caplog.text

    path = tmp_path / "run" / "checkpoint.safetensors"
    counter = Checkpoint.load(path).counter
    again = {**config, "resume": str(path), "name": "again"}
    other = InProcessGrid(make_app(tmp_path / "another"), 3, run_id=RUN_ID + 1)
    server_app.app(other, Context(RUN_ID + 1, 0, {}, RecordDict(), again))
    begin, first, *_ = read_events(tmp_path / "run" / "events.jsonl", "again")
    assert begin["resumed"] is True
    assert first["metrics"] == last["metrics"]
    assert Checkpoint.load(path).counter > counter
    Checkpoint({"w": np.zeros(3)}, 1, {}).save(path)
    with pytest.raises(CheckpointError, match=r"resume = .* is of another model"):
        server_app.app(other, Context(RUN_ID + 1, 0, {}, RecordDict(), again))


@pytest.mark.parametrize("up", ["dense", "stc"])
def test_where_models_travel_densely_plain_arrays_are_measured(tmp_path: Path, up: str) -> None:
    inner = InProcessGrid(make_app(tmp_path / "store"), 2, run_id=RUN_ID)
    measured: list[Any] = []

    def evaluate(server_round: int, received: Any) -> None:
        measured.append(to_arrays(received))

    policy = Policy.preset("dense", up=up)
    run = Run(inner, FedAvg(), policy=policy, folder=tmp_path / "run", evaluate_fn=evaluate)
    result = run.start(arrays(), num_rounds=2)
    for name, array in to_arrays(result.arrays).items():
        assert measured[2][name].tobytes() == array.tobytes()
    assert run.published is None
    assert not (tmp_path / "run" / "final.model").exists()
    saved = Checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")
    assert saved.arrays["fc.weight"].tobytes() == measured[2]["fc.weight"].tobytes()
    releases = AutomaticReleases(ReleaseRule(every=1), lambda model, metrics: 1)
    with pytest.raises(FederationError, match="down = 'lattice'"):
        Run(inner, FedAvg(), policy=policy, releases=releases)


def test_a_wrapper_around_the_compressed_grid_stays_outermost(inner: InProcessGrid) -> None:
    class Counting(GridWrapper):
        batches = 0

        def send_and_receive(self, messages: Any, **options: Any) -> Any:
            self.batches += 1
            return super().send_and_receive(messages, **options)

    compressed = CompressedGrid(inner, "small")
    outermost = Counting(Counting(compressed))
    run = Run(outermost, FedAvg(), policy="lossless")
    assert run.grid is compressed
    run.start(arrays(), num_rounds=2)
    assert outermost.batches == 4


def test_the_blocks_of_its_page_run(
    inner: InProcessGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs" / "run.md").read_text()
    runs = itertools.count(RUN_ID + 1)
    scope: dict[str, Any] = {
        "grid": inner,
        "new_grid": lambda: InProcessGrid(make_app(tmp_path / "other"), 2, run_id=next(runs)),
        "strategy": FedAvg(),
        "arrays": arrays(),
        "evaluate_fn": norm,
    }
    for block in re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL):
        exec(block, scope)
    assert scope["totals"].bytes_up > 0
    assert scope["kinds"] >= {"keyframe", "update"}
    assert scope["model"].sparsity() > 0
    assert Path("digits.model").is_file()
    assert all(scope["tally"].totals(direction=way).messages for way in ("up", "down"))
    event_kinds = set(re.findall(r"^\| `(r[a-z-]+|warning)` \|", page, flags=re.MULTILINE))
    assert event_kinds >= {
        event["event"] for event in read_events(Path("runs/digits/events.jsonl"))
    }


def test_a_checkpoint_that_cannot_be_written_ends_nothing(
    inner: InProcessGrid, tmp_path: Path
) -> None:
    (tmp_path / "run" / "checkpoint.safetensors").mkdir(parents=True)
    Run(inner, FedAvg(), folder=tmp_path / "run").start(arrays(), num_rounds=2)
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    warned = [event["text"] for event in events if event["event"] == "warning"]
    assert len(warned) == 2
    assert all("No checkpoint of round" in text for text in warned)
    assert events[-1]["event"] == "run-finished"


def test_an_event_names_a_bounded_number_of_failed_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prunecast.server.federation.rounds._NAMED", 2)
    heard: list[Any] = []
    broken = InProcessGrid(ClientApp(), 3, run_id=RUN_ID)
    with pytest.raises(NodesFailed):
        Run(broken, FedAvg(), on_event=heard.append).start(arrays(), num_rounds=1)
    nodes = heard[-2]["nodes"]
    assert (nodes["asked"], nodes["trained"], nodes["failures"]) == (3, 0, 6)
    assert len(nodes["failed"]) == 2
