"""Versions that payloads may build on: recent ones as they are, older ones as few bytes."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor, short
from prunecast.server.federation import Policy
from prunecast.server.federation.publishing.history import History
from support.federation import initial_arrays, to_arrays, to_record


def version(number: int) -> PublishedModel:
    rng = np.random.default_rng(number)
    q = rng.integers(-3, 4, (64, 40))
    tensors = {"w": LatticeTensor(q, 0.125), "n": RawTensor(np.arange(3, dtype=np.float32))}
    return PublishedModel(tensors, number)


def test_older_versions_stay_as_long_as_a_node_holds_them():
    held: list[bytes] = []
    history = History(2, 1_000_000, b"stream", lambda: held)
    models = [version(number) for number in range(6)]
    held[:] = [short(models[0].digest), short(models[2].digest)]
    for model in models:
        history.keep(model)
    digests = [short(model.digest) for model in models]
    assert list(history) == [digests[0], digests[2], digests[4], digests[5]]
    found = history.get(digests[0])
    assert found is not None
    assert found.digest == models[0].digest
    assert found["w"].q.tolist() == models[0]["w"].q.tolist()
    assert history.get(digests[4]) is models[4]
    assert history.get(digests[1]) is None
    assert history.get(None) is None
    assert 0 < history.coded_bytes < 2 * models[0]["w"].q.nbytes
    held[:] = [digests[2]]
    history.keep(models[5])
    assert digests[0] not in history
    assert digests[2] in history


def test_bytes_bound_what_is_kept_and_the_loss_is_said_once(caplog):
    held: list[bytes] = []
    history = History(1, 4000, b"", lambda: held)
    models = [version(number) for number in range(12)]
    held[:] = [short(model.digest) for model in models]
    with caplog.at_level(logging.WARNING, "flwr"):
        for model in models:
            history.keep(model)
            assert history.coded_bytes <= 4000
    assert short(models[0].digest) not in history  # the oldest went first
    assert short(models[10].digest) in history
    [said] = [r.getMessage() for r in caplog.records if "history-bytes" in r.getMessage()]
    assert "from 4.00 kB to about" in said


def test_nothing_older_is_kept_without_bytes():
    models = [version(number) for number in range(4)]
    history = History(2, 0, b"", lambda: [short(models[0].digest)])
    for model in models:
        history.keep(model)
    assert list(history) == [short(model.digest) for model in models[2:]]


def test_a_version_that_is_published_again_is_the_newest():
    held = [short(version(0).digest)]
    history = History(1, 10_000, b"", lambda: held)
    for number in (0, 1, 2, 0):
        history.keep(version(number))
    assert list(history) == [short(version(0).digest)]
    assert history.latest.counter == 0


def test_channels_that_go_leave_the_older_versions_too():
    held = [short(version(0).digest)]
    history = History(1, 10_000, b"", lambda: held)
    for number in (0, 1):
        history.keep(version(number))
    kept = np.arange(64) < 32
    plan = ChannelPlan({"w": (kept, None)}, share=0.5)
    left = history.narrowed(plan)
    assert list(left) == list(history)
    assert left.get(held[0])["w"].q.tolist() == version(0)["w"].q[:32].tolist()
    assert history.get(held[0])["w"].shape == (64, 40)


# -- in a federation ------------------------------------------------------------------------------


def trained(grid, arrays, nodes, number):
    """One round; the new master."""
    record = to_record(arrays)
    config = ConfigRecord({"server-round": number})
    content = RecordDict({"arrays": record, "config": config})
    messages = [Message(content, node, "train") for node in nodes]
    replies = list(grid.send_and_receive(messages))
    got = [to_arrays(reply.content["arrays"]) for reply in replies]
    return {
        name: np.mean([a[name] for a in got], axis=0).astype(array.dtype)
        for name, array in arrays.items()
    }


@pytest.mark.parametrize(
    ("asked", "knobs", "remedy"),
    [
        (2, {"history_bytes": 1000}, "16 rounds, .* 4 of them .* to about"),
        (2, {"history_bytes": 0}, "within prunecast.history-bytes = 0 B"),
        (2, {}, ""),  # 12 versions of a few kB
        (8, {"history_bytes": 0}, ""),
        (32, {"history_bytes": 0, "history": 1}, ""),
    ],
)
def test_what_will_not_be_kept_is_said_with_the_first_messages(
    federation, caplog, asked, knobs, remedy
):
    grid, _, _ = federation(Policy(**{"history": 4, **knobs}), nodes=32)
    grid.expect_rounds(100)
    with caplog.at_level(logging.WARNING, "flwr"):
        trained(grid, initial_arrays(), range(1, asked + 1), 1)
    said = [r.getMessage() for r in caplog.records if "Raise prunecast.history" in r.getMessage()]
    assert len(said) == bool(remedy)
    if said:
        assert re.search(rf"Of 32 nodes {asked} are asked .*{remedy}", said[0])


def test_in_a_short_run_as_many_versions_as_rounds_are_enough(federation, caplog):
    grid, _, _ = federation(Policy(history=4, history_bytes=0), nodes=32)
    grid.expect_rounds(4)
    with caplog.at_level(logging.WARNING, "flwr"):
        trained(grid, initial_arrays(), [1, 2], 1)
    assert not [r for r in caplog.records if "history" in r.getMessage()]


@pytest.mark.parametrize("preset", ["balanced", "small", "fine"])
def test_a_node_that_comes_back_after_long_gets_a_delta(federation, preset):
    grid, _, seen = federation(Policy.preset(preset, history=2), nodes=3)
    arrays = initial_arrays()
    for number in range(1, 13):
        arrays = trained(grid, arrays, [1, 3] if number in (1, 12) else [1], number)
    kinds = [e.kind for e in grid.ledger.entries if e.node == 3 and e.direction == "down"]
    assert kinds == ["keyframe", "delta"]
    errors = [e.reason for e in grid.ledger.entries if e.kind in ("error", "base-missing")]
    assert errors == []
    first, last = [got for node, _, got in seen if node == 3]
    [same] = [got for node, _, got in seen if node == 1][-1:]
    assert not np.array_equal(first["fc.weight"], last["fc.weight"])
    for name, array in last.items():  # bit for bit what the node holds that was there throughout
        assert array.tobytes() == same[name].tobytes()


def test_a_delta_that_is_larger_than_the_model_is_not_sent(federation):
    grid, _, seen = federation("lossless", nodes=2)
    rng = np.random.default_rng(3)
    for size in (1.0, 1e-3):  # what a node holds says nothing of it
        values = rng.normal(size=(64, 400)).astype(np.float32) * size
        record = ArrayRecord({"w": Array(values.astype(np.float32))})
        list(grid.send_and_receive([Message(RecordDict({"arrays": record}), 1, "train")]))
        assert seen[-1][2]["w"].tobytes() == values.astype(np.float32).tobytes()
    down = [e for e in grid.ledger.entries if e.direction == "down"]
    assert [e.kind for e in down] == ["keyframe", "keyframe"]
