"""Updates by the schemes of the literature, and nothing that fails open."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedMedian

from prunecast.client.training import compression_mod
from prunecast.compression.flower import CONTROL_RECORD, coded_record, open_coded
from prunecast.compression.schemes.layout import layout_of
from prunecast.compression.schemes.registry import SCHEMES, decode_payload, scheme
from prunecast.compression.schemes.sparse import Stc
from prunecast.compression.versions import (
    BadPayload,
    Instruction,
    NodeReport,
    SchemeRule,
    UpdateRule,
    is_statistic,
)
from prunecast.server.federation import CompressedGrid, Ledger, Policy
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import (
    RUN_ID,
    initial_arrays,
    local_step,
    make_app,
    reason_of,
    to_arrays,
    to_record,
)

pytestmark = pytest.mark.usefixtures("unpacked")  # they look into messages


def arrays_with_counter():
    return {**initial_arrays(), "bn.num_batches_tracked": np.array(7, np.int64)}


def client(store, *, seed=None):
    """Trains by `local_step`; every round otherwise, unless a seed is given."""
    app = ClientApp(mods=[compression_mod(store)] if store else [])

    @app.train()
    def train(message, context):
        assert store is None or CONTROL_RECORD not in message.content
        config = message.content.get("config", ConfigRecord())
        chosen = (
            int(config.get("server-round", 0)) + 100 * context.node_id if seed is None else seed
        )
        trained = local_step(to_arrays(message.content["arrays"]), chosen)
        if "bn.num_batches_tracked" in trained:
            trained["bn.num_batches_tracked"] = np.asarray(trained["bn.num_batches_tracked"] + 3)
        content = {"arrays": to_record(trained), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    return app


def by(one, down="dense"):
    return Policy(down=down, up=one.name, up_options=one.config())


def messages(grid, arrays, server_round=1):
    record = to_record(arrays)
    config = ConfigRecord({"server-round": server_round})
    return [
        Message(RecordDict({"arrays": record, "config": config}), node, "train")
        for node in grid.get_node_ids()
    ]


def exchange(grid, arrays, server_round=1):
    return list(grid.send_and_receive(messages(grid, arrays, server_round)))


@pytest.mark.parametrize("down", ["dense", "lattice"])
@pytest.mark.parametrize("coding", ["paper", "prunecast"])
@pytest.mark.parametrize("name", SCHEMES)
def test_strategies_see_sent_plus_update(tmp_path, name, coding, down):
    payloads = []
    inner = InProcessGrid(client(tmp_path), 2, run_id=RUN_ID)

    def note(reply):
        payloads.append(open_coded(reply.content["arrays"])[0])
        return reply

    inner.on_reply = note
    policy = by(scheme(name, coding=coding), down)
    grid = CompressedGrid(inner, policy, ledger=Ledger(keep=10), seed=5, poll_interval=0.01)
    sent = arrays_with_counter()
    replies = exchange(grid, sent)
    received = sent if down == "dense" else grid.published(to_record(sent)).arrays()
    assert [e.kind for e in grid.ledger.entries] == [
        "dense" if down == "dense" else "keyframe"
    ] * 2 + [name] * 2
    assert len(replies) == len(payloads) == 2
    for reply, payload in zip(replies, payloads, strict=True):
        assert set(reply.content) == {"arrays", "metrics"}
        got, update = to_arrays(reply.content["arrays"]), decode_payload(payload)
        assert list(got) == list(sent)
        assert got["bn.num_batches_tracked"] == 10
        for key, change in update.items():
            assert got[key].dtype == sent[key].dtype
            assert np.array_equal(got[key], sent[key] + change)
        # it is what the scheme makes of trained - received
        trained = local_step(received, 1 + 100 * reply.metadata.src_node_id)
        change = {k: trained[k] - received[k] for k in update}
        one = scheme(name, coding="paper")
        for key in range(1 if name not in ("qsgd", "signsgd") else 0):
            expected = one.decode(one.encode(change, one.init(layout_of(change)), key=key)[0])
            assert all(np.array_equal(expected[k], update[k]) for k in update)


@pytest.mark.parametrize("strategy", [FedAvg, FedMedian])
def test_any_strategy_and_nearly_the_dense_result(tmp_path, strategy):
    """int8 is close to exact: three rounds end near plain Flower's."""
    ends = []
    for policy in (Policy.preset("dense"), by(scheme("int8"))):
        inner = InProcessGrid(client(tmp_path / "store"), 3, run_id=RUN_ID)
        grid = CompressedGrid(inner, policy, poll_interval=0.01)
        chosen = strategy(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
        result = chosen.start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=3)
        ends.append(to_arrays(result.arrays))
    for key, dense in ends[0].items():
        assert not np.array_equal(dense, initial_arrays()[key]) or not dense.any()
        np.testing.assert_allclose(ends[1][key], dense, atol=2e-3)


def test_ledger_counts_what_plain_flower_would_have_sent(tmp_path):
    inner = InProcessGrid(client(tmp_path / "a"), 2, run_id=RUN_ID)
    dense = CompressedGrid(inner, "dense", ledger=Ledger(keep=10))
    exchange(dense, arrays_with_counter(), 4)
    grid = CompressedGrid(
        InProcessGrid(client(tmp_path / "b"), 2, run_id=RUN_ID),
        by(Stc(density=0.05)),
        ledger=Ledger(tmp_path / "ledger.jsonl", keep=10),
        poll_interval=0.01,
    )
    exchange(grid, arrays_with_counter(), 4)
    plain, ours = dense.ledger.entries, grid.ledger.entries
    assert [e.dense_bytes for e in ours] == [e.dense_bytes for e in plain]
    assert [e.kind for e in ours] == ["dense", "dense", "stc", "stc"]
    assert {e.round for e in ours} == {4}
    for entry in ours[:2]:  # what the instruction costs
        assert 0 < entry.payload_bytes - entry.dense_bytes < 600
    for entry in ours[2:]:
        assert entry.payload_bytes < 0.25 * entry.dense_bytes
        assert entry.encode_ms > 0
        assert entry.decode_ms > 0


def test_same_seed_same_payloads_and_every_message_another_key(tmp_path):
    runs = []
    for place, seed in (("a", 1), ("b", 1), ("c", 2)):
        payloads = []
        inner = InProcessGrid(client(tmp_path / place, seed=9), 2, run_id=RUN_ID)

        def note(reply, payloads=payloads):
            payloads.append(open_coded(reply.content["arrays"])[0])
            return reply

        inner.on_reply = note
        grid = CompressedGrid(inner, by(scheme("qsgd")), seed=seed, poll_interval=0.01)
        for _ in range(2):
            exchange(grid, initial_arrays())
        runs.append(payloads)
    assert runs[0] == runs[1] != runs[2]
    # both nodes, both rounds, have the very same update: only the key differs
    assert len(set(runs[0])) == 4


def test_what_a_scheme_keeps_belongs_to_accepted_replies(tmp_path):
    """A reply that is lost loses nothing: the next update goes on from the state before it."""
    stc = Stc(density=0.02)
    wanted = received = None
    inner = InProcessGrid(client(tmp_path), 1, run_id=RUN_ID)
    grid = CompressedGrid(inner, by(stc), poll_interval=0.01)
    state = None
    sent = initial_arrays()
    for server_round in range(1, 7):
        lost = server_round in (3, 4)
        inner.on_reply = (lambda reply: None) if lost else (lambda reply: reply)
        replies = list(grid.send_and_receive(messages(grid, sent, server_round), timeout=0.05))
        trained = local_step(sent, server_round + 100)
        change = {k: trained[k] - sent[k] for k in sent if not is_statistic(k)}
        state = state or stc.init(layout_of(change))
        if lost:
            assert not replies
            continue
        payload, state = stc.encode(change, state, key=0)
        got = to_arrays(replies[0].content["arrays"])
        for key, update in stc.decode(payload).items():
            assert np.array_equal(got[key], sent[key] + update)
        flat = np.concatenate([c.ravel().astype(float) for c in change.values()])
        came = np.concatenate([(got[k] - sent[k]).ravel().astype(float) for k in change])
        wanted = flat if wanted is None else wanted + flat
        received = came if received is None else received + came
    held = np.concatenate([a.ravel() for a in state.buffers["residual"].values()])
    np.testing.assert_allclose(received + held, wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["signsgd", "stc", "qsgd"])
def test_running_statistics_come_as_they_are(tmp_path, name):
    """A variance that a sign moves by one becomes negative, and the model NaN."""
    inner = InProcessGrid(client(tmp_path), 1, run_id=RUN_ID)
    sent = arrays_with_counter()
    (reply,) = exchange(CompressedGrid(inner, by(scheme(name)), poll_interval=0.01), sent)
    trained, got = local_step(sent, 101), to_arrays(reply.content["arrays"])
    for key in ("bn.running_mean", "bn.running_var"):
        assert np.array_equal(got[key], trained[key])
    assert not np.array_equal(got["fc.weight"], trained["fc.weight"])


def test_a_state_of_another_scheme_or_shape_starts_afresh(tmp_path):
    inner = InProcessGrid(client(tmp_path), 1, run_id=RUN_ID)
    for one in (Stc(), scheme("topk", momentum=0.9), scheme("topk")):
        for arrays in (initial_arrays(), {"w": np.ones((4, 4), np.float32)}):
            (reply,) = exchange(CompressedGrid(inner, by(one), poll_interval=0.01), arrays)
            assert not reply.has_error()


# --- what must not work ------------------------------------------------------------------------


def refusal(reply, *words):
    reason = reason_of(reply)
    assert reason
    for word in words:
        assert word in reason, reason
    return True


def test_a_client_without_the_mod_is_refused():
    for app in (client(None), make_app(None)):
        inner = InProcessGrid(app, 1, run_id=RUN_ID)
        grid = CompressedGrid(inner, by(Stc()), ledger=Ledger(keep=10), poll_interval=0.01)
        (reply,) = exchange(grid, initial_arrays())
        assert refusal(reply, "compression_mod()", "node 1")
        assert grid.ledger.entries[-1].kind == "error"


def test_a_server_without_schemes_is_served_plainly(tmp_path):
    for grid in (
        CompressedGrid(InProcessGrid(client(tmp_path), 1, run_id=RUN_ID), "dense"),
        CompressedGrid(InProcessGrid(client(tmp_path), 1, run_id=RUN_ID), "lossless"),
    ):
        (reply,) = exchange(grid, initial_arrays())
        got = to_arrays(reply.content["arrays"])
        expected = local_step(initial_arrays(), 101)
        for key, array in expected.items():
            np.testing.assert_allclose(got[key], array, atol=1e-2)


def test_a_coded_reply_cannot_be_read_without_the_grid(tmp_path):
    """A strategy that gets one past the grid stops, and does not average bytes."""
    inner = InProcessGrid(client(tmp_path), 1, run_id=RUN_ID)
    instruction = Instruction(SchemeRule("stc")).to_bytes()
    content = RecordDict(
        {
            "arrays": to_record(initial_arrays()),
            CONTROL_RECORD: ConfigRecord({"instruction": instruction}),
        }
    )
    (reply,) = inner.send_and_receive([Message(content, 1, "train")])
    assert not reply.has_error()
    with pytest.raises(TypeError, match="Unsupported"):
        next(iter(reply.content["arrays"].values())).numpy()


@pytest.mark.parametrize(
    "instruction",
    [
        Instruction(SchemeRule("zip")).to_bytes(),
        Instruction(SchemeRule("stc", {"density": 9})).to_bytes(),
        Instruction(SchemeRule("stc", {"speed": 9})).to_bytes(),
        b"{}",
        b"nothing",
    ],
)
def test_a_node_refuses_an_instruction_it_does_not_understand(tmp_path, instruction):
    inner = InProcessGrid(client(tmp_path), 1, run_id=RUN_ID)
    content = RecordDict(
        {
            "arrays": to_record(initial_arrays()),
            CONTROL_RECORD: ConfigRecord({"instruction": instruction}),
        }
    )
    (reply,) = inner.send_and_receive([Message(content, 1, "train")])
    assert refusal(reply, "message from the server was refused")


def test_training_that_diverges_is_an_error_of_the_node(tmp_path):
    app = ClientApp(mods=[compression_mod(tmp_path)])

    @app.train()
    def train(message, context):
        arrays = to_arrays(message.content["arrays"])
        arrays["fc.bias"][3] = np.nan
        return Message(RecordDict({"arrays": to_record(arrays)}), reply_to=message)

    grid = CompressedGrid(InProcessGrid(app, 1, run_id=RUN_ID), by(Stc()), poll_interval=0.01)
    (reply,) = exchange(grid, initial_arrays())
    assert refusal(reply, "NonFiniteUpdate", "fc.bias")


def test_an_update_that_cannot_be_quantised_is_an_error_of_the_node(tmp_path):
    app = ClientApp(mods=[compression_mod(tmp_path)])

    @app.train()
    def train(message, context):
        arrays = to_arrays(message.content["arrays"])
        arrays["fc.bias"][:] = 3e38
        return Message(RecordDict({"arrays": to_record(arrays)}), reply_to=message)

    grid = CompressedGrid(InProcessGrid(app, 1, run_id=RUN_ID), poll_interval=0.01)
    (reply,) = exchange(grid, initial_arrays())
    assert refusal(reply, "ModError", "the update was not sent", "fc.bias")


def stc_payload(arrays, name="stc"):
    one = scheme(name)
    floats = {k: a for k, a in arrays.items() if a.dtype.kind == "f" and not is_statistic(k)}
    return one.encode(floats, one.init(layout_of(floats)), key=0)[0]


def damaged(payload):
    return payload[:-9] + bytes([payload[-9] ^ 1]) + payload[-8:]


SHORT = {"w": np.ones(3, np.float32)}
HUGE = {k: np.full_like(a, 3e38) for k, a in initial_arrays().items()}
STATISTICS = {k: Array(a) for k, a in initial_arrays().items() if is_statistic(k)}
TAMPERED = {
    "damaged": (lambda a: coded_record(damaged(stc_payload(a)), {}), {}, "checksum"),
    "of other arrays": (lambda a: coded_record(stc_payload(SHORT), {}), {}, "not of the arrays"),
    "of another scheme": (lambda a: coded_record(stc_payload(a, "int8"), {}), {}, "scheme"),
    "with arrays nobody sent": (
        lambda a: coded_record(stc_payload(a), {"x": Array(np.ones(1))}),
        {},
        "other arrays",
    ),
    "dense": (lambda a: to_record(a), {}, "without the scheme"),
    "says nothing": (lambda a: coded_record(stc_payload(a), {}), {"report": b"[]"}, "understood"),
    "beyond float32": (
        lambda a: coded_record(stc_payload(HUGE), STATISTICS),
        {},
        "NaN or infinity",
    ),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_replies_that_are_refused(tmp_path, case):
    make, control, says = TAMPERED[case]
    inner = InProcessGrid(client(tmp_path), 1, run_id=RUN_ID)

    def tamper(reply):
        reply.content["arrays"] = make(initial_arrays())
        if control:
            reply.content[CONTROL_RECORD] = ConfigRecord(control)
        return reply

    inner.on_reply = tamper
    grid = CompressedGrid(inner, by(Stc(density=1.0)), ledger=Ledger(keep=10), poll_interval=0.01)
    start = HUGE if case == "beyond float32" else initial_arrays()
    (reply,) = exchange(grid, start)
    assert refusal(reply, says)
    assert grid.ledger.entries[-1].kind == "error"
    # and the node is not told that it was accepted
    inner.on_reply = lambda reply: reply
    seen = []
    push = inner.push_messages
    inner.push_messages = lambda m: push(seen.append(x) or x for x in m)
    exchange(grid, initial_arrays())
    told = Instruction.from_bytes(seen[0].content[CONTROL_RECORD]["instruction"])
    assert told.accepted == ()
    assert len(told.given_up) == 1


def test_messages_without_floats_pass_as_they_are(tmp_path):
    app = make_app(None)
    grid = CompressedGrid(InProcessGrid(app, 1, run_id=RUN_ID), by(Stc()), poll_interval=0.01)
    (reply,) = grid.send_and_receive([Message(RecordDict(), 1, "query")])
    assert reply.content["answer"]["n"] == 42


def test_records_of_the_wire():
    rule = SchemeRule("stc", {"density": 0.5, "scope": "tensor"}, 2**64 - 1)
    for instruction in (
        Instruction(rule, ("ab" * 4,)),
        Instruction(
            UpdateRule(3.0, 0.6, False),
            ("ab" * 4, "01" * 4),
            ("cd" * 4,),
            {"arrays": bytes(range(16))},
            tag="ef" * 4,
        ),
        Instruction(UpdateRule(3.0, 0.6, True, 1.5, 23)),
        Instruction(None, statistics=("gradient",)),
        Instruction(None),
        Instruction(UpdateRule(3.0), channels={"arrays": b"a plan", "other": b""}),
        Instruction(UpdateRule(3.0), tag="ef" * 4, fresh_seconds=90),
        Instruction(None, fresh_seconds=1 << 40),
    ):
        assert Instruction.from_bytes(instruction.to_bytes()) == instruction
    plain, rounds = (Instruction(UpdateRule(3.0, 0.6, True, 0.0, b)).to_bytes() for b in (0, 6))
    assert len(rounds) == len(plain)
    with pytest.raises(BadPayload, match="statistics of 24 bits"):  # the byte before the tag
        Instruction.from_bytes(rounds.replace(b"\x06" + bytes(4), b"\x18" + bytes(4)))
    whole = Instruction(None, channels={"arrays": b"a plan"}).to_bytes()
    for cut in range(1, 14):
        with pytest.raises(BadPayload, match="ends too early"):
            Instruction.from_bytes(whole[:-cut])
    report = NodeReport({"arrays": bytes(16)}, ("control",), 1.25)
    assert NodeReport.from_bytes(report.to_bytes()) == report
    stale = NodeReport(as_sent=True, stale=True)
    assert NodeReport.from_bytes(stale.to_bytes()) == stale
    assert len(NodeReport(encode_ms=0.0).to_bytes()) == len(NodeReport(encode_ms=1e9).to_bytes())
    for data in (
        *(b"", b"[", b"{}", b'{"r":[1],"a":"","u":{}}', b'{"r":["stc",{},"1"],"a":"","u":{}}'),
        *(b'{"r":[],"a":"","u":{},"s":3}', b'{"r":[],"a":"","u":{},"s":[3]}'),
        *(b'{"r":[],"a":"%s","u":{}}' % (b"a" * 300), b'{"r":[],"a":"../x","u":{}}'),
        *(b'{"r":[1%s,0.6,1],"a":"","u":{}}' % (b"0" * 400), b'{"r":[NaN,0.6,1],"a":"","u":{}}'),
        *(b'{"h":{},"m":[],"t":"1"}', b'{"h":{"a":"b"},"m":[],"t":"000000000"}', None, 3),
    ):
        for kind in (Instruction, NodeReport):
            with pytest.raises(BadPayload):
                kind.from_bytes(data)
    exact = {"n": Array(np.arange(3))}
    payload, others = open_coded(coded_record(b"abc", exact))
    assert payload == b"abc"
    assert others["n"].numpy().tolist() == [0, 1, 2]
    assert open_coded(ArrayRecord()) is None
    assert open_coded(to_record(initial_arrays())) is None
    assert open_coded(to_record({"prunecast": np.ones(3)})) is None
