"""Automatic pruning in a real federation: torch, nodes that train and evaluate, a resume."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from prunecast.client.training import compression_mod
from prunecast.client.training.client_app import LocalTraining, build_client_app
from prunecast.client.training.trainer import TensorBatches, evaluate
from prunecast.server.federation import Checkpoint, CheckpointError, Policy, Run, read_events
from prunecast.server.federation.publisher import Publisher
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import RUN_ID, initial_arrays, to_record

AUTOMATIC = {
    "pruning_schedule": "automatic", "pruning_tolerance": 0.01, "pruning_patience": 2,
    "pruning_min_size": 100,
}  # fmt: skip
INPUTS, CLASSES, TOLD = 32, 4, 6


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def examples(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes that follow from six of the 32 inputs alone, so that most weights can go."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(count, INPUTS)).astype(np.float32)
    teacher = np.random.default_rng(0).normal(size=(TOLD, CLASSES))
    return torch.from_numpy(inputs), torch.from_numpy((inputs[:, :TOLD] @ teacher).argmax(1))


def app(store: Path) -> ClientApp:
    def data(context: Context) -> tuple[TensorBatches, TensorBatches]:
        inputs, targets = examples(int(context.node_id), 400)
        held_out = examples(100 + int(context.node_id), 300)
        return (
            TensorBatches(inputs, targets, batch_size=20, shuffle=True),
            TensorBatches(*held_out, batch_size=300),
        )

    settings = LocalTraining(learning_rate=0.05, device="cpu")
    return build_client_app(
        lambda context: network(), data, settings, mods=[compression_mod(store)]
    )


def accuracy(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    module = network()
    module.load_state_dict(arrays.to_torch_state_dict())
    found = evaluate(module, TensorBatches(*examples(99, 2000), batch_size=2000), device="cpu")
    return MetricRecord({"loss": found.loss, "accuracy": found.accuracy})


@pytest.fixture
def trained(tmp_path: Path) -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so little to do that several would wait for each other

    def start(
        policy: Policy, rounds: int, *, by_server: bool = True, start: Any = None, name: str = "run"
    ) -> list[dict[str, Any]]:
        inner = InProcessGrid(app(tmp_path / f"{name}-nodes"), 2, run_id=RUN_ID + len(name))
        run = Run(
            inner,
            FedAvg(fraction_evaluate=0.0 if by_server else 1.0),
            policy=policy,
            folder=tmp_path / name,
            evaluate_fn=accuracy if by_server else None,
        )
        run.grid._poll_interval = 0.001
        run.start(start or ArrayRecord(network().state_dict()), num_rounds=rounds)
        return list(read_events(tmp_path / name / "events.jsonl"))

    yield start
    torch.set_num_threads(threads)


def rounds_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "round-finished"]


def test_it_ends_within_its_tolerance_and_most_weights_are_gone(trained: Any) -> None:
    rounds = rounds_of(trained(Policy(**AUTOMATIC), 28))
    dense = [r for r in rounds if not r["masks"]]
    assert 3 <= len(dense) < 20
    found = [change for r in rounds for change in r["pruning"]]
    raised = [c for c in found if c["what"] == "raised"]
    lowered = [c for c in found if c["what"] == "lowered"]
    assert raised
    assert lowered  # it looked for the border
    last = rounds[-1]
    assert last["metrics"]["accuracy"] >= found[-1].get("reference", raised[-1]["reference"]) - 0.01
    assert last["metrics"]["accuracy"] >= max(r["metrics"]["accuracy"] for r in dense) - 0.01
    assert last["sparsity"] > 0.7


def test_nodes_that_evaluate_tell_it_as_well(trained: Any) -> None:
    rounds = rounds_of(trained(Policy(**AUTOMATIC, sparsity=0.5), 20, by_server=False))
    assert max(r["sparsity"] for r in rounds) == pytest.approx(0.5, abs=0.02)  # the most it may
    assert rounds[0]["sparsity"] == 0


def test_the_lattice_is_coarsened_by_the_same_search(trained: Any) -> None:
    policy = Policy(**AUTOMATIC, pruning_knobs=("lattice",), down_step=0.1)
    rounds = rounds_of(trained(policy, 22))
    levels = [c["levels"]["lattice"] for r in rounds for c in r["pruning"]]
    assert levels[0] == 1
    assert set(levels) <= {0, 1, 2, 3}
    assert all(not r["masks"] for r in rounds)
    assert rounds[-1]["metrics"]["accuracy"] >= rounds[5]["metrics"]["accuracy"] - 0.01


def test_recovery_is_told_at_the_end(trained: Any) -> None:
    policy = Policy(
        sparsity=0.9, pruning_schedule="iterative", pruning_steps=2, pruning_begin=4,
        pruning_end=12, pruning_min_size=100,
    )  # fmt: skip
    events = trained(policy, 14)
    first, second = events[-1]["recoveries"]
    assert (first["begun"], first["ended"], first["last"]) == (4, 4, 7)
    assert (second["begun"], second["ended"], second["last"]) == (8, 8, 14)
    by_round = {r["round"]: r["metrics"] for r in rounds_of(events)}
    for one in (first, second):
        assert one["before"] == by_round[one["begun"] - 1]
        assert one["pruned"] == by_round[one["ended"]]
        assert one["after"] == by_round[one["last"]]
        assert one["recovery_ratio"] == one["before"]["loss"] / one["after"]["loss"]
        assert one["pruned"]["loss"] > one["after"]["loss"]


# -- the publisher's part ------------------------------------------------------------------------


def test_it_waits_for_a_metric_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(**AUTOMATIC, pruning_begin=1, pruning_end=9)
    publisher = Publisher(policy, b"s", policy.pruning())
    rng = np.random.default_rng(0)
    for _ in range(6):
        model = publisher.publish({"w": rng.normal(size=(20, 30)).astype(np.float32)}).model
        assert not model.masks()
    assert caplog.text.count("Nobody measures a metric named *accuracy") == 1


@pytest.mark.parametrize("at", [2, 5, 8, 11])
def test_a_search_goes_on_after_a_resume_as_if_nothing_had_been(
    at: int, federation: Any, tmp_path: Path
) -> None:
    policy = Policy(
        **{**AUTOMATIC, "pruning_begin": 1, "pruning_end": 12},
        pruning_knobs=("sparsity", "lattice"),
        hysteresis=0.5,
    )
    rng = np.random.default_rng(4)
    given = [
        to_record({n: rng.normal(size=a.shape).astype("f4") for n, a in initial_arrays().items()})
        for _ in range(14)
    ]
    values = [0.9, 0.9, 0.9, 0.9, 0.8, 0.8, 0.9, 0.895, 0.7, 0.7, 0.9, 0.9, 0.9, 0.9]

    def publish(grid: Any, records: Any, measured: list[float]) -> list[Any]:
        found = []
        for record, value in itertools.zip_longest(records, measured):
            found.append(grid.published(record))
            if value is not None:
                grid.note_metrics({"accuracy": value})
        return found

    whole, _, _ = federation(policy)
    expected = publish(whole, given, values)
    assert len({round(model.sparsity(), 2) for model in expected}) > 3
    first, _, _ = federation(policy)
    publish(first, given[:at], values[:at])  # the last was measured, too
    first.checkpoint(given[at - 1]).save(tmp_path / "checkpoint.safetensors")
    resumed, _, _ = federation(policy, run_id=77)
    checkpoint = Checkpoint.load(tmp_path / "checkpoint.safetensors")
    master = resumed.resume(checkpoint)
    found = publish(resumed, [master, *given[at:]], [None, *values[at:]])
    for one, other in zip(found, expected[at - 1 :], strict=True):
        assert all((a == other.arrays()[n]).all() for n, a in one.arrays().items())
    other, _, _ = federation(Policy(**AUTOMATIC), run_id=78)
    with pytest.raises(CheckpointError, match="does not fit the policy"):
        other.resume(checkpoint)
