"""Messages of every shape Flower allows: several records, none, personal ones, custom loops."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from prunecast.client.training import compression_mod, current_masks
from prunecast.compression.flower import CONTROL_RECORD, payload_of, payload_record
from prunecast.compression.flower.envelope import is_packed, unpack
from prunecast.compression.flower.internals import (
    Measured,
    object_bytes,
    own_bytes,
    serialised_objects,
    uncached,
    unsent,
)
from prunecast.compression.versions import Instruction, UpdateRule
from prunecast.server.federation import FederationError, Policy
from prunecast.server.federation.exchange.batches import Batch, Prepared
from prunecast.server.federation.exchange.packing import APART, pack_together
from support.federation import initial_arrays, local_step, make_app, seed_of, to_arrays, to_record

SMALL = Policy.preset("small", pruning_begin=0, pruning_end=1)


def message_to(node, content, message_type="train"):
    return Message(content, dst_node_id=node, message_type=message_type)


def echo_app(tmp_path, change=lambda key, arrays: arrays):
    """Replies with every record it got, changed."""
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])

    @app.train()
    def train(message, context):
        content = RecordDict({"metrics": MetricRecord({"num-examples": 1})})
        for key, record in message.content.array_records.items():
            content[key] = to_record(change(key, to_arrays(record)))
        return Message(content, reply_to=message)

    return app


def kinds(grid, direction):
    return [e.kind for e in grid.ledger.entries if e.direction == direction]


def test_control_variates_have_their_own_stream_and_are_never_pruned(federation, tmp_path):
    app = echo_app(tmp_path, lambda _, arrays: local_step(arrays, 3))
    grid, _, _ = federation(SMALL, app=app)
    model, control = initial_arrays(1), initial_arrays(2)
    for number in range(1, 4):
        content = RecordDict({"arrays": to_record(model), "control": to_record(control)})
        replies = list(grid.send_and_receive([message_to(n, content) for n in (1, 2, 3)]))
        assert [list(r.content.array_records) for r in replies] == [["arrays", "control"]] * 3
        assert grid.published(to_record(model)).sparsity() == pytest.approx(0.8, abs=0.01)
        assert grid.published(to_record(control), key="control").sparsity() == 0
        model = to_arrays(replies[0].content["arrays"])
        control = to_arrays(replies[0].content["control"])
        assert kinds(grid, "up")[-3:] == ["update+update"] * 3
        expected = "keyframe+keyframe" if number == 1 else "delta+delta"
        assert kinds(grid, "down")[-3:] == [expected] * 3


def test_what_comes_beside_the_model_in_its_layout_is_no_update_of_it(federation, tmp_path):
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])
    variates = local_step(initial_arrays(5), 1)

    @app.train()
    def train(message, context):
        arrays = local_step(to_arrays(message.content["arrays"]), 1)
        content = RecordDict({"arrays": to_record(arrays), "own": to_record(variates)})
        return Message(content, reply_to=message)

    grid, _, _ = federation("balanced", nodes=1, app=app)
    content = RecordDict({"arrays": to_record(initial_arrays())})
    (reply,) = grid.send_and_receive([message_to(1, content)])
    assert kinds(grid, "up") == ["update+values"]
    for name, array in to_arrays(reply.content["own"]).items():
        if array.size < 1024:
            assert array.tobytes() == variates[name].tobytes()
        else:  # it costs a fine lattice's bytes, and its error
            assert np.linalg.norm(array - variates[name]) < 0.03 * np.linalg.norm(array)


def test_a_model_that_comes_back_under_another_key_alone_is_an_update(federation, tmp_path):
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])

    @app.train()
    def train(message, context):
        arrays = local_step(to_arrays(message.content["arrays"]), 1)
        more = ArrayRecord({"counts": Array(np.arange(3))})
        content = RecordDict({"trained": to_record(arrays), "more": more})
        return Message(content, reply_to=message)

    grid, _, _ = federation("balanced", nodes=1, app=app)
    content = RecordDict({"arrays": to_record(initial_arrays())})
    (reply,) = grid.send_and_receive([message_to(1, content)])
    assert list(reply.content.array_records) == ["trained", "more"]
    assert kinds(grid, "up") == ["update+plain"]


def test_a_model_under_another_key_is_not_silently_left_unpruned(federation, tmp_path, caplog):
    grid, _, _ = federation(SMALL, app=echo_app(tmp_path))
    content = RecordDict({"model": to_record(initial_arrays())})
    list(grid.send_and_receive([message_to(n, content) for n in (1, 2)]))
    warnings = [r.getMessage() for r in caplog.records if "'model' is not pruned" in r.getMessage()]
    assert len(warnings) == 1
    named = Policy.preset("small", pruning_begin=0, pruning_end=1, pruning_records=("model",))
    grid, _, _ = federation(named, app=echo_app(tmp_path))
    list(grid.send_and_receive([message_to(1, content)]))
    assert grid.published(content["model"], key="model").sparsity() == pytest.approx(0.8, abs=0.01)


@pytest.mark.usefixtures("unpacked")
def test_one_record_can_be_reused_while_the_other_changes_and_order_is_kept(federation, tmp_path):
    orders = []
    app = echo_app(tmp_path)
    inner_train = app._registered_funcs["train.default"]

    def spy(message, context):
        orders.append(list(message.content.array_records))
        return inner_train(message, context)

    app._registered_funcs["train.default"] = spy
    grid, _, _ = federation("balanced", app=app)
    for seed in (1, 2):
        content = RecordDict(
            {"arrays": to_record(initial_arrays(0)), "control": to_record(initial_arrays(seed))}
        )
        list(grid.send_and_receive([message_to(1, content)]))
    assert kinds(grid, "down") == ["keyframe+keyframe", "reuse+delta"]
    assert orders == [["arrays", "control"]] * 2


def test_personal_arrays_go_losslessly_and_come_back_exactly(federation, tmp_path):
    grid, _, _ = federation(SMALL, app=echo_app(tmp_path))
    personal = {node: initial_arrays(node) for node in (1, 2, 3)}
    personal[2]["fc.bias"][0] = np.nan
    messages = [
        message_to(node, RecordDict({"arrays": to_record(arrays)}))
        for node, arrays in personal.items()
    ]
    replies = list(grid.send_and_receive(messages))
    assert kinds(grid, "down") == ["plain"] * 3
    assert kinds(grid, "up") == ["plain"] * 3
    for reply in replies:
        arrays = to_arrays(reply.content["arrays"])
        for name, expected in personal[reply.metadata.src_node_id].items():
            assert arrays[name].tobytes() == expected.tobytes()


def test_a_shared_and_a_personal_record_in_one_message(federation, tmp_path):
    grid, _, _ = federation("balanced", app=echo_app(tmp_path))
    shared = to_record(initial_arrays(0))
    messages = [
        message_to(
            n, RecordDict({"arrays": shared, "head": to_record({"w": np.full(9, float(n))})})
        )
        for n in (1, 2, 3)
    ]
    replies = list(grid.send_and_receive(messages))
    assert kinds(grid, "down") == ["keyframe+plain"] * 3
    for reply in replies:
        assert np.all(reply.content["head"]["w"].numpy() == reply.metadata.src_node_id)


def test_clusters_that_share_a_model_among_themselves_get_versions(federation, tmp_path):
    grid, _, _ = federation("balanced", nodes=4, app=echo_app(tmp_path))
    first, second = to_record(initial_arrays(1)), to_record(initial_arrays(2))
    messages = [
        message_to(n, RecordDict({"arrays": first if n < 3 else second})) for n in (1, 2, 3, 4)
    ]
    list(grid.send_and_receive(messages))
    assert kinds(grid, "down") == ["keyframe"] * 4


def test_queries_without_arrays_pass(federation):
    grid, _, _ = federation("small")
    content = RecordDict({"question": ConfigRecord({"what": "size"})})
    (reply,) = grid.send_and_receive([message_to(2, content, "query")])
    assert reply.content["answer"]["n"] == 42
    assert list(reply.content) == ["answer"]


def test_queries_without_arrays_pass_even_without_the_mod(federation):
    grid, _, _ = federation("small", app=make_app(None))
    content = RecordDict({"question": ConfigRecord({"what": "size"})})
    (reply,) = grid.send_and_receive([message_to(2, content, "query")])
    assert reply.content["answer"]["n"] == 42


def test_arrays_in_answer_to_none_come_back_exactly(federation, tmp_path):
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])

    @app.query()
    def query(message, context):
        return Message(RecordDict({"arrays": to_record(initial_arrays(9))}), reply_to=message)

    grid, _, _ = federation("small", app=app)
    for node in (1, 2):
        (reply,) = grid.send_and_receive([message_to(node, RecordDict(), "query")])
        for name, expected in initial_arrays(9).items():
            assert reply.content["arrays"][name].numpy().tobytes() == expected.tobytes()
    # nobody knew that this query is answered with arrays; now the nodes are told how to code them
    assert kinds(grid, "up") == ["verbatim", "plain"]


@pytest.mark.parametrize("policy", ["lossless", "small", Policy.preset("balanced", up="stc")])
def test_messages_without_arrays_cost_nothing_more(federation, policy):
    grid, _, _ = federation(policy)
    content = RecordDict({"question": ConfigRecord({"what": "size"})})
    for _ in range(2):
        list(grid.send_and_receive([message_to(2, content, "query")]))
    assert kinds(grid, "down") == kinds(grid, "up") == ["none", "none"]
    assert all(e.payload_bytes == e.dense_bytes for e in grid.ledger.entries)


@pytest.mark.parametrize("kind", ["train", "evaluate", "query", "train.special"])
def test_messages_without_arrays_are_plain_flowers_to_the_byte(federation, tmp_path, kind):
    """Down and up, also where a model has gone both ways and there is something to tell."""
    passed = []

    def noting(mods):
        def note(message, context, call_next):
            passed.append(message)
            return call_next(message, context)

        app = ClientApp(mods=[note, *mods])

        @app.train()
        @app.evaluate()
        @app.query()
        @app.train("special")
        def answer(message, context):
            content = RecordDict({"metrics": MetricRecord({"num-examples": 3, "loss": 0.5})})
            if message.content.array_records:
                content["arrays"] = to_record(local_step(to_arrays(message.content["arrays"]), 1))
            return Message(content, reply_to=message)

        return app

    grid, inner, _ = federation("small", nodes=1, app=noting([compression_mod(tmp_path / "s")]))
    _, plain, _ = federation("small", nodes=1, app=noting([]))
    inner.on_reply = plain.on_reply = lambda reply: passed.append(reply) or reply
    config = RecordDict({"config": ConfigRecord({"server-round": 7, "lr": 0.1, "text": "a"})})
    asked = [RecordDict(), config, RecordDict({"m": MetricRecord({"n": [1.0, 2.0]})})]
    model = RecordDict({"arrays": to_record(initial_arrays())})
    list(grid.send_and_receive([message_to(1, model)]))
    sent = []
    for one in (grid, plain):
        passed.clear()
        for content in asked:
            list(one.send_and_receive([message_to(1, content, kind)]))
        sent.append(
            [(own_bytes(m), serialised_objects(uncached(m.content))) for m in map(unsent, passed)]
        )
    assert len(sent[1]) == 2 * len(asked)
    assert sent[0] == sent[1]
    assert [e.payload_bytes - e.dense_bytes for e in grid.ledger.entries[2:]] == [0] * 6
    assert set(kinds(grid, "down")[1:] + kinds(grid, "up")[1:]) == {"none"}


@pytest.mark.parametrize("name", ["prunecast", "="])
def test_a_record_under_a_name_of_ours_is_told(federation, name):
    grid, _, _ = federation("balanced")
    content = RecordDict({"arrays": to_record(initial_arrays()), name: ConfigRecord()})
    with pytest.raises(FederationError, match=f"named '{name}'.*rename it"):
        grid.push_messages([message_to(1, content)])


def test_a_packed_message_that_says_nothing_of_its_arrays_is_refused(federation):
    _, inner, _ = federation("balanced")
    (reply,) = inner.send_and_receive([message_to(1, RecordDict({"=": ConfigRecord({"m": b""})}))])
    assert "ModError" in reply.error.reason
    assert "control record" in reply.error.reason


def uploaded(messages):
    """Bytes of the objects of messages, each once, as the SuperLink is given them."""
    objects = {o for message in messages for o in serialised_objects(uncached(message))}
    return sum(map(len, objects))


def test_what_nodes_share_is_uploaded_once_though_it_is_packed(federation, tmp_path):
    """Nodes in the same state are told the same, to the byte, in every round."""
    grid, inner, _ = federation("balanced", app=echo_app(tmp_path, lambda _, a: local_step(a, 1)))
    pushed, replied = [], []
    inner.on_reply = lambda reply: replied.append(reply) or reply
    push = inner.push_messages
    inner.push_messages = lambda messages: pushed.append(list(messages)) or push(pushed[-1])
    for number in range(3):
        content = RecordDict({"arrays": to_record(initial_arrays(number))})
        list(grid.send_and_receive([message_to(n, content) for n in (1, 2, 3)]))
        assert all(is_packed(message.content) for message in pushed[-1])
        assert len({object_bytes(message.content) for message in pushed[-1]}) == 1
        assert uploaded(pushed[-1]) < object_bytes(pushed[-1][0]) + 2 * 200  # Message objects
    for message in (*pushed[0], *pushed[-1], *replied):
        payload = payload_of(unpack(message.content)["arrays"])
        assert 300 < object_bytes(message) - len(payload) <= 350
    list(grid.send_and_receive([message_to(2, content)]))  # it alone knows what became of this
    list(grid.send_and_receive([message_to(n, content) for n in (1, 2, 3)]))
    assert len({m.content.object_id for m in pushed[-1]}) == 2


def test_replies_to_one_node_have_tags_of_their_own_and_those_of_all_nodes_the_same():
    batch = Batch([])
    first, second = ([batch.tag(node) for node in (1, 2, 3)] for _ in range(2))
    assert len(set(first)) == len(set(second)) == 1
    assert len({first[0], second[0], Batch([]).tag(1)}) == 3
    assert (
        Instruction.from_bytes(Instruction(UpdateRule(1.0), tag=first[0]).to_bytes()).tag
        == (first[0])
    )


@pytest.mark.parametrize(("nodes", "more"), [(2, 0), (2, 1), (10, 0), (10, 1)])
def test_a_payload_stays_apart_where_packing_uploads_it_too_often(nodes, more):
    """At the border: so many bytes more are uploaded as are saved on the way to the nodes."""
    size = APART * nodes // (nodes - 1) + more
    payload = payload_record(bytes(size))
    measured = {"arrays": Measured(payload)}
    batch = Batch([])

    def prepared(node, tag):
        control = ConfigRecord({"instruction": Instruction(UpdateRule(1.0), tag=tag).to_bytes()})
        content = RecordDict({"arrays": payload, CONTROL_RECORD: control})
        message = message_to(node, content)
        return Prepared(batch, message, message, measured=dict(measured))

    differing = [prepared(node, f"{node:08x}") for node in range(1, nodes + 1)]
    pack_together(differing)
    assert [is_packed(item.message.content) for item in differing] == [not more] * nodes
    equal = [prepared(node, "00" * 4) for node in range(1, nodes + 1)]
    pack_together(equal)
    assert all(is_packed(item.message.content) for item in equal)
    assert len({id(item.message.content) for item in equal}) == 1
    alone = [prepared(1, "00" * 4)]
    pack_together(alone)
    assert is_packed(alone[0].message.content)


def test_a_custom_loop_with_push_and_pull(federation, tmp_path):
    grid, _, _ = federation("balanced", app=echo_app(tmp_path, lambda _, a: local_step(a, 1)))
    arrays = to_record(initial_arrays())
    for _ in range(3):
        content = RecordDict({"arrays": arrays})
        ids = list(grid.push_messages([message_to(n, content) for n in grid.get_node_ids()]))
        replies = list(grid.pull_messages(ids))
        assert sorted(r.metadata.reply_to_message_id for r in replies) == sorted(ids)
        arrays = to_record(to_arrays(replies[0].content["arrays"]))
    assert kinds(grid, "down") == ["keyframe"] * 3 + ["delta"] * 6


def test_a_push_pull_loop_gets_the_retried_reply_under_the_original_id(federation, tmp_path):
    import shutil

    grid, _, _ = federation("balanced", app=echo_app(tmp_path))
    list(
        grid.send_and_receive([message_to(1, RecordDict({"arrays": to_record(initial_arrays())}))])
    )
    shutil.rmtree(tmp_path / "store")
    content = RecordDict({"arrays": to_record(initial_arrays(5))})
    (message_id,) = grid.push_messages([message_to(1, content)])
    assert list(grid.pull_messages([message_id])) == []
    (reply,) = grid.pull_messages([message_id])
    assert reply.metadata.reply_to_message_id == message_id
    assert reply.content["arrays"]["fc.weight"].numpy().shape == (64, 40)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_reply_under_another_key_is_what_its_magnitudes_say(federation, tmp_path, gradient):
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])

    @app.train()
    def train(message, context):
        received = to_arrays(message.content["arrays"])
        arrays = local_step(received, 1)
        if gradient:
            arrays = {name: (array - received[name]) * 0.1 for name, array in arrays.items()}
        return Message(RecordDict({"updated": to_record(arrays)}), reply_to=message)

    grid, _, _ = federation("balanced", app=app)
    content = RecordDict({"arrays": to_record(initial_arrays())})
    (reply,) = grid.send_and_receive([message_to(1, content)])
    assert kinds(grid, "up") == ["values" if gradient else "update"]
    assert list(reply.content.array_records) == ["updated"]
    if gradient:  # and not as far off as the model is large
        largest = max(np.abs(a).max() for a in to_arrays(reply.content["updated"]).values())
        assert largest < 0.05


@pytest.mark.parametrize("policy", ["lossless", "balanced", "small"])
def test_integers_scalars_empty_and_half_precision_arrays(federation, tmp_path, policy):
    arrays = {
        "steps": np.array(7, np.int64),
        "table": np.arange(-5, 7, dtype=np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(2.5, np.float32),
        "half": np.linspace(-1, 1, 64, dtype=np.float16),
        "double": np.linspace(-1, 1, 64),
        "flags": np.array([True, False]),
        "bn.running_var": np.linspace(0.5, 2, 8, dtype=np.float32),
        "bn.num_batches_tracked": np.array(0, np.int64),
        "matrix": np.linspace(-1, 1, 2048, dtype=np.float32).reshape(32, 64),
    }

    def change(_, received):
        return {
            k: np.asarray(v + 1, v.dtype) if v.dtype.kind in "iu" else v
            for k, v in received.items()
        }

    grid, _, _ = federation(policy, app=echo_app(tmp_path, change))
    content = RecordDict({"arrays": to_record(arrays)})
    (reply,) = grid.send_and_receive([message_to(1, content)])
    assert not reply.has_error(), reply.error.reason
    back = to_arrays(reply.content["arrays"])
    for name, array in arrays.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        if array.dtype.kind in "iu":
            assert np.array_equal(back[name], array + 1)
        else:
            assert np.array_equal(back[name], array)


def test_arrays_the_codec_does_not_know_travel_as_they_are(federation, tmp_path):
    app = echo_app(tmp_path)
    grid, _, _ = federation("small", app=app)
    complex_arrays = to_record({"spectrum": np.array([1 + 2j, 3])})
    (reply,) = grid.send_and_receive([message_to(1, RecordDict({"arrays": complex_arrays}))])
    assert np.array_equal(reply.content["arrays"]["spectrum"].numpy(), [1 + 2j, 3])
    assert kinds(grid, "down") == ["verbatim"]
    opaque = ArrayRecord({"blob": Array("float32", (2,), "my-own-format", b"12345678")})
    app._registered_funcs["train.default"] = lambda m, c: Message(
        RecordDict({"arrays": m.content["arrays"]}), reply_to=m
    )
    (reply,) = grid.send_and_receive([message_to(1, RecordDict({"arrays": opaque}))])
    assert reply.content["arrays"]["blob"].data == b"12345678"


@pytest.mark.parametrize("policy", ["lossless", "balanced", Policy.preset("balanced", up="stc")])
def test_what_cannot_be_coded_costs_itself_alone(federation, tmp_path, policy):
    words, own = np.array(["a", "b"]), Array("float32", (2,), "my-own-format", b"12345678")
    seen = []
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])

    @app.train()
    def train(message, context):
        seen.append(message.content["arrays"])
        return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)

    grid, _, _ = federation(policy, app=app)
    weight = np.linspace(-1, 1, 16_000, dtype=np.float32)
    little = np.where(np.arange(16_000) < 100, weight + 1, weight)  # so that a delta is smaller
    for value in (weight, weight, little):
        items = {"words": Array(words), "w": Array(value), "own": own, "n": Array(np.arange(3))}
        content = RecordDict({"arrays": ArrayRecord(items)})
        (reply,) = grid.send_and_receive([message_to(1, content)])
        for record in (seen[-1], reply.content["arrays"]):
            assert list(record) == list(items)
            assert record["words"].numpy().tolist() == ["a", "b"]
            assert record["own"].data == b"12345678"
            assert record["n"].numpy().tolist() == [0, 1, 2]
            np.testing.assert_allclose(record["w"].numpy(), value, atol=0.1)
    assert kinds(grid, "down") == ["keyframe/verbatim", "reuse/verbatim", "delta/verbatim"]
    assert grid.published(content["arrays"]).specs.keys() == {"w", "n"}
    assert list(grid.draw_initial(content["arrays"], 1, key="other")) == list(items)
    assert list(grid.checkpoint(content["arrays"]).arrays) == ["w", "n"]
    totals = grid.ledger.totals()
    assert totals.dense_bytes_down > (1.2 if policy == "lossless" else 5) * totals.bytes_down


def test_a_personal_record_with_what_cannot_be_coded(federation, tmp_path):
    grid, _, _ = federation("balanced", nodes=2, app=echo_app(tmp_path))
    records = [
        ArrayRecord({"words": Array(np.array(["a"])), "w": Array(np.full(999, float(node)))})
        for node in (1, 2)
    ]
    messages = [message_to(n, RecordDict({"arrays": r})) for n, r in enumerate(records, start=1)]
    replies = list(grid.send_and_receive(messages))
    assert kinds(grid, "down") == ["plain/verbatim"] * 2
    for node, reply in enumerate(replies, start=1):
        assert list(reply.content["arrays"]) == ["words", "w"]
        assert (reply.content["arrays"]["w"].numpy() == node).all()


def test_a_record_under_the_control_key_is_refused(federation):
    grid, _, _ = federation("small")
    with pytest.raises(FederationError, match="'prunecast'"):
        grid.push_messages([message_to(1, RecordDict({"prunecast": ConfigRecord()}))])


def test_messages_of_the_caller_are_never_changed(federation):
    grid, _, _ = federation("small")
    content = RecordDict({"arrays": to_record(initial_arrays())})
    messages = [message_to(n, content) for n in (1, 2)]
    list(grid.send_and_receive(messages))
    assert all(m.content is content for m in messages)
    assert list(content) == ["arrays"]
    assert list(content["arrays"]) == list(initial_arrays())


def test_masks_are_at_hand_while_the_client_trains(federation, tmp_path):
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])
    seen = []

    @app.train()
    def train(message, context):
        seen.append((to_arrays(message.content["arrays"]), current_masks()))
        return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)

    grid, _, _ = federation(SMALL, app=app)
    list(
        grid.send_and_receive([message_to(1, RecordDict({"arrays": to_record(initial_arrays())}))])
    )
    ((arrays, masks),) = seen
    assert masks.keys() == {"fc.weight"}
    assert np.array_equal(masks["fc.weight"], arrays["fc.weight"] != 0)
    assert current_masks() == {}


def test_the_client_also_serves_a_server_that_does_not_compress(tmp_path):
    from prunecast.simulations.runner.inprocess import InProcessGrid

    inner = InProcessGrid(echo_app(tmp_path), 1)
    content = RecordDict({"arrays": to_record(initial_arrays())})
    (reply,) = inner.send_and_receive([message_to(1, content)])
    assert to_arrays(reply.content["arrays"]).keys() == initial_arrays().keys()
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("policy", ["lossless", "balanced", Policy(up="stc")])
def test_what_no_function_of_the_client_takes_is_not_sent_in_vain(federation, tmp_path, policy):
    """An app without evaluate fails before its mods: from the second time on without a model."""
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])

    @app.train()
    def train(message, context):
        arrays = local_step(to_arrays(message.content["arrays"]), seed_of(message, context))
        content = RecordDict({"metrics": MetricRecord({"num-examples": 1})})
        content["arrays"] = to_record(arrays)
        return Message(content, reply_to=message)

    grid, _, _ = federation(policy, app=app)
    FedAvg().start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=3)
    sent = [e for e in grid.ledger.entries if e.direction == "down"]
    asked = [e.kind for e in sent if e.message_type == "evaluate"]
    assert asked == ["delta"] * 3 + ["reuse"] * 6
    trained = [e.kind for e in sent if e.message_type == "train"]
    assert trained == ["keyframe"] * 3 + ["delta"] * 6
    said = {e.reason for e in grid.ledger.entries if e.kind == "error"}
    assert said == {"ValueError: No evaluate function registered with name 'default'"}


def test_a_node_that_can_after_all_gets_the_model_in_the_same_round(federation, tmp_path):
    """Its app could not be loaded in the first two rounds."""
    works = make_app(tmp_path / "store")
    broken = iter([True, True])

    def app(message, context):
        if next(broken, False):
            raise ImportError("no module named torch")
        return works(message, context)

    grid, _, _ = federation("balanced", nodes=1, app=app)
    for number in range(4):
        content = RecordDict({"arrays": to_record(initial_arrays(number))})
        (reply,) = grid.send_and_receive([message_to(1, content)])
        assert reply.has_error() == (number < 2)
    assert kinds(grid, "down") == ["keyframe", "reuse", "reuse", "keyframe", "delta"]
    assert kinds(grid, "up") == ["error", "error", "base-missing", "update", "update"]


@pytest.mark.parametrize("returned", [None, "done"])
def test_what_is_no_message_is_said_to_be_none(federation, tmp_path, returned):
    """The node keeps what it holds, so the next model is a delta."""
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])
    app.train()(lambda message, context: returned)
    grid, _, _ = federation("balanced", nodes=1, app=app)
    for number in range(2):
        content = RecordDict({"arrays": to_record(initial_arrays(number))})
        (reply,) = grid.send_and_receive([message_to(1, content)])
        name = type(returned).__name__
        assert f"the app returned {name}, which is no Message" in reply.error.reason
    assert kinds(grid, "down") == ["keyframe", "delta"]
