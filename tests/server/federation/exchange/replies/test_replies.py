"""Replies of every kind: weights, gradients, differences, odd layouts, odd tensors."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from prunecast.client.training import compression_mod
from prunecast.compression.versions import Update
from prunecast.server.federation import Policy
from support.federation import initial_arrays, local_step, to_arrays, to_record

pytestmark = pytest.mark.usefixtures("unpacked")  # they look into messages

FINE = Policy.preset("balanced", down_step=0.1, up_step=0.1, up_floor=0.0, dead_zone=0.5)
SMALL = Policy.preset(
    "small", down_step=0.1, up_step=0.1, up_floor=0.0, dead_zone=0.5, pruning_begin=0, pruning_end=1
)
ERROR = 0.03  # relative, of a step of a tenth


def app_that(tmp_path, reply):
    """Answers with what `reply` makes of the received records and the round."""
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])

    @app.train()
    def train(message, context):
        content = RecordDict({"metrics": MetricRecord({"num-examples": 1})})
        config = message.content.get("config", ConfigRecord())
        made = reply(
            {k: to_arrays(r) for k, r in message.content.array_records.items()},
            int(config.get("server-round", 0)) + 100 * context.node_id,
        )
        for key, record in made.items():
            content[key] = record if isinstance(record, ArrayRecord) else to_record(record)
        return Message(content, reply_to=message)

    return app


def ask(grid, records, server_round=1, nodes=(1,)):
    content = {key: to_record(arrays) for key, arrays in records.items()}
    content["config"] = ConfigRecord({"server-round": server_round})
    content = RecordDict(content)
    replies = list(grid.send_and_receive([Message(content, node, "train") for node in nodes]))
    assert not any(r.has_error() for r in replies), [r.error.reason for r in replies]
    return replies


def up(grid):
    return [e for e in grid.ledger.entries if e.direction == "up"]


def error(got, meant):
    return float(np.linalg.norm(got.astype("f8") - meant) / np.linalg.norm(meant.astype("f8")))


def noise(scale, seed, like=None):
    rng = np.random.default_rng(seed)
    return {
        n: (scale * rng.normal(size=a.shape)).astype(np.float32)
        for n, a in (like or initial_arrays()).items()
    }


# -- what a reply is ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["arrays", "gradients"])
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-5])
@pytest.mark.parametrize("policy", [FINE, SMALL, "lossless"], ids=["balanced", "small", "lossless"])
def test_a_gradient_arrives_within_the_error_of_itself(federation, tmp_path, policy, scale, key):
    sent = noise(scale, 1)
    app = app_that(tmp_path, lambda received, number: {key: sent})
    grid, _, _ = federation(policy, nodes=1, app=app)
    (reply,) = ask(grid, {"arrays": initial_arrays()})
    got = to_arrays(reply.content[key])
    for name, array in sent.items():
        assert error(got[name], array) < (ERROR if policy != "lossless" else 1e-12), name
    (entry,) = up(grid)
    assert entry.kind == ("values" if policy != "lossless" else "update")


@pytest.mark.parametrize("policy", [FINE, SMALL], ids=["balanced", "small"])
def test_differences_of_a_model_are_differences_in_every_round(federation, tmp_path, policy):
    sent = {}

    def reply(received, number):
        trained = local_step(received["arrays"], number)
        sent.update({n: a - received["arrays"][n] for n, a in trained.items()})
        return {"arrays": sent}

    grid, _, _ = federation(policy, nodes=1, app=app_that(tmp_path, reply))
    model = initial_arrays()
    for server_round in range(1, 5):
        (answer,) = ask(grid, {"arrays": model}, server_round)
        got = to_arrays(answer.content["arrays"])
        for name in ("conv.weight", "fc.weight", "fc.bias"):
            assert error(got[name], sent[name]) < 2 * ERROR, name  # what was dropped comes along
        model = {n: a + got[n] for n, a in model.items()}
    assert {e.kind for e in up(grid)} == {"values"}


@pytest.mark.parametrize("key", ["control", "control-delta"])
def test_control_variates_beside_the_model(federation, tmp_path, key):
    change = noise(1e-4, 5)

    def reply(received, number):
        return {"arrays": local_step(received["arrays"], number), key: change}

    grid, _, _ = federation(FINE, nodes=1, app=app_that(tmp_path, reply))
    for control in (noise(0.0, 0), noise(1.0, 3)):
        (answer,) = ask(grid, {"arrays": initial_arrays(), "control": control})
        for name, array in to_arrays(answer.content[key]).items():
            assert error(array, change[name]) < 2 * ERROR, name
    assert up(grid)[-1].kind == "update+values" if key == "control" else "update+mixed"


def test_scaffolds_variates_add_up_from_the_first_on(federation, tmp_path):
    """c begins as zero and is sent; the nodes answer with its changes, large first, small later."""
    arrays, shape = initial_arrays(), (64, 40)
    made = [np.random.default_rng(n).normal(size=shape).astype("f4") / 4**n for n in range(6)]
    changes = iter(made)

    def reply(received, number):
        return {
            "arrays": local_step(received["arrays"], number),
            "control": {"fc.weight": next(changes)},
        }

    grid, _, _ = federation("balanced", nodes=1, app=app_that(tmp_path, reply))
    control = np.zeros(shape, np.float32)
    for number in range(1, 7):
        records = {"arrays": arrays, "control": {"fc.weight": control}}
        (got,) = ask(grid, records, number)
        control = control + got.content["control"]["fc.weight"].numpy()
    assert [e.kind for e in up(grid)] == ["update+update"] + ["update+values"] * 5
    assert np.linalg.norm(control - sum(made)) < 0.02 * np.linalg.norm(sum(made))


def test_one_record_with_a_model_and_its_control_variate(federation, tmp_path):
    """What a strategy of Flower can carry: exactly one record."""
    change = noise(1e-4, 5)
    names = {f"control.{n}": n for n in change}

    def reply(received, number):
        trained = local_step({n: received["arrays"][n] for n in change}, number)
        return {"arrays": {**trained, **{c: change[n] for c, n in names.items()}}}

    grid, _, _ = federation(FINE, nodes=1, app=app_that(tmp_path, reply))
    control = noise(1.0, 3)
    sent = {**initial_arrays(), **{c: control[n] for c, n in names.items()}}
    (answer,) = ask(grid, {"arrays": sent})
    got = to_arrays(answer.content["arrays"])
    for name in ("conv.weight", "fc.weight", "fc.bias"):
        assert error(got[f"control.{name}"], change[name]) < ERROR
    assert up(grid)[0].kind == "mixed"


def test_gradients_and_large_tables_of_any_shape_beside_the_model(federation, tmp_path):
    sent = {"logits": noise(5.0, 1, {"logits": np.zeros((500, 10))})["logits"]}
    sent["accuracy"] = np.linspace(0, 1, 10)

    def reply(received, number):
        return {"arrays": local_step(received["arrays"], number), "more": sent}

    grid, _, _ = federation("balanced", nodes=1, app=app_that(tmp_path, reply))
    (answer,) = ask(grid, {"arrays": initial_arrays()})
    got = to_arrays(answer.content["more"])
    assert got["accuracy"].tobytes() == sent["accuracy"].tobytes()
    assert error(got["logits"], sent["logits"]) < ERROR
    assert up(grid)[0].kind == "update+values"


def test_zeros_that_the_server_would_not_believe_travel_as_they_are(federation, tmp_path):
    zeros = np.zeros((1 << 20, 2), np.float32)
    app = app_that(tmp_path, lambda received, number: {"more": {"zeros": zeros}})
    grid, _, _ = federation("balanced", nodes=1, app=app)
    for sent in ({"arrays": initial_arrays()}, {"other": {"w": zeros[:1]}}):
        (answer,) = ask(grid, sent)
        assert np.array_equal(answer.content["more"]["zeros"].numpy(), zeros)
    assert {e.kind for e in up(grid)} == {"plain/verbatim"}


# -- layouts --------------------------------------------------------------------------------------

LAYOUTS = {
    "float64": lambda a: {n: x.astype(np.float64) for n, x in a.items()},
    "float16": lambda a: {n: x.astype(np.float16) for n, x in a.items()},
    "sorted": lambda a: dict(sorted(a.items(), reverse=True)),
    "one scalar more": lambda a: {**a, "scale": np.array(3, np.float32)},
    "without one": lambda a: {n: x for n, x in a.items() if n != "fc.bias"},
    "unnamed": lambda a: {str(i): x for i, x in enumerate(a.values())},
    "another shape": lambda a: {**a, "fc.bias": np.append(a["fc.bias"], np.float32(7))},
    "a counter": lambda a: {**a, "steps": np.array(3)},
    "text": lambda a: {"name": np.array(["a", "bc"]), **a, "z": np.array([1 + 2j])},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_replies_cost_themselves_alone(federation, tmp_path, layout):
    trained = {}

    def reply(received, number):
        trained.update(LAYOUTS[layout](local_step(received["arrays"], number)))
        return {"arrays": trained}

    grid, _, _ = federation("balanced", nodes=1, app=app_that(tmp_path, reply))
    plain = app_that(tmp_path / "as sent", lambda r, n: {"arrays": local_step(r["arrays"], n)})
    usual, _, _ = federation("balanced", nodes=1, app=plain)
    (expected,) = ask(usual, {"arrays": initial_arrays()})
    (answer,) = ask(grid, {"arrays": initial_arrays()})
    got = to_arrays(answer.content["arrays"])
    assert {n: (a.dtype, a.shape) for n, a in got.items()} == {
        n: (a.dtype, a.shape) for n, a in trained.items()
    }
    assert list(got) == list(trained)
    (entry,), (as_sent,) = up(grid), up(usual)
    assert entry.kind == ("update/verbatim" if layout == "text" else "update")
    more = entry.payload_bytes - as_sent.payload_bytes
    assert more < (1000 if layout == "text" else 300)
    assert abs(entry.dense_bytes - sum(a.nbytes + 428 for a in trained.values())) < 900
    reference = to_arrays(expected.content["arrays"])
    for name, place in zip(reference, trained, strict=False):
        name = name if layout == "unnamed" else place
        if name in reference and trained[place].shape == reference[name].shape:
            near = np.isclose(got[place], reference[name], rtol=2e-3, atol=2e-3)
            # a change that half precision rounds across the dead zone's edge
            assert near.all() or (layout == "float16" and near.mean() > 0.99)
    for name in trained.keys() - reference.keys():
        if layout != "unnamed":
            assert got[name].tobytes() == trained[name].tobytes()


def test_a_counter_keeps_its_dtype_and_the_uplink_its_ratio(federation, tmp_path):
    """BatchNorm2d: Flower's average makes float64 of the counter, torch answers with int64."""

    def reply(received, number):
        received = received["arrays"]
        trained = local_step({n: received[n] for n in initial_arrays()}, number)
        seen = np.asarray(int(received["bn.num_batches_tracked"]) + 5, np.int64)
        return {"arrays": {**trained, "bn.num_batches_tracked": seen}}

    sizes = []
    for counted in (True, False):
        start, app = initial_arrays(), app_that(tmp_path / str(counted), reply)
        if counted:
            start["bn.num_batches_tracked"] = np.array(0)
        else:
            app = app_that(
                tmp_path / "without", lambda r, n: {"arrays": local_step(r["arrays"], n)}
            )
        grid, _, _ = federation("balanced", app=app)
        result = FedAvg(fraction_evaluate=0.0).start(
            grid=grid, initial_arrays=to_record(start), num_rounds=3
        )
        assert {e.kind for e in up(grid)} == {"update"}
        sizes.append(sum(e.payload_bytes for e in up(grid)))
        if counted:
            counter = to_arrays(result.arrays)["bn.num_batches_tracked"]
            assert (counter.dtype, int(counter)) == (np.int64, 15)
    assert sizes[0] < 1.02 * sizes[1]


@pytest.mark.parametrize("bits", [0, 6])
def test_statistics_of_two_clients_average_to_within_their_bits(federation, tmp_path, bits):
    names = ("bn.running_mean", "bn.running_var")
    said, got = [], []

    def reply(received, number):
        received = received["arrays"]
        got.append(received)
        rng = np.random.default_rng(number)
        weights = {n: a for n, a in received.items() if n not in names}
        trained = {**received, **local_step(weights, number)}
        for name in names:
            trained[name] = np.exp(rng.normal(size=16)).astype(np.float32)
        trained["bn.running_var"][0] = np.inf  # a batch of one
        said.append(trained)
        return {"arrays": trained}

    policy = Policy.preset("balanced", statistics_bits=bits)
    grid, _, _ = federation(policy, app=app_that(tmp_path, reply), nodes=2)
    result = FedAvg(fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=2
    )
    master, (one, two) = to_arrays(result.arrays), said[-2:]
    for name in names:
        mean = (one[name].astype("f8") + two[name]) / 2
        np.testing.assert_allclose(master[name], mean, rtol=2**-7 if bits else 1e-6)
        ends = [a[name].view("u4") & ((1 << 17) - 1) for a in got[-2:]]
        assert [bool(end.any()) for end in ends] == [not bits] * 2  # what was published
        assert got[-1][name].tobytes() == got[-2][name].tobytes()
    assert master["bn.running_var"][0] == np.inf
    assert {e.kind for e in up(grid)} == {"update"}


@pytest.mark.parametrize("policy", ["lossless", "balanced", Policy(up="int8")])
def test_numbers_of_another_byte_order_come_and_go(federation, tmp_path, policy):
    swapped = {n: a.astype(">f4") for n, a in initial_arrays().items()}
    swapped["steps"] = np.arange(5).astype(">i8")
    trained = {}

    def reply(received, number):
        trained.update({n: a + a.dtype.type(1) for n, a in received["arrays"].items()})
        return {"arrays": {n: a.astype(a.dtype.newbyteorder(">")) for n, a in trained.items()}}

    grid, _, _ = federation(policy, nodes=1, app=app_that(tmp_path, reply))
    (got,) = ask(grid, {"arrays": swapped})
    got = to_arrays(got.content["arrays"])
    for name, array in trained.items():
        assert got[name].dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
        atol = 0 if policy == "lossless" else 1.5  # a change of 1 everywhere is within a step
        np.testing.assert_allclose(got[name].astype("f8"), array.astype("f8"), atol=atol)


# -- what is not finite ----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["lossless", "balanced", "small"])
def test_infinity_that_belongs_there_comes_back(federation, tmp_path, policy):
    start = initial_arrays()
    start["attn.mask"] = np.triu(np.full((16, 16), -np.inf, np.float32), 1)
    start["observer.min_val"] = np.array(np.inf, np.float32)
    fine = {} if policy == "lossless" else {"up_step": 0.1, "dead_zone": 0.5}
    policy = Policy.preset(policy, lossless=("*mask", "*_val", "bn.*"), **fine)

    def reply(received, number):
        arrays = received["arrays"]
        trained = {**arrays, "fc.bias": arrays["fc.bias"] + np.float32(0.1)}
        trained["bn.running_var"] = np.full(16, np.inf, np.float32)  # a batch of one
        return {"arrays": trained}

    grid, _, _ = federation(policy, app=app_that(tmp_path, reply))
    result = FedAvg(fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=to_record(start), num_rounds=2
    )
    got = to_arrays(result.arrays)
    assert got["attn.mask"].tobytes() == start["attn.mask"].tobytes()
    assert got["observer.min_val"] == np.inf
    assert got["fc.bias"].mean() == pytest.approx(0.2, rel=0.3)
    assert {e.kind for e in up(grid)} == {"update"}


@pytest.mark.parametrize("policy", ["lossless", "balanced"])
def test_a_trained_tensor_that_becomes_infinite_is_refused_by_name(federation, tmp_path, policy):
    def reply(received, number):
        arrays = received["arrays"]
        return {"arrays": {**arrays, "fc.weight": arrays["fc.weight"] * np.float32(np.inf)}}

    grid, _, _ = federation(policy, nodes=1, app=app_that(tmp_path, reply))
    sent = to_record(initial_arrays())
    (answer,) = grid.send_and_receive([Message(RecordDict({"arrays": sent}), 1, "train")])
    assert answer.has_error()
    assert "NaN or infinity" in answer.error.reason
    assert "'fc.weight'" in answer.error.reason


# -- averaging ------------------------------------------------------------------------------------


def test_values_are_averaged_without_forming_them(federation, tmp_path, monkeypatch):
    formed = []
    apply = Update.apply
    monkeypatch.setattr(
        Update, "apply", lambda self, name, master: formed.append(name) or apply(self, name, master)
    )
    sent = []

    def reply(received, number):
        sent.append(noise(1e-3, number))
        return {"gradients": sent[-1]}

    grid, _, _ = federation(FINE, nodes=4, app=app_that(tmp_path, reply))
    result = FedAvg(fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=1
    )
    assert not {"conv.weight", "fc.weight", "fc.bias"} & set(formed)
    got = to_arrays(result.arrays)
    for name in initial_arrays():
        mean = np.mean([arrays[name] for arrays in sent], axis=0)
        assert error(got[name], mean) < 2 * ERROR
        assert got[name].dtype == np.float32


def test_weights_and_gradients_in_one_average(federation, tmp_path):
    def reply(received, number):
        arrays = received["arrays"]
        return {"arrays": local_step(arrays, number) if number > 200 else noise(1e-3, number)}

    grid, _, _ = federation(FINE, nodes=2, app=app_that(tmp_path, reply))
    result = FedAvg(fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=1
    )
    got, start = to_arrays(result.arrays), initial_arrays()
    mean = (local_step(start, 201)["fc.weight"] + noise(1e-3, 101)["fc.weight"]) / 2
    assert error(got["fc.weight"], mean) < ERROR


def test_an_array_under_our_own_prefix_beside_the_payload_must_be_announced(federation, tmp_path):
    app = app_that(tmp_path, lambda received, number: {"arrays": received["arrays"]})
    grid, inner, _ = federation("balanced", nodes=1, app=app)

    def add(reply):
        reply.content["arrays"]["=more"] = Array(np.ones(3))
        return reply

    inner.on_reply = add
    content = RecordDict({"arrays": to_record(initial_arrays())})
    (answer,) = grid.send_and_receive([Message(content, 1, "train")])
    assert answer.has_error()
    assert "other arrays" in answer.error.reason


# -- beside a version ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["lossless", "balanced"])
def test_text_beside_a_weight_costs_itself_alone_both_ways(federation, tmp_path, policy):
    seen = []

    def reply(received, number):
        seen.append(received["arrays"])
        arrays = received["arrays"]
        return {"arrays": {**arrays, "w": arrays["w"] * np.float32(1.01)}}

    grid, _, _ = federation(policy, nodes=2, app=app_that(tmp_path, reply))
    rng = np.random.default_rng(0)
    sent = {
        "labels": np.array(["cat", "dog"]),
        "w": rng.normal(size=(128, 128)).astype(np.float32),
        "spectrum": np.array([1 + 2j]),
        "b": np.zeros(9, np.float32),
        "classes": np.array(["a"]),
    }
    for server_round in (1, 2):  # the second reuses what the node holds
        for answer in ask(grid, {"arrays": sent}, server_round, nodes=(1, 2)):
            got = to_arrays(answer.content["arrays"])
            assert list(got) == list(sent)
            for name in ("labels", "spectrum", "classes"):
                assert got[name].tobytes() == sent[name].tobytes()
    for received in seen:
        assert list(received) == list(sent)
        assert np.array_equal(received["labels"], sent["labels"])
        np.testing.assert_allclose(received["w"], sent["w"], atol=0.21)  # half a step
    down = [e.kind for e in grid.ledger.entries if e.direction == "down"]
    assert down == ["keyframe/verbatim"] * 2 + ["reuse/verbatim"] * 2
    assert {e.kind for e in up(grid)} == {"update/verbatim"}
    if policy == "balanced":
        assert all(e.dense_bytes > 10 * e.payload_bytes for e in up(grid))
    whole = grid.evaluate_published(lambda _, arrays: list(arrays))(3, to_record(sent))
    assert whole == list(sent)


def test_a_personal_model_with_text_comes_and_goes_exactly(federation, tmp_path):
    app = app_that(tmp_path, lambda received, number: {"arrays": received["arrays"]})
    grid, _, _ = federation("balanced", nodes=2, app=app)
    sent = {n: {"name": np.array([f"node {n}"]), "w": np.full(9, n / 3)} for n in (1, 2)}
    messages = [
        Message(RecordDict({"arrays": to_record(arrays)}), node, "train")
        for node, arrays in sent.items()
    ]
    for answer in grid.send_and_receive(messages):
        got = to_arrays(answer.content["arrays"])
        for name, array in sent[answer.metadata.src_node_id].items():
            assert got[name].tobytes() == array.tobytes()
    assert {e.kind for e in grid.ledger.entries} == {"plain/verbatim"}
