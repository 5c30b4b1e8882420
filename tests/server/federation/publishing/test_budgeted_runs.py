"""Runs within a number of bytes: on the in-process grid, with real nodes and messages."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from prunecast.client.training import compression_mod
from prunecast.server.federation import Ledger, Policy, PolicyError, Run, read_events
from prunecast.server.federation.errors import BudgetError

FINE = {"down_step": 0.1, "up_step": 0.4, "up_floor": 0.0}


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {"w": rng.normal(size=(120, 100)).astype(np.float32), "b": np.zeros(120, np.float32)}


def record(values):
    return ArrayRecord({name: Array(array) for name, array in values.items()})


@pytest.fixture
def app(tmp_path):
    made = ClientApp(mods=[compression_mod(tmp_path / "store")])

    @made.train()
    def train(message, context):
        number = int(message.content["config"]["server-round"])
        rng = np.random.default_rng(1000 * context.node_id + number)
        moved = {
            name: np.asarray(array.numpy() * 0.98 + 0.05 * rng.normal(size=array.shape), np.float32)
            for name, array in message.content["arrays"].items()
        }
        metrics = MetricRecord({"num-examples": 10, "loss": 1.0})
        content = RecordDict({"arrays": record(moved), "metrics": metrics})
        return Message(content, reply_to=message)

    return made


def fed_avg():
    return FedAvg(min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0)


def spent_by_round(grid):
    found: dict[int, int] = {}
    for entry in grid.ledger.entries:
        found[entry.round] = found.get(entry.round, 0) + entry.payload_bytes
    return list(found.values())


def run(federation, app, rounds=8, nodes=3, **knobs):
    """Bytes of every round, and the grid."""
    grid, _, _ = federation(Policy(**{**FINE, **knobs}), nodes=nodes, app=app)
    initial = grid.draw_initial(record(arrays()), 1)
    fed_avg().start(grid=grid, initial_arrays=initial, num_rounds=rounds)
    assert not [e.reason for e in grid.ledger.entries if e.kind == "error"]
    return spent_by_round(grid), grid


def test_rounds_stay_within_a_budget_that_half_suffices(federation, app, tmp_path):
    free, _ = run(federation, app, rounds=3)
    limit = free[-1] // 2
    spent, grid = run(federation, app, budget_round=limit)
    # what a finer lattice takes at once, as learning slows down, is saved afterwards
    assert sum(spent[2:]) <= 1.05 * limit * len(spent[2:])
    assert sum(total <= 1.02 * limit for total in spent[2:]) >= len(spent[2:]) - 2
    assert max(spent[3:]) > 0.6 * limit  # and it is used
    up = [e for e in grid.ledger.entries if e.direction == "up" and e.most]
    assert up
    assert all(e.payload_bytes <= e.most + 450 for e in up)
    assert any(e.coarser for e in up)
    report = grid.budget()
    assert report["spent"]["run"] == sum(spent)
    assert report["limits"] == {"round": limit}


def test_a_budget_may_take_weights_instead_and_says_when_it_is_exceeded(federation, app, caplog):
    free, _ = run(federation, app, rounds=3)
    limit = free[-1] // 4
    knobs = {"budget_knobs": ("sparsity", "lattice"), "sparsity": 0.75}
    spent, grid = run(federation, app, rounds=12, budget_round=limit, **knobs)
    model = grid._streams.stream(grid.run.run_id, "arrays").history.latest
    assert grid.budget()["thinned"] == 0.75
    zeros = float(np.mean(model.tensors["w"].dense() == 0))
    assert 0.74 < zeros < 0.9  # and a coarse lattice has zeros of its own
    assert model.tensors["w"].pruned
    exceeded = [total for total in spent if total > limit]
    said = [r.getMessage() for r in caplog.records if "above prunecast.budget-round" in r.message]
    assert len(said) == min(1, len(exceeded))


def test_a_run_stays_within_its_budget(federation, app):
    free, _ = run(federation, app, rounds=3)
    limit = free[-1] * 8 // 3
    spent, _ = run(federation, app, budget_run=limit)
    assert sum(spent) <= limit * 1.01


def test_every_node_stays_within_its_budget(federation, app):
    free, _ = run(federation, app, rounds=3)
    limit = free[-1] * 8 // 9
    _, grid = run(federation, app, budget_node=limit)
    by_node: dict[int, int] = {}
    for entry in grid.ledger.entries:
        by_node[entry.node] = by_node.get(entry.node, 0) + entry.payload_bytes
    assert set(by_node) == {1, 2, 3}
    assert max(by_node.values()) <= limit * 1.01
    assert grid.budget()["spent"]["node"] == max(by_node.values())


def test_what_cannot_be_met_is_refused_before_anything_is_sent(federation, app):
    grid, inner, _ = federation(Policy(budget_round=2000), nodes=3, app=app)
    pushed = []
    inner.push_messages = lambda messages: pushed.append(messages) or []
    with pytest.raises(BudgetError, match=r"budget-round = 2.00 kB cannot be met: it takes"):
        fed_avg().start(grid=grid, initial_arrays=record(arrays()), num_rounds=3)
    assert not pushed


def test_a_loop_without_a_number_of_rounds_is_told_to_say_it(federation, app):
    grid, _, _ = federation(Policy(budget_run="1 MB"), nodes=1, app=app)
    config = ConfigRecord({"server-round": 1})
    content = RecordDict({"arrays": record(arrays()), "config": config})
    with pytest.raises(BudgetError, match=r"grid.expect_rounds\(number\)"):
        grid.push_messages([Message(content, 1, "train")])


def test_events_and_ledger_tell_what_was_chosen(federation, app, tmp_path):
    grid, _, _ = federation(Policy(**FINE, budget_round="12 kB"), nodes=2, app=app)
    Run(grid, fed_avg(), folder=tmp_path / "run").start(record(arrays()), num_rounds=4, drawn=True)
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    told = [e["budget"] for e in events if e["event"] == "round-finished"]
    assert [set(budget) for budget in told] == [
        {"limits", "spent", "above", "forecast", "owed", "down_step", "thinned", "up_bytes"}
        | {"up_coarser"}
    ] * 5
    entries = list(Ledger.read(tmp_path / "run" / "ledger.jsonl"))
    for number, budget in enumerate(told[1:], start=1):
        assert budget["spent"]["round"] == sum(
            entry.payload_bytes for entry in entries if entry.round == number
        )
        assert budget["limits"] == {"round": 12_000}
    assert told[-1]["up_coarser"] > 1
    assert told[-1]["down_step"] in (0.1, 0.2, 0.4, 0.8, 1.6)


def test_without_a_budget_nothing_is_said_of_one(federation, app, tmp_path):
    grid, _, _ = federation(Policy(), nodes=1, app=app)
    Run(grid, fed_avg(), folder=tmp_path / "run").start(record(arrays()), num_rounds=1)
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    assert not [event for event in events if "budget" in event]
    assert not [entry for entry in grid.ledger.totals().__dict__ if entry == "budget"]


@pytest.mark.parametrize(
    ("knobs", "remedy"),
    [
        ({"budget_round": "much"}, "'much' is no number of bytes"),
        ({"budget_round": -1}, "give bytes, such as '2 MB'"),
        ({"budget_run": 1.5}, "whole number"),
        ({"budget_run": 10**6, "budget_knobs": ("width",)}, "choose among 'lattice', 'sparsity'"),
        (
            {
                "budget_run": 10**6,
                "budget_knobs": ("sparsity",),
                "pruning_schedule": "automatic",
            },
            "where nothing else does",
        ),
        ({"budget_run": "2 MB", "up": "stc"}, "it moves the steps"),
        ({"budget_node": "2 MB", "down": "dense", "up": "dense"}, "it moves the steps"),
        ({"budget_node": "2 MB", "up_step": 0.0}, "it moves the steps"),
        (
            {
                "budget_round": 10**6,
                "pruning_schedule": "automatic",
                "pruning_knobs": ("sparsity", "lattice"),
            },
            "both would move the lattice",
        ),
    ],
)
def test_budgets_that_do_not_fit_the_policy_are_refused(knobs, remedy):
    with pytest.raises(PolicyError, match=f"prunecast.budget-.*{remedy}"):
        Policy(**knobs)


def test_run_config_states_them_as_text_or_number():
    policy = Policy.from_run_config(
        {"prunecast.budget-round": "1.5 MB", "prunecast.budget-run": 300_000_000}
    )
    assert (policy.budget_round, policy.budget_node, policy.budget_run) == (
        1_500_000, 0, 300_000_000,
    )  # fmt: skip
