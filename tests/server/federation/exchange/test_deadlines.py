"""Rounds that end before every reply is in, and what becomes of the replies that come later."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian

from prunecast.client.training import compression_mod, incoming
from prunecast.client.training.store import NodeStore
from prunecast.compression.flower.internals import make_message
from prunecast.server.federation import (
    Deadlines,
    FederationError,
    NodesFailed,
    NodesMissing,
    Policy,
    Run,
    read_events,
    server_app,
)
from prunecast.server.federation.exchange.deadlines import Closing, staleness_weight
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import RUN_ID, initial_arrays, local_step, make_app, to_arrays, to_record

APPLY = Deadlines(replies=2, late="apply")


def message(node: int, number: int, seed: int = 0, kind: str = "train") -> Message:
    config = ConfigRecord({"server-round": number})
    content = RecordDict({"arrays": to_record(initial_arrays(seed)), "config": config})
    return Message(content, node, kind)


def round_of(grid: Any, number: int, seed: int = 0, kind: str = "train", **more: Any) -> list[Any]:
    content = message(1, number, seed, kind).content  # one for all
    messages = [Message(content, node, kind) for node in (1, 2, 3)]
    return list(grid.send_and_receive(messages, **more))


def kinds_of(grid: Any, node: int, direction: str = "up") -> list[str]:
    return [e.kind for e in grid.ledger.entries if e.node == node and e.direction == direction]


def nodes_of(replies: list[Any]) -> list[int]:
    return [reply.metadata.src_node_id for reply in replies]


# -- when a round ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_round_ends_when_enough_replies_are_in(federation: Any, kind: str) -> None:
    grid, inner, seen = federation("balanced", deadlines=Deadlines(replies=2))
    inner.busy.add(2)
    assert nodes_of(round_of(grid, 1, kind=kind)) == [1, 3]
    assert [node for node, _, _ in seen] == [1, 3]


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_round_ends_at_its_deadline(federation: Any, kind: str) -> None:
    grid, inner, _ = federation("balanced", deadlines=Deadlines(seconds=0.2))
    inner.busy.add(2)
    assert nodes_of(round_of(grid, 1, kind=kind, timeout=3600)) == [1, 3]


def test_an_error_is_no_reply_that_counts(federation: Any, tmp_path: Path) -> None:
    good, plain = make_app(tmp_path / "store"), make_app(None)
    grid, _, _ = federation(
        "balanced", app={1: plain, 2: good, 3: good}, deadlines=Deadlines(replies=2)
    )
    replies = round_of(grid, 1)
    assert [reply.has_error() for reply in replies] == [True, False, False]


def test_the_shorter_of_timeout_and_deadline_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for seconds, timeout, limit in ((5.0, 60.0, 5.0), (60.0, 5.0, 5.0), (0.0, 5.0, 5.0)):
        now = 100.0
        closing = Closing(Deadlines(seconds=seconds), 3, timeout)
        now += limit - 0.1
        assert not closing.over
        now += 0.2
        assert closing.over
    now = 0.0
    assert not Closing(Deadlines(), 3, None).timed_out


# -- stale messages -------------------------------------------------------------------------------


def at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the node's clock be so far ahead."""
    now = time.time
    monkeypatch.setattr(incoming, "time", SimpleNamespace(time=lambda: now() + seconds))


def test_a_node_does_not_train_on_a_stale_message_and_catches_up(
    federation: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    grid, inner, seen = federation("balanced", deadlines=Deadlines(replies=2, seconds=50))
    round_of(grid, 1)
    inner.busy.add(2)
    for number in (2, 3):
        round_of(grid, number, seed=number)
    trained = len(seen)
    with monkeypatch.context() as patch:
        at(patch, 55)  # between deadline and time to live
        assert inner.serve(2) == 2
    assert len(seen) == trained
    store = NodeStore(tmp_path / "store", RUN_ID, 2)
    held = store.held("arrays")
    assert held is not None
    # the second built on the first, which it has kept without training on it
    assert held.digest == grid.published(to_record(initial_arrays(3))).digest
    inner.busy.clear()
    assert nodes_of(round_of(grid, 4, seed=4)) == [1, 2, 3]
    assert kinds_of(grid, 2) == ["update", "stale", "stale", "update"]
    assert kinds_of(grid, 2, "down") == ["keyframe", "delta", "delta", "delta"]
    stale = [e for e in grid.ledger.entries if e.kind == "stale"]
    assert all(e.payload_bytes < 500 for e in stale)
    store.settle(grid._streams.node(2).accepted, grid._streams.node(2).given_up)
    assert not list(store._folder.glob("*.taken-*"))
    assert not list(store._folder.glob("*.pending-*"))


def test_a_node_whose_clock_is_wrong_trains_all_the_same(
    federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was right when last heard of; refusing costs one more exchange."""
    grid, _, seen = federation("balanced", deadlines=Deadlines(seconds=50))
    round_of(grid, 1)
    at(monkeypatch, 3600)
    replies = round_of(grid, 2, seed=2)
    assert [reply.has_error() for reply in replies] == [False] * 3
    assert len(seen) == 6
    for node in (1, 2, 3):
        assert kinds_of(grid, node) == ["update", "stale", "update"]
        assert kinds_of(grid, node, "down") == ["keyframe", "delta", "reuse"]


def test_what_is_known_of_a_clock_is_allowed_for(federation: Any) -> None:
    """Nothing is asked in vain of a node that is an hour ahead, nor before its clock is known."""
    grid, inner, _ = federation("balanced", nodes=3, deadlines=Deadlines(seconds=50))
    lived: list[float] = []
    push = inner.push_messages

    def noting(messages: Any) -> Any:
        messages = list(messages)
        lived.extend(m.metadata.ttl for m in messages)
        return push(messages)

    def ahead(reply: Message) -> Message:
        if reply.metadata.src_node_id == 2:
            reply.metadata.__dict__["_created_at"] += 3600
        return reply

    inner.push_messages, inner.on_reply = noting, ahead
    round_of(grid, 1)
    assert min(lived) > 40_000  # Flower's own: it lets no node reply that takes it to be over
    round_of(grid, 2)
    assert lived[3] == lived[5] == 110
    assert 3650 < lived[4] < 3711


@pytest.mark.parametrize("stated", [float("inf"), float("nan"), 1e300, -1e300])
def test_a_clock_that_is_none_ends_no_round(federation: Any, stated: float) -> None:
    grid, inner, _ = federation("balanced", deadlines=Deadlines(seconds=50))

    def odd(reply: Message) -> Message:
        if reply.metadata.src_node_id == 2:
            reply.metadata.__dict__["_created_at"] = stated
        return reply

    inner.on_reply = odd
    for number in (1, 2, 3):
        replies = round_of(grid, number, seed=number)
        assert [reply.has_error() for reply in replies] == [False] * 3


def test_a_message_that_nobody_came_to_is_not_delivered_for_ever(
    federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, inner, seen = federation("balanced", deadlines=Deadlines(replies=2, seconds=50))
    round_of(grid, 1)
    inner.busy.add(2)
    round_of(grid, 2, seed=2)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 200)
    trained = len(seen)
    assert inner.serve(2) == 1
    assert len(seen) == trained
    assert kinds_of(grid, 2) == ["update"]


def test_rounds_that_end_by_replies_say_what_is_stale(
    federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that is many rounds behind trains on the last of its messages."""
    grid, inner, seen = federation("balanced", deadlines=Deadlines(replies=2))
    inner.busy.add(2)
    round_of(grid, 1)
    inner.busy.clear()
    round_of(grid, 2)
    inner.serve(2)
    inner.busy.add(2)
    for number in (3, 4):
        round_of(grid, number, seed=number)
    trained = len(seen)
    with monkeypatch.context() as patch:
        at(patch, 40)
        inner.serve(2)
    assert len(seen) == trained
    assert grid._late.fresh_seconds("train") == 30.0
    round_of(grid, 5, seed=5)
    assert kinds_of(grid, 2)[-2:] == ["stale", "stale"]


# -- late replies ---------------------------------------------------------------------------------


def test_a_late_reply_is_looked_at_once_and_discarded(
    federation: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It costs itself: the node's next message is a delta from what it holds by then."""
    grid, inner, _ = federation("balanced", deadlines=Deadlines(replies=2))
    round_of(grid, 1)
    store, node = NodeStore(tmp_path / "store", RUN_ID, 2), grid._streams.node(2)
    store.settle(node.accepted)
    before = store.residual("arrays")
    inner.busy.add(2)
    round_of(grid, 2, seed=2)
    inner.serve(2)
    inner.busy.clear()
    replies = round_of(grid, 3, seed=3)
    assert nodes_of(replies) == [1, 2, 3]
    assert kinds_of(grid, 2) == ["update", "late", "update"]
    assert kinds_of(grid, 2, "down") == ["keyframe", "delta", "delta"]
    late = [e for e in grid.ledger.entries if e.kind == "late"]
    assert [(e.round, e.payload_bytes > 500) for e in late] == [(2, True)]
    assert before
    said = [r.getMessage() for r in caplog.records if "after its round had ended" in r.getMessage()]
    assert said == ["Node 2: a reply came after its round had ended, and was discarded"]
    grid.sum_up()
    assert "1 replies came late, and 0 of them were applied" in caplog.text


@pytest.mark.parametrize("late", ["discard", "apply"])
@pytest.mark.parametrize("policy", ["balanced", "lossless", "stc"])
def test_what_a_node_is_sent_builds_on_what_is_under_way_to_it(
    federation: Any, policy: str, late: Any
) -> None:
    """A node keeps the version of every message, in their order, and nobody has to say it twice."""
    chosen: Any = Policy(down="stc", up="stc") if policy == "stc" else policy
    grid, inner, seen = federation(chosen, deadlines=Deadlines(replies=2, late=late))
    round_of(grid, 1)
    inner.busy.add(2)
    for number in (2, 3, 4):
        round_of(grid, number, seed=number)
    inner.serve(2)
    inner.busy.clear()
    round_of(grid, 5, seed=5)
    if policy != "lossless":  # these models have nothing in common that a delta could leave out
        coded = "scheme" if policy == "stc" else "delta"
        assert kinds_of(grid, 2, "down") == ["keyframe", *[coded] * 4]
    assert not {"base-missing", "error"} & set(kinds_of(grid, 2))
    read = {n: {k: a.tobytes() for k, a in arrays.items()} for n, _, arrays in seen}
    assert read[2] == read[1]  # the last that each of them got


def test_a_node_that_lost_a_base_is_not_sent_what_builds_on_it(
    federation: Any, tmp_path: Path
) -> None:
    grid, inner, _ = federation("balanced", deadlines=Deadlines(replies=2))
    round_of(grid, 1)
    inner.busy.add(2)
    for number in (2, 3):
        round_of(grid, number, seed=number)
    for path in (tmp_path / "store" / str(RUN_ID) / "2").glob("*.model"):
        path.unlink()
    inner.serve(2)
    inner.busy.clear()
    assert nodes_of(round_of(grid, 4, seed=4)) == [1, 2, 3]
    assert kinds_of(grid, 2, "down") == ["keyframe", "delta", "delta", "keyframe"]
    assert nodes_of(round_of(grid, 5, seed=5)) == [1, 2, 3]
    assert kinds_of(grid, 2, "down")[-1] == "delta"


@pytest.mark.parametrize(("rounds", "applied"), [(16, True), (17, False)])
def test_what_answers_more_than_sixteen_rounds_ago_is_discarded(
    federation: Any, tmp_path: Path, rounds: int, applied: bool
) -> None:
    """Also where its node has not been asked since, and nothing newer is waited for."""
    grid, inner, _ = federation("balanced", deadlines=APPLY)
    inner.busy.add(3)
    round_of(grid, 1)
    for number in range(2, 1 + rounds):
        replies = list(grid.send_and_receive([message(node, number) for node in (1, 2)]))
        assert nodes_of(replies) == [1, 2]
    inner.serve(3)
    last = [message(node, 1 + rounds) for node in (1, 2)]
    found = nodes_of(list(grid.send_and_receive(last)))
    assert found == ([3, 1, 2] if applied else [1, 2])
    node = grid._streams.node(3)
    assert [len(node.accepted), len(node.given_up)] == [applied, not applied]


@pytest.mark.parametrize("late", ["discard", "apply"])
def test_a_late_error_is_one(federation: Any, tmp_path: Path, late: Any) -> None:
    """With its reason in the ledger; and what the node holds is known."""

    def failing(message: Message, context: Context, call_next: Any) -> Message:
        if message.content["config"]["server-round"] == 2:
            raise RuntimeError("CUDA out of memory")
        reply: Message = call_next(message, context)
        return reply

    app = ClientApp(mods=[compression_mod(tmp_path / "store"), failing])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = local_step(to_arrays(message.content["arrays"]), int(context.node_id))
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": to_record(arrays), "metrics": metrics})
        return Message(content, reply_to=message)

    grid, inner, _ = federation("balanced", app=app, deadlines=Deadlines(replies=2, late=late))
    round_of(grid, 1)
    inner.busy = {1, 2, 3}
    round_of(grid, 2, seed=2, timeout=0.02)
    inner.serve(2)
    inner.busy.clear()
    assert nodes_of(round_of(grid, 3, seed=3)) == [1, 2, 3]
    failed = [e for e in grid.ledger.entries if e.kind == "error"]
    assert [(e.node, e.reason) for e in failed] == [(2, "RuntimeError: CUDA out of memory")]
    assert kinds_of(grid, 2, "down") == ["keyframe", "delta", "delta"]


@pytest.mark.parametrize("policy", ["balanced", "lossless", "dense", "stc"])
def test_a_late_update_counts_in_the_next_round_with_its_weight(
    federation: Any, policy: str
) -> None:
    """As much of the change that it brought, on top of what is sent in that round."""
    chosen: Any = Policy.preset("balanced", up="stc") if policy == "stc" else policy
    grid, inner, _ = federation(chosen, deadlines=APPLY)
    fresh = federation(chosen, deadlines=Deadlines())[0]
    round_of(grid, 1)
    round_of(fresh, 1)
    inner.busy.add(2)
    round_of(grid, 2, seed=2)
    (expected,) = (r for r in round_of(fresh, 2, seed=2) if r.metadata.src_node_id == 2)
    inner.serve(2)
    inner.busy.clear()
    replies = round_of(grid, 3, seed=3)
    assert nodes_of(replies) == [2, 1, 2, 3]
    sent, now = initial_arrays(2), initial_arrays(3)
    got, trained = to_arrays(replies[0].content["arrays"]), to_arrays(expected.content["arrays"])
    weight = staleness_weight(1, 0.5)
    for name in sent:
        start = now if name.startswith("bn.running") else sent
        change = trained[name] - start[name]
        np.testing.assert_allclose(got[name], now[name] + weight * change, atol=2e-6)
    assert replies[0].content["metrics"]["num-examples"] == 20
    assert nodes_of(round_of(grid, 4)) == [1, 2, 3]  # once


def test_a_late_update_is_merged_as_the_others_are(
    federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's average of replies among which there is a late one forms no array of each."""
    grid, inner, _ = federation("balanced", deadlines=APPLY)
    round_of(grid, 1)
    inner.busy.add(2)
    round_of(grid, 2, seed=2)
    inner.serve(2)
    inner.busy.clear()
    replies = round_of(grid, 3, seed=3)
    arrays = [to_arrays(reply.content["arrays"]) for reply in replies]
    weights = np.array([reply.content["metrics"]["num-examples"] for reply in replies], float)
    mean, _ = FedAvg().aggregate_train(3, replies)
    assert mean is not None
    for name, array in to_arrays(mean).items():
        expected = np.average([a[name] for a in arrays], axis=0, weights=weights)
        np.testing.assert_allclose(array, expected, atol=1e-6)


def test_residuals_of_late_updates_that_are_applied_count_once(
    federation: Any, tmp_path: Path
) -> None:
    """Each is accepted when it is applied, and what the server got is what the node sent."""
    grid, inner, _ = federation("balanced", deadlines=APPLY)
    round_of(grid, 1)
    inner.busy.add(2)
    for number in (2, 3):
        round_of(grid, number, seed=2)
    inner.serve(2)
    node = grid._streams.node(2)
    assert not node.given_up  # nobody has given anything up
    inner.busy.clear()
    assert nodes_of(round_of(grid, 4, seed=4)) == [2, 2, 1, 2, 3]
    assert len(node.accepted) == 3
    store = NodeStore(tmp_path / "store", RUN_ID, 2)
    store.settle(node.accepted, node.given_up)
    assert not list(store._folder.glob("*.taken-*"))
    assert not list(store._folder.glob("*.pending-*"))


def test_a_late_update_of_a_counter_that_strategies_make_floats_of(federation: Any) -> None:
    """As FedAdam does of BatchNorm's: it stays a whole number, and an array."""
    grid, inner, _ = federation("balanced", deadlines=APPLY)

    def ask(number: int, counter: Any) -> list[Any]:
        arrays = {**initial_arrays(), "num_batches_tracked": np.asarray(counter)}
        config = ConfigRecord({"server-round": number})
        content = RecordDict({"arrays": to_record(arrays), "config": config})
        return list(grid.send_and_receive([Message(content, n, "train") for n in (1, 2, 3)]))

    ask(1, 3)
    inner.busy.add(2)
    ask(2, 3.2)
    inner.serve(2)
    inner.busy.clear()
    replies = ask(3, 6.6)
    assert nodes_of(replies) == [2, 1, 2, 3]
    found = [reply.content["arrays"]["num_batches_tracked"].numpy() for reply in replies]
    assert [(a.dtype, a.shape, int(a)) for a in found] == [(np.dtype("i8"), (), 7)] * 4


@pytest.mark.parametrize("up", ["dense", "stc"])
def test_a_late_update_of_arrays_of_its_own_is_none_of_another_nodes(
    federation: Any, tmp_path: Path, up: str
) -> None:
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        records = message.content.array_records.items()
        trained = {key: to_record(local_step(to_arrays(r), 1)) for key, r in records}
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({**trained, "metrics": metrics}), reply_to=message)

    grid, inner, _ = federation(Policy(up=up), app=app, deadlines=APPLY)

    def ask(number: int) -> list[Any]:
        shared = to_record(initial_arrays(number))
        own = {n: to_record({"head": np.full(40, 100.0 * n, np.float32)}) for n in (1, 2, 3)}
        contents = {n: RecordDict({"arrays": shared, "own": own[n]}) for n in own}
        return list(grid.send_and_receive([Message(c, n, "train") for n, c in contents.items()]))

    inner.busy.add(3)
    ask(1)
    inner.serve(3)
    inner.busy.clear()
    replies = ask(2)
    assert nodes_of(replies) == [1, 2, 3]
    for number, reply in enumerate(replies, 1):
        assert abs(float(reply.content["own"]["head"].numpy()[0]) - 100 * number) < 10 * number


def test_what_can_be_no_update_of_what_is_sent_now_is_discarded(
    federation: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A gradient says nothing of the model that others train by now."""
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = to_arrays(message.content["arrays"])
        gradient = {name: 1e-3 * array for name, array in arrays.items()}
        return Message(RecordDict({"arrays": to_record(gradient)}), reply_to=message)

    grid, inner, _ = federation("balanced", app=app, deadlines=APPLY)
    inner.busy.add(2)
    round_of(grid, 1)
    inner.serve(2)
    inner.busy.clear()
    assert nodes_of(round_of(grid, 2, seed=2)) == [1, 2, 3]
    assert "was discarded" in caplog.text
    assert len(grid._streams.node(2).accepted) == 1


def test_a_reply_of_too_many_rounds_ago_is_waited_for_no_more(federation: Any) -> None:
    grid, inner, _ = federation("balanced", deadlines=APPLY)
    inner.busy.add(2)
    for number in range(1, 19):
        round_of(grid, number)
    assert len(grid._late._pending) <= 17
    inner.serve(2)
    replies = round_of(grid, 19)
    assert len(replies) <= 2 + 17


def test_a_late_reply_that_never_comes_is_given_up(federation: Any) -> None:
    """The SuperLink says so where the message is over, or the node gone."""
    grid, inner, _ = federation("balanced", deadlines=APPLY)
    inner.busy.add(2)
    round_of(grid, 1)
    (tagged,) = (sent.tag for sent in grid._late._pending.values())
    for message_id in grid._late._pending:
        inner._waiting[message_id] = 0.0
    assert nodes_of(round_of(grid, 2)) == [1, 3]
    assert grid._streams.node(2).given_up == [tagged]
    assert len(grid._late._pending) == 1


def test_evaluations_that_come_late_count_nowhere(federation: Any) -> None:
    grid, inner, _ = federation("balanced", deadlines=APPLY)
    inner.busy.add(2)
    round_of(grid, 1, kind="evaluate")
    inner.serve(2)
    inner.busy.clear()
    assert nodes_of(round_of(grid, 1, kind="evaluate")) == [1, 2, 3]
    assert kinds_of(grid, 2) == ["late", "none"]
    assert kinds_of(grid, 2, "down") == ["keyframe", "reuse"]


def test_late_updates_of_slices_are_refused_at_once(federation: Any) -> None:
    policy = Policy.preset("balanced", widths={"small": 0.5})
    with pytest.raises(FederationError, match="late = 'discard'"):
        federation(policy, deadlines=APPLY)


@pytest.mark.parametrize("late", ["discard", "apply"])
@pytest.mark.parametrize("strategy", [FedAvg, FedAdam, FedMedian])
def test_any_strategy_goes_on_without_a_slow_node(
    tmp_path: Path, strategy: Callable[..., Any], late: Any
) -> None:
    """A node that answers one round late every time; the run goes on and says what it cost."""
    inner = InProcessGrid(make_app(tmp_path / "store"), 3, run_id=RUN_ID)
    inner.busy.add(2)
    push = inner.push_messages

    def pushing(messages: Any) -> Any:
        inner.serve(2)  # what it was sent in the round before
        return push(messages)

    inner.push_messages = pushing  # type: ignore[method-assign]
    run = Run(inner, strategy(), folder=tmp_path / "run", deadlines=Deadlines(replies=2, late=late))
    result = run.start(to_record(initial_arrays()), num_rounds=4)
    assert all(np.isfinite(a).all() for a in to_arrays(result.arrays).values())
    rounds = [e for e in read_events(tmp_path / "run" / "events.jsonl") if "nodes" in e]
    nodes = [e["nodes"] for e in rounds if e["event"] == "round-finished"][1:]
    assert [n["late"] for n in nodes] == [2] * 4  # training and evaluation
    assert [n["failures"] for n in nodes] == [0] * 4
    # it trains when the next messages go out, which are those to evaluate
    assert sum(n["late_applied"] for n in nodes) == (3 if late == "apply" else 0)


def test_a_run_in_which_everybody_is_late_was_for_nothing(tmp_path: Path) -> None:
    inner = InProcessGrid(make_app(tmp_path / "store"), 2, run_id=RUN_ID)
    inner.busy = {1, 2}
    run = Run(inner, FedAvg(), deadlines=Deadlines(seconds=0.1))
    with pytest.raises(NodesFailed, match=r"no reply of the whole run could be used.*in time"):
        run.start(to_record(initial_arrays()), num_rounds=1)


# -- nodes that are waited for --------------------------------------------------------------------


def test_a_start_waits_for_nodes_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inner = InProcessGrid(make_app(tmp_path / "store"), 3, run_id=RUN_ID)
    inner.online = {1}
    joining = itertools.chain([2, 3], itertools.repeat(3))
    monkeypatch.setattr(time, "sleep", lambda _: inner.online.add(next(joining)))
    run = Run(inner, FedAvg(), folder=tmp_path / "run", deadlines=Deadlines(min_nodes=3))
    run.start(to_record(initial_arrays()), num_rounds=1)
    first = next(e for e in read_events(tmp_path / "run" / "events.jsonl") if "nodes" in e)
    assert first["nodes"] == 3 or first["event"] == "round-finished"
    said = [r.getMessage() for r in caplog.records if "Waiting for nodes:" in r.getMessage()]
    assert said == [
        "Waiting for nodes: 1 of 3 connected; for 3600 s at most.",
        "Waiting for nodes: 2 of 3 connected; for 3600 s at most.",
    ]


def test_a_start_that_waits_in_vain_ends_with_an_error(tmp_path: Path) -> None:
    inner = InProcessGrid(make_app(tmp_path / "store"), 2, run_id=RUN_ID)
    run = Run(inner, FedAvg(), folder=tmp_path / "run", deadlines=Deadlines(min_nodes=3, wait=0))
    with pytest.raises(NodesMissing, match=r"waited 0 s for 3 nodes \(min-nodes\), and 2 conn"):
        run.start(to_record(initial_arrays()), num_rounds=1)
    *_, last = read_events(tmp_path / "run" / "events.jsonl")
    assert last["event"] == "run-failed"


def test_flowers_endless_wait_for_nodes_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its strategies ask once a second, for ever; here a second passes at once."""
    inner = InProcessGrid(make_app(tmp_path / "store"), 2, run_id=RUN_ID)
    clock, passed = time.monotonic, itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: clock() + next(passed))
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda _: None)
    run = Run(inner, FedAvg(min_available_nodes=3), deadlines=Deadlines(wait=30.0))
    with pytest.raises(NodesMissing, match="waited 30 s for nodes: 2 connected, and the strategy"):
        run.start(to_record(initial_arrays()), num_rounds=1)


# -- as they are configured -----------------------------------------------------------------------


def test_the_run_config_names_them(tmp_path: Path) -> None:
    inner = InProcessGrid(make_app(tmp_path / "store"), 3, run_id=RUN_ID)
    inner.busy.add(3)
    config: dict[str, Any] = {
        "model": "support.torch_classifier:Classifier",
        "num-server-rounds": 1,
        "folder": str(tmp_path / "run"),
        "round-replies": 2,
        "round-deadline": 60,
        "late": "apply",
        "late-exponent": 0.25,
        "min-nodes": 3,
        "wait": 5.0,
    }
    server_app.app(inner, Context(RUN_ID, 0, {}, RecordDict(), config))
    *_, finished, _ = read_events(tmp_path / "run" / "events.jsonl")
    assert (finished["nodes"]["trained"], finished["nodes"]["late"]) == (2, 2)
    assert Deadlines.from_run_config(config) == Deadlines(2, 60.0, "apply", 0.25, 3, 5.0)
    assert Deadlines.from_run_config({}) == Deadlines()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"round-replies": -1}, "round-replies = -1: give 0 or a number above"),
        ({"round-deadline": float("nan")}, "round-deadline = nan"),
        ({"round-replies": 0.5}, "round-replies = 0.5 in the run config is no int"),
        ({"late": "keep"}, "late = 'keep': choose 'discard' or 'apply'"),
        ({"late-exponent": -0.5}, "late-exponent = -0.5"),
        ({"wait": float("inf")}, "wait = inf"),
    ],
)
def test_deadlines_that_cannot_be_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(FederationError, match=said):
        Deadlines.from_run_config(config)


def test_weights_of_staleness() -> None:
    assert [staleness_weight(s, 0.5) for s in (0, 3, 8)] == [1.0, 0.5, 1 / 3]
    assert staleness_weight(5, 0.0) == 1.0


def test_a_copy_of_a_late_reply_is_taken_once(federation: Any) -> None:
    grid, inner, _ = federation("balanced", deadlines=APPLY)
    inner.busy.add(2)
    round_of(grid, 1)
    inner.serve(2)
    pull = inner.pull_messages
    inner.pull_messages = lambda ids: [
        copy for m in pull(ids) for copy in (m, make_message(m.metadata, m.content))
    ]
    assert nodes_of(round_of(grid, 2)).count(2) == 1
