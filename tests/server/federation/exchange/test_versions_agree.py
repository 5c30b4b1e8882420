"""Server and clients hold the same digest, whatever happens to nodes and their stores."""

import os
import random
import shutil
import time

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from prunecast.client.training import compression_mod
from prunecast.client.training import store as store_module
from prunecast.client.training.store import NodeStore
from prunecast.common.files import StorageError, replacing, write_atomically
from prunecast.compression.flower.internals import make_message, set_message_id
from prunecast.server.federation import Policy
from support.federation import (
    RUN_ID,
    initial_arrays,
    local_step,
    make_app,
    to_arrays,
    to_record,
)

SMALL = Policy.preset("small", pruning_begin=1, pruning_end=8, history=4, history_bytes=0)


def held_digest(tmp_path, node):
    held = NodeStore(tmp_path / "store", RUN_ID, node).held("arrays")
    return None if held is None else held.digest


def kinds_of(grid, node, direction="down"):
    return [e.kind for e in grid.ledger.entries if e.node == node and e.direction == direction]


def rounds(grid, inner, tmp_path, plan):
    """One FedAvg round per entry of `plan`: the nodes that are online in it."""
    arrays = to_record(initial_arrays())
    strategy = FedAvg(min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0)
    random.seed(0)
    for number, online in enumerate(plan, start=1):
        if callable(online):
            online = online()
        inner.online = set(online)
        sent = arrays
        replies = grid.send_and_receive(
            strategy.configure_train(number, arrays, ConfigRecord(), grid)
        )
        arrays, _ = strategy.aggregate_train(number, replies)
        model = grid.published(sent)
        for node in online:
            assert held_digest(tmp_path, node) == model.digest, (number, node)
    return arrays


def test_a_node_that_skips_rounds_gets_one_direct_delta(federation, tmp_path):
    grid, inner, _ = federation(SMALL)
    rounds(grid, inner, tmp_path, [{1, 2, 3}, {1, 2}, {1, 2}, {1, 2, 3}])
    assert kinds_of(grid, 3) == ["keyframe", "delta"]


def test_a_node_away_for_longer_than_the_history_gets_a_keyframe(federation, tmp_path):
    grid, inner, _ = federation(SMALL)
    rounds(grid, inner, tmp_path, [{1, 3}, *[{1}] * 5, {1, 3}])
    assert kinds_of(grid, 3) == ["keyframe", "keyframe"]


def test_a_node_that_loses_its_store_gets_a_keyframe_in_the_same_round(federation, tmp_path):
    grid, inner, seen = federation(SMALL)

    def lose():
        shutil.rmtree(tmp_path / "store" / str(RUN_ID) / "2")
        return {1, 2, 3}

    rounds(grid, inner, tmp_path, [{1, 2, 3}, {1, 2, 3}, lose, {1, 2, 3}])
    assert kinds_of(grid, 2) == ["keyframe", "delta", "delta", "keyframe", "delta"]
    assert kinds_of(grid, 2, "up") == ["update", "update", "base-missing", "update", "update"]
    assert sum(1 for node, _, _ in seen if node == 2) == 4


def test_a_keyframe_that_follows_is_waited_for_where_the_server_forgets(federation, tmp_path):
    grid, inner, _ = federation(SMALL)
    rounds(grid, inner, tmp_path, [{1, 2}])
    shutil.rmtree(tmp_path / "store")
    content = RecordDict({"arrays": to_record(initial_arrays(1))})
    replies = list(grid.send_and_receive([Message(content, n, "train") for n in (1, 2)]))
    assert [reply.has_error() for reply in replies] == [False, False]
    assert kinds_of(grid, 1, "up")[-2:] == ["base-missing", "update"]
    assert not grid._sent
    assert not grid._retries


def test_a_keyframe_that_cannot_be_sent_is_an_error_of_that_node(federation, tmp_path):
    grid, inner, _ = federation(SMALL)
    rounds(grid, inner, tmp_path, [{1, 2}])
    shutil.rmtree(tmp_path / "store" / str(RUN_ID) / "2")
    push = inner.push_messages
    inner.push_messages = lambda messages: (
        push(messages) if len(messages) > 1 else [set_message_id(messages[0], "lost")]
    )
    content = RecordDict({"arrays": to_record(initial_arrays(1))})
    messages = [Message(content, n, "train") for n in (1, 2)]
    replies = list(grid.send_and_receive(messages, timeout=5))
    assert [reply.has_error() for reply in replies] == [False, True]
    assert replies[1].metadata.reply_to_message_id == messages[1].metadata.message_id


@pytest.mark.parametrize("kind", ["evaluate", "train"])
@pytest.mark.parametrize("known", [True, False])
def test_a_reply_that_was_lost_costs_no_keyframe(federation, kind, known):
    """The node holds what it was sent last, and the next message builds on that, or is that."""
    grid, inner, _ = federation("balanced", nodes=1)

    def send(seed, message_type="train", timeout=None):
        content = RecordDict({"arrays": to_record(initial_arrays(seed))})
        return list(grid.send_and_receive([Message(content, 1, message_type)], timeout=timeout))

    send(0)
    inner.on_reply = lambda reply: None
    assert send(1, kind, timeout=0.03) == []
    inner.on_reply = lambda reply: reply
    (reply,) = send(1 if known else 2)
    assert not reply.has_error()
    assert kinds_of(grid, 1) == ["keyframe", "delta", "reuse" if known else "delta"]
    assert kinds_of(grid, 1, "up") == ["update", "update"]


@pytest.mark.parametrize("kind", ["evaluate", "train"])
def test_a_reply_after_its_deadline_says_what_the_node_holds(federation, tmp_path, kind):
    """It is looked at once, before the next message, moves nothing, and is in the ledger."""
    grid, inner, _ = federation("balanced", nodes=1)
    pull = inner.pull_messages

    def send(seed, message_type="train", timeout=None):
        content = RecordDict({"arrays": to_record(initial_arrays(seed))})
        return list(grid.send_and_receive([Message(content, 1, message_type)], timeout=timeout))

    send(0)
    asked = []
    inner.pull_messages = lambda ids: asked.append(list(ids)) or []
    assert send(1, kind, timeout=0.03) == []
    inner.pull_messages = lambda ids: asked.append(list(ids)) or pull(ids)
    asked.clear()
    (reply,) = send(2)
    assert not reply.has_error()
    assert kinds_of(grid, 1) == ["keyframe", "delta", "delta"]
    assert kinds_of(grid, 1, "up") == ["update", "late", "update"]
    assert len(asked) == 2
    assert not grid._sent
    send(3)
    assert len(asked) == 3  # once, and not again
    store, node = NodeStore(tmp_path / "store", RUN_ID, 1), grid._streams.node(1)
    assert not node.given_up  # it knows that this one moved nothing
    store.settle(node.accepted)
    assert len(list(store._folder.glob("*.residual"))) == 1
    assert not list(store._folder.glob("*.taken-*"))


def test_a_late_reply_that_never_comes_keeps_no_model_in_memory(federation):
    grid, inner, _ = federation("balanced", nodes=2)
    content = RecordDict({"arrays": to_record(initial_arrays())})
    inner.on_reply = lambda reply: None if reply.metadata.src_node_id == 2 else reply
    messages = [Message(content, node, "train") for node in (1, 2)]
    assert len(list(grid.send_and_receive(messages, timeout=0.03))) == 1
    assert not grid._sent
    assert len(list(grid.send_and_receive([Message(content, 1, "train")]))) == 1
    assert not grid._sent
    (kept,) = grid._late._pending.values()
    assert not kept.original.content
    assert not any(version.master for version in kept.versions.values())


@pytest.mark.parametrize("late", [False, True])
def test_a_reply_that_nobody_waits_for_is_dropped_and_said_once(federation, caplog, late):
    grid, inner, _ = federation("balanced", nodes=2)
    pull, kept = inner.pull_messages, []

    def deliver(message_ids):
        fresh = list(pull(message_ids))
        copies = [make_message(m.metadata, m.content) for m in (kept if late else fresh)]
        kept[:] = fresh
        return [*fresh, *copies]

    inner.pull_messages = deliver
    result = FedAvg().start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=2)
    assert list(result.arrays) == list(initial_arrays())
    dropped = [r.getMessage() for r in caplog.records if "dropped" in r.getMessage()]
    assert sorted(text[:7] for text in dropped) == ["Node 1:", "Node 2:"]
    assert len([e for e in grid.ledger.entries if e.direction == "up"]) == 2 * 2 * 2


def test_a_reply_to_a_message_that_was_given_up_is_an_error(federation):
    grid, _, _ = federation("balanced", nodes=1)
    content = RecordDict({"arrays": to_record(initial_arrays())})
    (message_id,) = grid.push_messages([Message(content, 1, "train")])
    grid._forget([message_id])
    (reply,) = grid.pull_messages([message_id])
    assert "given up" in reply.error.reason


def test_ids_that_are_not_known_or_were_answered_are_errors_that_name_them(federation):
    grid, inner, _ = federation("balanced", nodes=2)
    content = RecordDict({"arrays": to_record(initial_arrays())})
    answered, *_ = grid.push_messages([Message(content, 1, "train")])
    list(grid.pull_messages([answered]))
    inner.on_reply = lambda reply: None
    waiting, *_ = grid.push_messages([Message(content, 2, "train")])
    for wrapped in (inner, grid):
        errors = list(wrapped.pull_messages([answered, waiting, "never"]))
        assert [e.metadata.reply_to_message_id for e in errors] == [answered, "never"]
        assert all("Message Unavailable" in e.error.reason for e in errors)


def test_a_node_that_goes_before_it_answers_is_answered_for(federation):
    grid, inner, seen = federation("balanced", nodes=2)
    content = RecordDict({"arrays": to_record(initial_arrays())})
    inner.busy.add(2)
    ids = list(grid.push_messages([Message(content, node, "train") for node in (1, 2)]))
    assert len(list(grid.pull_messages(ids))) == 1
    inner.online.discard(2)
    (gone,) = grid.pull_messages(ids[1:])
    assert gone.metadata.reply_to_message_id == ids[1]
    assert "node 2 is not online" in gone.error.reason
    assert inner.serve(2) == 0
    assert [node for node, _, _ in seen] == [1]


def test_residuals_of_records_that_take_turns_are_kept(federation, tmp_path):
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])

    @app.train()
    def train(message, context):
        ((key, record),) = message.content.array_records.items()
        arrays = local_step({n: a.numpy() for n, a in record.items()}, 1)
        return Message(RecordDict({key: to_record(arrays)}), reply_to=message)

    grid, _, _ = federation("balanced", nodes=1, app=app)
    store = NodeStore(tmp_path / "store", RUN_ID, 1)
    for key in ("generator", "critic", "generator"):
        content = RecordDict({key: to_record(initial_arrays())})
        (reply,) = grid.send_and_receive([Message(content, 1, "train")])
        assert not reply.has_error()
    for key in ("generator", "critic"):
        store.settle(grid._streams.node(1).accepted)
        assert store.residual(key)


def test_a_damaged_store_counts_as_lost(federation, tmp_path):
    grid, inner, _ = federation(SMALL)

    def damage():
        (file,) = (tmp_path / "store" / str(RUN_ID) / "2").glob("*.model")
        file.write_bytes(file.read_bytes()[:200])
        return {1, 2}

    rounds(grid, inner, tmp_path, [{1, 2}, damage])
    assert kinds_of(grid, 2) == ["keyframe", "delta", "keyframe"]


def test_only_runs_in_which_nothing_was_written_for_long_are_dropped(tmp_path):
    for run, node in ((11, 1), (12, 1), (13, 1)):
        NodeStore(tmp_path, run, node)
    os.utime(tmp_path / "11", (0, 0))
    os.utime(tmp_path / "11" / "1", (0, 0))
    os.utime(tmp_path / "12", (0, 0))  # its node still writes
    (tmp_path / "14").symlink_to("gone")  # as if another node were removing it
    NodeStore(tmp_path, 15, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["12", "13", "14", "15"]


def test_a_run_that_is_only_told_what_it_holds_is_alive(tmp_path):
    NodeStore(tmp_path, 11, 1)
    for folder in (tmp_path / "11", tmp_path / "11" / "1"):
        os.utime(folder, (time.time() - 31 * 86400,) * 2)
    NodeStore(tmp_path, 11, 1)  # a message arrives, and nothing is written
    NodeStore(tmp_path, 12, 1)
    assert (tmp_path / "11" / "1").is_dir()


def test_what_a_killed_write_leaves_is_removed_and_what_is_being_written_is_not(tmp_path):
    store = NodeStore(tmp_path, 11, 1)
    (store._folder / f".0123.model.{'ab' * 8}").write_bytes(b"half")
    with replacing(store._folder / "other.model") as temporary:
        NodeStore(tmp_path, 11, 1)
        assert list(store._folder.glob(".*")) == [temporary]
        temporary.write_bytes(b"whole")
    assert [path.name for path in store._folder.iterdir()] == ["other.model"]


@pytest.mark.parametrize("full_for", ["model", "pending", ""])
def test_a_full_disk_costs_bytes_and_no_training(
    federation, tmp_path, monkeypatch, caplog, full_for
):
    """Neither an update nor a residual is lost; the log names the store, once."""
    grid, inner, _ = federation("balanced", nodes=1)
    store, node = NodeStore(tmp_path / "store", RUN_ID, 1), grid._streams.node(1)
    rounds(grid, inner, tmp_path, [{1}])
    held = held_digest(tmp_path, 1)
    store.settle(node.accepted)
    before = store.residual("arrays")

    def full(path, data):
        if full_for in path.name:
            raise StorageError("cannot write") from OSError(28, "No space left on device")
        write_atomically(path, data)

    monkeypatch.setattr(store_module, "write_atomically", full)
    arrays = {n: a + np.float32(0.01) for n, a in initial_arrays().items()}
    for number in (2, 3):
        content = {"arrays": to_record(arrays), "config": ConfigRecord({"server-round": number})}
        (reply,) = grid.send_and_receive([Message(RecordDict(content), 1, "train")])
        assert not reply.has_error()
        got = to_arrays(reply.content["arrays"])
        assert any(np.any(got[n] != arrays[n]) for n in arrays)
    texts = [record.getMessage() for record in caplog.records]
    warnings = [text for text in texts if "Node 1 cannot keep" in text]
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
    if full_for != "pending":
        assert held_digest(tmp_path, 1) == held
    if full_for != "model":
        after = store.residual("arrays")
        assert {k: v.tobytes() for k, v in after.items()} == {
            k: v.tobytes() for k, v in before.items()
        }
    # what is held is known, so that no message is sent in vain
    monkeypatch.undo()
    arrays = to_record({n: a + np.float32(0.02) for n, a in initial_arrays().items()})
    list(grid.send_and_receive([Message(RecordDict({"arrays": arrays}), 1, "train")]))
    assert kinds_of(grid, 1)[-1] == "delta"
    assert "base-missing" not in kinds_of(grid, 1, "up")


@pytest.mark.parametrize("fate", ["accepted", "given up"])
def test_the_end_of_a_reply_that_cannot_be_written_is_told_again(
    federation, tmp_path, monkeypatch, fate
):
    """A full disk costs neither the update of that round nor what an earlier one dropped."""
    grid, _, _ = federation("balanced", nodes=1)
    store, node = NodeStore(tmp_path / "store", RUN_ID, 1), grid._streams.node(1)

    def message(number):
        config = ConfigRecord({"server-round": number})
        content = {"arrays": to_record(initial_arrays()), "config": config}
        return Message(RecordDict(content), 1, "train")

    list(grid.send_and_receive([message(1)]))
    # both under way at once: the end of the second is a sum
    ids = [i for number in (2, 3) for i in grid.push_messages([message(number)])]
    if fate == "accepted":
        assert len(list(grid.pull_messages(ids))) == 2
    else:
        grid._forget(ids)
    told = {*node.accepted, *node.given_up}

    def full(path, data):
        raise StorageError("cannot write") from OSError(28, "No space left on device")

    def no_room(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "write_atomically", full)
    monkeypatch.setattr(os, "replace", no_room)
    (reply,) = grid.send_and_receive([message(4)])
    assert not reply.has_error()
    assert node.troubled
    assert told <= {*node.accepted, *node.given_up}
    monkeypatch.undo()
    # both ends of the sum, or what was taken along
    kept, count = ("pending", 2) if fate == "accepted" else ("taken", 1)
    assert len(list(store._folder.glob(f"*.{kept}-*"))) == count
    (reply,) = grid.send_and_receive([message(5)])
    assert not reply.has_error()
    assert not node.troubled
    assert not told & {*node.accepted, *node.given_up}  # it knows
    assert len(list(store._folder.glob("*.pending-*"))) == 1  # of the last reply alone


def test_a_node_that_joins_late_starts_with_a_keyframe(federation, tmp_path):
    grid, inner, _ = federation(SMALL)
    rounds(grid, inner, tmp_path, [{1, 2}, {1, 2}, {1, 2, 3}, {1, 2, 3}])
    assert kinds_of(grid, 3) == ["keyframe", "delta"]


def test_a_lost_reply_neither_moves_the_version_nor_loses_the_residual(federation, tmp_path):
    grid, inner, _ = federation(SMALL)
    rounds(grid, inner, tmp_path, [{1, 2}, {1, 2}])
    store, node = NodeStore(tmp_path / "store", RUN_ID, 2), grid._streams.node(2)
    accepted = list(node.accepted)
    store.settle(accepted)
    before = store.residual("arrays")
    assert before
    inner.on_reply = lambda reply: None if reply.metadata.src_node_id == 2 else reply
    arrays = to_record(local_step(initial_arrays(), 5))
    strategy = FedAvg(min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0)
    replies = list(
        grid.send_and_receive(
            strategy.configure_train(3, arrays, ConfigRecord(), grid), timeout=0.05
        )
    )
    assert len(replies) == 1
    assert node.accepted == accepted
    assert not store.residual("arrays")  # the reply took it along
    store.settle(node.accepted, node.given_up)
    after = store.residual("arrays")
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}
    # the reply that did arrive moved the other node's residual on
    inner.on_reply = lambda reply: reply
    rounds(grid, inner, tmp_path, [{1, 2}])
    assert node.accepted != accepted
    assert not node.given_up  # it knows


def differences(arrays, trained):
    return {n: trained[n].astype(np.float64) - arrays[n] for n in ("conv.weight", "fc.weight")}


@pytest.mark.parametrize("fate", ["accepted", "reversed", "first lost", "second lost", "late"])
def test_every_residual_counts_once_with_two_messages_under_way(federation, tmp_path, fate):
    """What the server got and what the node keeps are together what was trained."""
    seen = []
    grid, _, _ = federation("balanced", nodes=1, app=make_app(tmp_path / "store", seen))
    record, store = to_record(initial_arrays()), NodeStore(tmp_path / "store", RUN_ID, 1)
    trained = {n: np.zeros(initial_arrays()[n].shape) for n in ("conv.weight", "fc.weight")}
    got = {n: np.zeros_like(total) for n, total in trained.items()}

    def message(number):
        config = ConfigRecord({"server-round": number})
        return Message(RecordDict({"arrays": record, "config": config}), 1, "train")

    def count(number, replies):
        change = differences(initial_arrays(), to_arrays(replies[0].content["arrays"]))
        local = differences(seen[0][2], local_step(seen[0][2], 1000 + number))
        for name in trained:
            got[name] += change[name]
            trained[name] += local[name]

    count(1, list(grid.send_and_receive([message(1)])))
    ids = [list(grid.push_messages([message(number)])) for number in (2, 3)]
    order = [(3, ids[1]), (2, ids[0])] if fate == "reversed" else [(2, ids[0]), (3, ids[1])]
    for number, wanted in order:
        if fate == {2: "first lost", 3: "second lost"}[number]:
            grid._forget(wanted)
            continue
        if fate == "late" and number == 2:
            count(4, list(grid.send_and_receive([message(4)])))
        count(number, list(grid.pull_messages(wanted)))
    for number in (5, 6):
        count(number, list(grid.send_and_receive([message(number)])))
    node = grid._streams.node(1)
    store.settle(node.accepted, node.given_up)
    left = store.residual("arrays")
    for name, total in trained.items():
        np.testing.assert_allclose(got[name] + left[name], total, atol=1e-5)
    assert not list(store._folder.glob("*.taken-*"))
    assert not list(store._folder.glob("*.pending-*"))


@pytest.mark.parametrize("preset", ["lossless", "fine", "balanced", "small"])
def test_forty_random_absences(federation, tmp_path, preset):
    grid, inner, _ = federation(Policy.preset(preset, history=5))
    choices = random.Random(7)
    plan = [set(choices.sample([1, 2, 3], choices.randint(1, 3))) for _ in range(40)]
    rounds(grid, inner, tmp_path, plan)
    assert not [e for e in grid.ledger.entries if e.kind == "error"]


def test_a_message_with_one_record_does_not_make_the_server_forget_the_other(federation, tmp_path):
    grid, _, _ = federation("balanced")
    node = grid._streams.node(1)
    for content in ({"arrays": 0, "control": 1}, {"arrays": 2}, {"arrays": 3, "control": 4}):
        records = {key: to_record(initial_arrays(seed)) for key, seed in content.items()}
        message = Message(RecordDict(records), dst_node_id=1, message_type="train")
        list(grid.send_and_receive([message]))
    assert set(node.held) == {"arrays", "control"}
    assert kinds_of(grid, 1) == ["keyframe+keyframe", "delta", "delta+delta"]


def test_messages_that_expired_are_forgotten(federation):
    grid, inner, _ = federation("balanced")
    inner.on_reply = lambda reply: None
    content = RecordDict({"arrays": to_record(initial_arrays())})
    list(grid.push_messages([Message(content, 1, "train", ttl=0.01)]))
    assert len(grid._sent) == 1
    deadline = time.time() + 5
    while time.time() < deadline and grid._expired() == []:
        time.sleep(0.01)
    list(grid.push_messages([Message(content, 2, "train")]))
    assert len(grid._sent) == 1
