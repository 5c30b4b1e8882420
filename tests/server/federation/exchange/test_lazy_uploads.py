"""Nodes that keep back an update that would not matter: nothing is lost, and it is counted."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg

from prunecast.client.training.store import NodeStore
from prunecast.server.federation import Deadlines, Policy, PolicyError
from support.federation import (
    RUN_ID,
    initial_arrays,
    local_step,
    make_app,
    to_arrays,
    to_record,
)

LATTICE = ("conv.weight", "fc.weight")


def asked(grid, arrays, nodes, number):
    config = ConfigRecord({"server-round": number})
    content = RecordDict({"arrays": to_record(arrays), "config": config})
    messages = [Message(content, node, "train") for node in nodes]
    return [to_arrays(reply.content["arrays"]) for reply in grid.send_and_receive(messages)]


def kinds(grid, node):
    return [e.kind for e in grid.ledger.entries if e.node == node and e.direction == "up"]


def test_what_is_kept_back_comes_later_all_of_it(federation, tmp_path):
    seen = []
    app = make_app(tmp_path / "store", seen)
    grid, _, _ = federation(Policy(lazy=1.2), nodes=1, app=app)
    arrays = initial_arrays()
    got, local = ({n: np.zeros(arrays[n].shape) for n in LATTICE} for _ in range(2))
    for number in range(1, 9):
        [reply] = asked(grid, arrays, [1], number)
        before = seen[-1][2]
        after = local_step(before, 1000 + number)
        for name in LATTICE:
            got[name] += reply[name] - arrays[name]
            local[name] += after[name] - before[name]
        arrays = reply
    assert {"lazy", "update"} == set(kinds(grid, 1))
    assert kinds(grid, 1)[0] == "update"  # nobody knows yet how far the model moves
    node, store = grid._streams.node(1), NodeStore(tmp_path / "store", RUN_ID, 1)
    store.settle(node.accepted, node.given_up)
    left = store.residual("arrays")
    for name in LATTICE:
        np.testing.assert_allclose(got[name] + left[name], local[name], atol=1e-5)
    sizes = {e.kind: e.payload_bytes for e in grid.ledger.entries if e.direction == "up"}
    assert sizes["lazy"] < 550 < sizes["update"]


def test_a_reply_that_was_kept_back_says_no_change(federation):
    grid, _, _ = federation(Policy(lazy=1e6), nodes=2)
    first, second = initial_arrays(), local_step(initial_arrays(), 3)
    asked(grid, first, [1, 2], 1)
    for reply in asked(grid, second, [1, 2], 2):
        for name, array in second.items():
            if name in LATTICE:
                assert reply[name].tobytes() == array.tobytes()
    assert kinds(grid, 1) == ["update", "lazy"]


def test_a_lost_reply_that_said_nothing_loses_nothing(federation, tmp_path):
    grid, inner, _ = federation(Policy(lazy=1e6), nodes=1)
    store = NodeStore(tmp_path / "store", RUN_ID, 1)
    arrays = initial_arrays()
    for number in (1, 2, 3):
        arrays = asked(grid, local_step(arrays, number), [1], number)[0]
    node = grid._streams.node(1)
    store.settle(node.accepted, node.given_up)
    before = store.residual("arrays")
    inner.on_reply = lambda reply: None
    config = ConfigRecord({"server-round": 4})
    content = RecordDict({"arrays": to_record(local_step(arrays, 4)), "config": config})
    assert not list(grid.send_and_receive([Message(content, 1, "train")], timeout=0.05))
    store.settle(node.accepted, node.given_up)
    after = store.residual("arrays")
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}


def test_a_late_reply_that_said_nothing_is_applied_and_keeps_what_it_kept_back(
    federation, tmp_path
):
    deadlines = Deadlines(replies=1, late="apply")
    grid, inner, seen = federation(Policy(lazy=1e6), nodes=2, deadlines=deadlines)
    arrays = initial_arrays()
    asked(grid, arrays, [1, 2], 1)
    store = NodeStore(tmp_path / "store", RUN_ID, 2)
    inner.busy = {2}
    asked(grid, local_step(arrays, 2), [1, 2], 2)
    inner.serve(2)
    [late, _] = asked(grid, local_step(arrays, 3), [1], 3)
    for name in LATTICE:  # an update of zero
        np.testing.assert_array_equal(late[name], local_step(arrays, 3)[name])
    assert kinds(grid, 2) == ["update", "lazy"]
    before, node = next(a for n, _, a in reversed(seen) if n == 2), grid._streams.node(2)
    earlier = store.residual("arrays")  # what the first reply dropped went with the late one
    store.settle(node.accepted, node.given_up)
    left, trained = store.residual("arrays"), local_step(before, 2002)
    assert not earlier
    for name in LATTICE:
        assert np.linalg.norm(left[name]) > 0.9 * np.linalg.norm(trained[name] - before[name])


def run(federation, strategy, rounds):
    grid, _, _ = federation(Policy(lazy=1e6), nodes=3)
    made = strategy(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    result = made.start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=rounds)
    losses = [dict(metrics)["loss"] for metrics in result.train_metrics_clientapp.values()]
    assert losses == pytest.approx([0.5] * rounds)  # the metrics came all the same
    return grid, to_arrays(result.arrays)


@pytest.mark.parametrize("strategy", [FedAvg, FedAdam])
def test_strategies_aggregate_what_was_kept_back_as_no_change(federation, tmp_path, strategy):
    _, first = run(federation, strategy, 1)
    shutil.rmtree(tmp_path / "store")
    grid, last = run(federation, strategy, 3)
    assert [e.round for e in grid.ledger.entries if e.kind == "lazy"] == [2] * 3 + [3] * 3
    for name in LATTICE:
        if strategy is FedAvg:  # three times what was sent is what was sent, but for rounding
            np.testing.assert_allclose(last[name], first[name], rtol=1e-6)
        else:  # momentum goes on, as it does in plain Flower with nodes that changed nothing
            assert not np.array_equal(last[name], first[name])
        assert np.isfinite(last[name]).all()


def test_off_by_default_to_the_byte(federation):
    sizes = []
    for policy in (Policy(), Policy(lazy=0.0)):
        grid, _, _ = federation(policy, nodes=1)
        asked(grid, initial_arrays(), [1], 1)
        sizes.append([(e.kind, e.payload_bytes) for e in grid.ledger.entries])
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("knobs", "remedy"),
    [
        ({"lazy": -1.0}, "give 0 or more"),
        ({"lazy": 1.5, "error_feedback": False}, "kept by error feedback"),
        ({"lazy": 1.5, "up": "stc"}, "kept by error feedback"),
        ({"lazy": 1.5, "widths": {"small": 0.5}}, "leave out prunecast.widths"),
    ],
)
def test_what_cannot_be_lazy_is_refused(knobs, remedy):
    with pytest.raises(PolicyError, match=f"prunecast.lazy.*{remedy}"):
        Policy(**knobs)
