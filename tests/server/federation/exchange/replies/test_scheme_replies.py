"""Replies of every kind by the schemes of the literature, and the bytes that describe them."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg

from prunecast.client.training import compression_mod
from prunecast.compression.codec import TensorSpec
from prunecast.compression.flower import coded_record, open_coded
from prunecast.compression.schemes.registry import SCHEMES
from prunecast.compression.versions import (
    BadPayload,
    Coding,
    ReplyTensor,
    UpdateHead,
    VersionsError,
    describe,
    read_description,
)
from prunecast.server.federation import Policy
from support.federation import initial_arrays, local_step, seed_of, to_arrays, to_record

pytestmark = pytest.mark.usefixtures("unpacked")  # they look into messages

INT8 = Policy(down="dense", up="int8")
CLIP = 0.5


def app_that(store, reply, *mods):
    app = ClientApp(mods=[compression_mod(store), *mods])

    @app.train()
    def train(message, context):
        records = {k: to_arrays(r) for k, r in message.content.array_records.items()}
        made = reply(records, seed_of(message, context))
        content = RecordDict({key: to_record(arrays) for key, arrays in made.items()})
        content["metrics"] = MetricRecord({"num-examples": 1})
        return Message(content, reply_to=message)

    return app


def ask(grid, records):
    content = RecordDict({key: to_record(arrays) for key, arrays in records.items()})
    (reply,) = grid.send_and_receive([Message(content, 1, "train")])
    assert not reply.has_error(), reply.error.reason
    return reply.content


def up(grid):
    return [e.kind for e in grid.ledger.entries if e.direction == "up"]


def noise(scale, seed=1):
    rng = np.random.default_rng(seed)
    return {
        n: (scale * rng.normal(size=a.shape)).astype(np.float32)
        for n, a in initial_arrays().items()
    }


def error(got, meant):
    return np.linalg.norm(got.astype("f8") - meant) / np.linalg.norm(meant)


@pytest.mark.parametrize("key", ["arrays", "gradients"])
@pytest.mark.parametrize("scale", [1e-2, 1e-5])
@pytest.mark.parametrize("down", ["dense", "lattice"])
def test_a_gradient_arrives_within_the_error_of_itself(federation, tmp_path, down, scale, key):
    sent = noise(scale)
    policy = Policy(down=down, up="int8")
    grid, _, _ = federation(policy, nodes=1, app=app_that(tmp_path, lambda r, n: {key: sent}))
    got = to_arrays(ask(grid, {"arrays": initial_arrays()})[key])
    for name, array in sent.items():
        assert error(got[name], array) < 0.02
    assert up(grid) == ["int8/values"]


@pytest.mark.parametrize("name", SCHEMES)
def test_no_scheme_takes_a_gradient_for_weights(federation, tmp_path, name):
    sent = noise(1e-4)
    options = {"step": 0} if name == "signsgd" else {}
    policy = Policy(down="dense", up=name, up_options=options)
    app = app_that(tmp_path, lambda r, n: {"arrays": sent})
    grid, _, _ = federation(policy, nodes=1, app=app)
    got = to_arrays(ask(grid, {"arrays": initial_arrays()})["arrays"])
    assert max(np.abs(array).max() for array in got.values()) < 0.02


LAYOUTS = {
    "float64": lambda a: {n: x.astype(np.float64) for n, x in a.items()},
    "sorted": lambda a: dict(sorted(a.items(), reverse=True)),
    "one scalar more": lambda a: {**a, "scale": np.array(3, np.float32)},
    "without one": lambda a: {n: x for n, x in a.items() if n != "fc.bias"},
    "unnamed": lambda a: {str(i): x for i, x in enumerate(a.values())},
    "another shape": lambda a: {**a, "fc.bias": np.append(a["fc.bias"], np.float32(7))},
    "a counter": lambda a: {"steps": np.array(3), **a},
    "text": lambda a: {"name": np.array(["a", "bc"]), **a},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_replies_cost_themselves_alone(federation, tmp_path, layout):
    trained = {}

    def reply(received, number):
        trained.update(LAYOUTS[layout](local_step(received["arrays"], number)))
        return {"arrays": trained}

    grid, _, _ = federation(INT8, nodes=1, app=app_that(tmp_path, reply))
    got = to_arrays(ask(grid, {"arrays": initial_arrays()})["arrays"])
    assert list(got) == list(trained)
    for name, array in trained.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        if array.dtype.kind == "f":
            np.testing.assert_allclose(got[name], array, atol=2e-3)
        else:
            assert got[name].tobytes() == array.tobytes()
    (entry,) = [e for e in grid.ledger.entries if e.direction == "up"]
    assert entry.kind == "int8"
    assert entry.dense_bytes > 1.5 * entry.payload_bytes


@pytest.mark.parametrize("down", ["dense", "lattice"])
def test_a_counter_that_the_average_makes_a_float_ends_nothing(federation, tmp_path, down):
    """Only BatchNorm beside floats: a reply is as usual for the node, which has integers."""

    def reply(received, number):
        received = received["arrays"]
        trained = local_step({n: received[n] for n in initial_arrays()}, number)
        seen = np.asarray(int(received["bn.num_batches_tracked"]) + 5, np.int64)
        return {"arrays": {**trained, "bn.num_batches_tracked": seen}}

    grid, _, _ = federation(Policy(down=down, up="stc"), app=app_that(tmp_path, reply))
    start = {**initial_arrays(), "bn.num_batches_tracked": np.array(0)}
    result = FedAvg(fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=to_record(start), num_rounds=3
    )
    assert up(grid) == ["stc"] * 9
    assert int(result.arrays["bn.num_batches_tracked"].numpy()) == 15


@pytest.mark.parametrize("down", ["dense", "lattice"])
def test_integers_under_the_names_of_floats_come_as_they_are(federation, tmp_path, down):
    """A client that quantises by itself."""
    sent = {n: np.arange(a.size).reshape(a.shape).astype("i1") for n, a in initial_arrays().items()}
    policy = Policy(down=down, up="stc")
    grid, _, _ = federation(policy, nodes=1, app=app_that(tmp_path, lambda r, n: {"arrays": sent}))
    got = to_arrays(ask(grid, {"arrays": initial_arrays()})["arrays"])
    for name, array in sent.items():
        assert got[name].dtype == np.int8
        np.testing.assert_array_equal(got[name], array)


@pytest.mark.parametrize(
    ("large", "said"),
    [
        ({"table": np.ones((64, 40), np.float32)}, ["tensor 'table' is none of the finite floats"]),
        ({"scale": np.ones(3, np.float32), "n": np.arange(9)}, []),
    ],
)
def test_what_a_scheme_leaves_as_it_is_is_said(federation, tmp_path, caplog, large, said):
    app = app_that(tmp_path, lambda r, n: {"arrays": {**local_step(r["arrays"], n), **large}})
    grid, _, _ = federation(INT8, nodes=1, app=app)
    ask(grid, {"arrays": initial_arrays()})
    texts = [r.getMessage() for r in caplog.records if "went up" in r.getMessage()]
    assert len(texts) == len(said)
    assert all(words in text for words, text in zip(said, texts, strict=True))


def test_a_mask_of_infinities_comes_back(federation, tmp_path):
    mask = np.triu(np.full((9, 9), -np.inf, np.float32), 1)

    def reply(received, number):
        trained = local_step({n: received["arrays"][n] for n in initial_arrays()}, number)
        return {"arrays": {**trained, "mask": received["arrays"]["mask"]}}

    grid, _, _ = federation(INT8, nodes=1, app=app_that(tmp_path, reply))
    got = to_arrays(ask(grid, {"arrays": {**initial_arrays(), "mask": mask}})["arrays"])
    assert got["mask"].tobytes() == mask.tobytes()
    assert up(grid) == ["int8"]


@pytest.mark.parametrize("name", ["int8", "int4", "fp16", "qsgd", "stc", "topk"])
@pytest.mark.parametrize("scale", [5.0, 0.1])
def test_under_a_clip_no_scheme_sends_more_and_none_feeds_back(federation, tmp_path, name, scale):
    norms = []

    def reply(received, number):
        received = received["arrays"]
        trained = local_step(received, number)
        return {
            "arrays": {n: a + np.float32(scale) * (trained[n] - a) for n, a in received.items()}
        }

    class Seen(FedAvg):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            for answer in replies:
                assert not answer.has_error(), answer.error.reason
                got = to_arrays(answer.content["arrays"])
                norms.append(np.sqrt(sum(((got[n] - a.astype("f8")) ** 2).sum() for n, a in sent)))
            return super().aggregate_train(server_round, replies)

        def configure_train(self, server_round, arrays, config, grid):
            sent[:] = to_arrays(arrays).items()
            return super().configure_train(server_round, arrays, config, grid)

    sent = []
    policy = Policy(down="dense", up=name)
    app = app_that(tmp_path / "store", reply, fixedclipping_mod)
    grid, _, _ = federation(policy, nodes=2, app=app)
    strategy = DifferentialPrivacyClientSideFixedClipping(
        Seen(fraction_evaluate=0.0), 0.01, CLIP, 2
    )
    strategy.start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=3)
    assert len(norms) == 6
    assert 0 < max(norms) <= CLIP * (1 + 1e-6)
    assert not list((tmp_path / "store").rglob("*.pending*"))


def test_a_scheme_that_cannot_keep_to_the_clip_says_what_to_choose(federation, tmp_path):
    app = app_that(tmp_path, lambda r, n: {"arrays": local_step(r["arrays"], n)}, fixedclipping_mod)
    grid, _, _ = federation(Policy(down="dense", up="signsgd"), nodes=2, app=app)
    content = RecordDict({"arrays": to_record(initial_arrays())})
    content["config"] = ConfigRecord({"clipping_norm": CLIP})
    (reply,) = grid.send_and_receive([Message(content, 1, "train")])
    assert reply.has_error()
    assert "prunecast.up = 'lattice'" in reply.error.reason


# -- the description ------------------------------------------------------------------------------

BASE = {"w": TensorSpec(np.dtype("f4"), (3, 2)), "n": TensorSpec(np.dtype("i8"), ())}
HEADS = {
    "other": UpdateHead(Coding.ZERO, 0.0, ReplyTensor(BASE["w"], "w")),
    "text": UpdateHead(Coding.VERBATIM, 0.0, ReplyTensor(None)),
}


def base_of(key):
    if key != "arrays":
        raise BadPayload("no such record")
    return BASE


def test_a_description_comes_back_and_hostile_ones_are_refused():
    described = describe("arrays", HEADS, BASE)
    assert read_description(described + b"PCS...", base_of) == ("arrays", HEADS, b"PCS...")
    assert read_description(b"PCS...", base_of) is None
    for cut in range(3, len(described)):
        with pytest.raises(VersionsError):
            read_description(described[:cut], base_of)
    with pytest.raises(BadPayload, match="no such"):
        read_description(describe("more", HEADS, BASE), base_of)
    exact = {"w": UpdateHead(Coding.EXACT, 0.0, ReplyTensor(BASE["w"], "w"))}
    with pytest.raises(BadPayload, match="no scheme has"):
        read_description(describe("arrays", exact, BASE), base_of)


def test_a_description_must_fit_what_came(federation, tmp_path):
    app = app_that(tmp_path, lambda r, n: {"arrays": local_step(r["arrays"], n)})
    grid, inner, _ = federation(INT8, nodes=1, app=app)
    specs = {n: TensorSpec(a.dtype, a.shape) for n, a in initial_arrays().items()}

    def tamper(reply):
        payload, _ = open_coded(reply.content["arrays"])
        heads = {"w": UpdateHead(Coding.ZERO, 0.0, ReplyTensor(specs["fc.bias"], "fc.bias"))}
        reply.content["arrays"] = coded_record(describe("arrays", heads, specs) + payload, {})
        return reply

    inner.on_reply = tamper
    content = RecordDict({"arrays": to_record(initial_arrays())})
    (reply,) = grid.send_and_receive([Message(content, 1, "train")])
    assert reply.has_error()
