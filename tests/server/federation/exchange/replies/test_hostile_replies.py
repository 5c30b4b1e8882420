"""One of three nodes answers with something else: its reply is refused, and the round goes on."""

import io
import itertools
import re

import hypothesis.strategies as st
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    FedXgbBagging,
)
from flwr.serverapp.strategy.strategy_utils import (
    aggregate_arrayrecords,
    aggregate_metricrecords,
    validate_message_reply_consistency,
)
from hypothesis import given, settings

from prunecast.client.training import compression_mod
from prunecast.client.training.store import NodeStore
from prunecast.compression.codec import TensorSpec
from prunecast.compression.flower import STYPE, coded_record, payload_record, stream_id
from prunecast.compression.flower.internals import Aggregation, identify_process
from prunecast.compression.schemes.layout import layout_of
from prunecast.compression.versions import (
    NOTHING_SENT,
    NodeReport,
    QuantisedTensor,
    ReplyTensor,
    encode_keyframe,
    encode_update,
)
from prunecast.server.federation import Policy
from prunecast.server.federation.exchange.batches import Batch, Prepared
from prunecast.server.federation.exchange.replies import inbound
from prunecast.server.federation.exchange.replies.checks import misfits
from support.federation import RUN_ID, initial_arrays, make_app, to_arrays, to_record

pytestmark = pytest.mark.usefixtures("unpacked")  # they look into messages

ARRAYS = initial_arrays()
STREAM = stream_id(RUN_ID, "arrays")
DENSE_UP = Policy.preset("balanced", up="dense")
SCHEME = Policy.preset("balanced", up="stc")
numbers = itertools.count()


def changed(**tensors):
    return {**ARRAYS, **{name.replace("_", "."): array for name, array in tensors.items()}}


def plain(arrays, stream=STREAM):
    """Exact arrays that answer none sent."""
    tensors = {n: ReplyTensor(TensorSpec(a.dtype, a.shape)) for n, a in arrays.items()}
    return payload_record(encode_update(NOTHING_SENT, arrays, stream=stream, tensors=tensors))


def filled(value, dtype=np.float32):
    return {name: np.full(a.shape, value, dtype) for name, a in ARRAYS.items()}


def held(store):
    return NodeStore(store, RUN_ID, 2).held("arrays")


def update(store, z, step):
    changes = {
        name: QuantisedTensor(np.full(t.shape, z, np.int32) * (t.q != 0 if t.pruned else 1), step)
        for name, t in held(store).tensors.items()
        if name.endswith("weight")
    }
    return payload_record(encode_update(held(store), changes, stream=STREAM))


def npy(array, **stated):
    """A NumPy array whose record states something else of it."""
    kept = Array(array)
    given = {"dtype": kept.dtype, "shape": kept.shape, "stype": kept.stype, "data": kept.data}
    return Array(**{**given, **stated})


def header(descr, shape, body=b""):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return out.getvalue() + body


def record_of(**arrays):
    return ArrayRecord({**to_record(ARRAYS), **{n.replace("_", "."): a for n, a in arrays.items()}})


WRONG = {name: np.zeros((3, 3), np.float32) for name in ARRAYS}
SQUASHED = changed(fc_weight=np.zeros(64 * 40, np.float32))
BROADCAST = changed(fc_weight=np.zeros((1, 40), np.float32))
FEWER = {name: ARRAYS[name] for name in list(ARRAYS)[1:]}
MORE = {**ARRAYS, "more": np.zeros(3, np.float32)}
NAN = filled(np.nan)
ONE_INFINITY = changed(fc_bias=np.r_[np.float32(np.inf), np.zeros(63, np.float32)])
HUGE = filled(3e37)
WORDS = changed(fc_bias=np.array(["a"] * 64))
COMPLEX = changed(fc_bias=np.zeros(64, np.complex64))

# what node 2 puts in the place of its array record, and words of the reason
RECORDS = {
    "verbatim, wrong shapes": (lambda _: to_record(WRONG), "(3, 3)"),
    "verbatim, one dimension": (lambda _: to_record(SQUASHED), "'fc.weight'"),
    "verbatim, broadcasts": (lambda _: to_record(BROADCAST), "'fc.weight'"),
    "verbatim, NaN": (lambda _: to_record(NAN), "'conv.weight'.*NaN or infinity"),
    "verbatim, one infinity": (lambda _: to_record(ONE_INFINITY), "'fc.bias'.*NaN or infinity"),
    "verbatim, huge": (lambda _: to_record(HUGE), "'conv.weight'.*3e\\+37"),
    "verbatim, a name missing": (lambda _: to_record(FEWER), "'conv.weight' is missing"),
    "verbatim, a name more": (lambda _: to_record(MORE), "'more'"),
    "verbatim, no names": (lambda _: ArrayRecord(), "'bn.running_mean' is missing"),
    "verbatim, words": (lambda _: to_record(WORDS), "'fc.bias'"),
    "verbatim, complex": (lambda _: to_record(COMPLEX), "'fc.bias'.*complex64"),
    "objects": (
        lambda _: record_of(fc_bias=npy(ARRAYS["fc.bias"], data=header("|O", (64,), b"x" * 512))),
        "'fc.bias'.*pickle",
    ),
    "too few bytes": (
        lambda _: record_of(
            fc_bias=npy(
                ARRAYS["fc.bias"], shape=(1 << 40,), data=header("<f4", (1 << 40,), b"x" * 256)
            )
        ),
        "'fc.bias'.*bytes",
    ),
    "too many bytes": (
        lambda _: record_of(fc_bias=npy(ARRAYS["fc.bias"], data=header("<f4", (64,), b"x" * 999))),
        "'fc.bias'.*bytes",
    ),
    "negative dimensions": (
        lambda _: record_of(
            fc_bias=npy(ARRAYS["fc.bias"], data=header("<f4", (-8, -8), b"x" * 256))
        ),
        "'fc.bias'",
    ),
    "no header": (
        lambda _: record_of(fc_bias=npy(ARRAYS["fc.bias"], data=b"\0" * 300)),
        "'fc.bias'.*NumPy's format",
    ),
    "a deep header": (
        lambda _: record_of(
            fc_bias=npy(
                ARRAYS["fc.bias"],
                data=b"\x93NUMPY\1\0" + (4000).to_bytes(2, "little") + b"(" * 4000 + b"x" * 256,
            )
        ),
        "'fc.bias'.*NumPy's format",
    ),
    "stated otherwise": (
        lambda _: record_of(fc_bias=npy(ARRAYS["fc.bias"], shape=(8, 8))),
        "'fc.bias'.*stated",
    ),
    "stated as nothing, NaN": (
        lambda _: record_of(fc_bias=npy(np.full(64, np.nan, np.float32), dtype="", shape=())),
        "'fc.bias'.*NaN or infinity",
    ),
    "of another byte order, NaN": (
        lambda _: record_of(fc_bias=Array(np.full(64, np.nan, ">f4"))),
        "'fc.bias'.*NaN or infinity",
    ),
    "somebody's own serialisation": (
        lambda _: record_of(fc_bias=npy(ARRAYS["fc.bias"], stype="torch.tensor")),
        "'fc.bias'.*torch.tensor",
    ),
    "a payload among arrays": (
        lambda _: record_of(fc_bias=npy(ARRAYS["fc.bias"], stype=STYPE)),
        "'fc.bias'.*payload",
    ),
    "plain, wrong shapes": (lambda _: plain(WRONG), "(3, 3)"),
    "plain, NaN": (lambda _: plain(NAN), "NaN or infinity"),
    "plain, one infinity": (lambda _: plain(ONE_INFINITY), "'fc.bias'.*NaN or infinity"),
    "plain, huge": (lambda _: plain(HUGE), "'conv.weight'"),
    "plain, a name missing": (lambda _: plain(FEWER), "'conv.weight'"),
    "plain, a name more": (lambda _: plain(MORE), "'more'"),
    "plain, of another record": (
        lambda _: plain(ARRAYS, stream_id(RUN_ID, "other")),
        "another",
    ),
    "an update beyond float32": (lambda store: update(store, 2**30, 3e38), "NaN or infinity"),
    "an update of 3e37": (lambda store: update(store, 2**20, 3e31), "'conv.weight'.*e\\+37"),
    "a keyframe": (
        lambda store: payload_record(encode_keyframe(held(store), stream=STREAM)),
        "keyframe",
    ),
    "noise": (lambda _: payload_record(np.random.default_rng(0).bytes(4000)), ""),
    "nothing": (lambda _: payload_record(b""), ""),
}


def metrics(**stated):
    return MetricRecord({name.replace("_", "-"): value for name, value in stated.items()})


# what node 2 makes of the content of its reply, and words of the reason
CONTENTS = {
    "no arrays": (lambda c: c.pop("arrays"), "0 array records"),
    "an extra array record": (
        lambda c: c.__setitem__("arrays2", to_record(ARRAYS)),
        "2 array records",
    ),
    "another key": (lambda c: c.__setitem__("other", c.pop("arrays")), "'other'"),
    "no metrics": (lambda c: c.pop("metrics"), "0 metric records"),
    "extra metrics": (lambda c: c.__setitem__("more", metrics(loss=0.5)), "2 metric records"),
    "num-examples missing": (
        lambda c: c.__setitem__("metrics", metrics(loss=0.5)),
        "'num-examples' is missing",
    ),
    "loss missing": (
        lambda c: c.__setitem__("metrics", metrics(num_examples=5)),
        "'loss' is missing",
    ),
    "a list of losses": (
        lambda c: c.__setitem__("metrics", metrics(num_examples=5, loss=[0.5, 0.5])),
        "'loss' is list of 2",
    ),
    **{
        f"num-examples {value}": (
            lambda c, value=value: c.__setitem__("metrics", metrics(num_examples=value, loss=0.5)),
            "'num-examples'",
        )
        for value in (-25, -1e-9, float("nan"), float("inf"), 1e300, [5, 5])
    },
    "a report of nonsense": (
        lambda c: c.__setitem__("prunecast", ConfigRecord({"report": "x"})),
        "control record",
    ),
    "no report": (lambda c: c.pop("prunecast"), "compression_mod()"),
    "always missing": (
        lambda c: c.__setitem__(
            "prunecast", ConfigRecord({"report": NodeReport({}, ("arrays",)).to_bytes()})
        ),
        "store directory",
    ),
}

# what may look odd, and is none of the server's business
ACCEPTED = {
    "float64": lambda c: c.__setitem__("arrays", plain(filled(0.1, np.float64))),
    "whole numbers": lambda c: c.__setitem__("arrays", plain(filled(1, np.int8))),
    "num-examples 0": lambda c: c.__setitem__("metrics", metrics(num_examples=0, loss=0.5)),
    "loss NaN": lambda c: c.__setitem__("metrics", metrics(num_examples=1, loss=float("nan"))),
    "an unknown version": lambda c: c.__setitem__(
        "prunecast", ConfigRecord({"report": NodeReport({"arrays": b"\7" * 16}).to_bytes()})
    ),
    "20,000 versions": lambda c: c.__setitem__(
        "prunecast",
        ConfigRecord(
            {
                "report": NodeReport(
                    {f"{next(numbers)} {i}": b"\7" * 16 for i in range(20_000)}
                ).to_bytes()
            }
        ),
    ),
    "an extra config": lambda c: c.__setitem__("note", ConfigRecord({"hello": "world"})),
    "not missing, whatever it says": lambda c: c.__setitem__(
        "prunecast",
        ConfigRecord({"report": NodeReport({}, ("x" * 1000, "other")).to_bytes()}),
    ),
}


def run(federation, policy, hostile, strategy=FedAvg, rounds=2, **options):
    grid, inner, _ = federation(policy)

    def change(reply):
        if reply.metadata.src_node_id == 2 and "metrics" in reply.content:
            hostile(reply.content)
        return reply

    inner.on_reply = change
    made = strategy(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3, **options)
    result = made.start(grid=grid, initial_arrays=to_record(ARRAYS), num_rounds=rounds)
    return grid, to_arrays(result.arrays)


def holds(grid, arrays, words, caplog, rounds=2):
    """The two others made a finite model of the right layout; why node 2 did not is known."""
    for name, array in ARRAYS.items():
        assert arrays[name].shape == array.shape
        assert np.isfinite(arrays[name]).all()
        assert np.abs(arrays[name]).max() < 10
    assert list(arrays) == list(ARRAYS)
    entries = [e for e in grid.ledger.entries if e.direction == "up" and e.kind != "base-missing"]
    assert [e.kind == "error" for e in entries if e.node != 2] == [False] * 2 * rounds
    refused = [e for e in entries if e.node == 2]
    assert [e.kind for e in refused] == ["error"] * rounds
    assert all(re.search(words, e.reason) for e in refused), refused[0].reason
    said = [r.getMessage() for r in caplog.records if "its reply was refused" in r.getMessage()]
    assert said
    assert all(text.startswith("Node 2: ") for text in said)
    assert grid._streams.node(2).accepted == []  # so that the node keeps its residual


@pytest.mark.parametrize("case", RECORDS)
def test_arrays_that_cannot_be_meant(federation, tmp_path, caplog, case):
    make, words = RECORDS[case]
    hostile = lambda content: content.__setitem__("arrays", make(tmp_path / "store"))  # noqa: E731
    holds(*run(federation, "small", hostile), words, caplog)


@pytest.mark.parametrize("policy", ["lossless", DENSE_UP, SCHEME], ids=["lossless", "dense", "stc"])
@pytest.mark.parametrize(
    "case",
    ["wrong shapes", "NaN", "a name missing"],
)
def test_arrays_that_cannot_be_meant_however_they_travel(federation, caplog, policy, case):
    make, words = RECORDS[f"verbatim, {case}"]
    hostile = lambda content: content.__setitem__("arrays", make(None))  # noqa: E731
    words = f"{words}|without the scheme" if policy is SCHEME else words
    holds(*run(federation, policy, hostile), words, caplog)


@pytest.mark.parametrize("case", CONTENTS)
def test_contents_that_the_others_do_not_have(federation, caplog, case):
    hostile, words = CONTENTS[case]
    holds(*run(federation, "balanced", hostile), words, caplog)


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_plain_flower_takes_is_taken(federation, case):
    grid, arrays = run(federation, "balanced", ACCEPTED[case])
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert not [e for e in grid.ledger.entries if e.kind == "error"]
    assert set(grid._streams.node(2).held) <= {"arrays"}


@pytest.mark.parametrize("strategy", [FedMedian, FedAdam])
@pytest.mark.parametrize("case", ["verbatim, wrong shapes", "plain, NaN"])
def test_other_strategies_of_flower(federation, caplog, strategy, case):
    make, words = RECORDS[case]
    hostile = lambda content: content.__setitem__("arrays", make(None))  # noqa: E731
    holds(*run(federation, "balanced", hostile, strategy), words, caplog)


def test_a_round_without_a_single_example_is_lost_and_not_the_run(federation):
    grid, inner, _ = federation("balanced")

    def change(reply):
        reply.content["metrics"] = metrics(num_examples=0, loss=0.5)
        return reply

    inner.on_reply = change
    result = FedAvg().start(grid=grid, initial_arrays=to_record(ARRAYS), num_rounds=1)
    assert not result.arrays
    reasons = {e.reason for e in grid.ledger.entries if e.direction == "up"}
    assert reasons == {
        "metric 'num-examples' is 0 in every reply: there is nothing to weigh them by"
    }


def test_what_all_leave_out_is_flowers_to_refuse(federation):
    grid, inner, _ = federation("balanced")

    def change(reply):
        reply.content["metrics"] = metrics(loss=0.5)
        return reply

    inner.on_reply = change
    with pytest.raises(Exception, match="num-examples"):
        FedAvg().start(grid=grid, initial_arrays=to_record(ARRAYS), num_rounds=1)


class Own(FedAvg):
    """A strategy that aggregates by code of its own, whatever shape a reply has."""

    def aggregate_train(self, server_round, replies):
        self.seen = [{n: a.shape for n, a in r.content["arrays"].items()} for r in replies]
        return None, None


def test_a_strategy_of_ones_own_gets_every_layout(federation):
    grid, inner, _ = federation("balanced")
    parts = {1: ARRAYS, 2: FEWER, 3: changed(fc_weight=np.zeros((64, 20), np.float32))}

    def change(reply):
        reply.content["arrays"] = plain(parts[reply.metadata.src_node_id])
        return reply

    inner.on_reply = change
    strategy = Own(fraction_evaluate=0.0)
    strategy.start(grid=grid, initial_arrays=to_record(ARRAYS), num_rounds=1)
    expected = [{n: a.shape for n, a in parts[node].items()} for node in (1, 2, 3)]
    assert sorted(map(str, strategy.seen)) == sorted(map(str, expected))


class Calls(FedAvg):
    """Looks at the replies, and has Flower average them."""

    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, replies)

    def aggregate_evaluate(self, server_round, replies):
        return super().aggregate_evaluate(server_round, replies)


class Sorts(FedAdam):
    """Sorts out, and goes over what is left more than once."""

    def aggregate_train(self, server_round, replies):
        left = [r for r in replies if not r.has_error() and len(r.content.array_records)]
        return super().aggregate_train(server_round, left)


class Gives(FedMedian):
    """Hands Flower an iterator."""

    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, (reply for reply in replies))


def private(wrapped):
    """Clips what the wrapped strategy is given."""
    return lambda **options: DifferentialPrivacyServerSideFixedClipping(
        wrapped(**options), noise_multiplier=0, clipping_norm=10, num_sampled_clients=3
    )


@pytest.mark.parametrize("strategy", [Calls, Sorts, Gives])
@pytest.mark.parametrize("policy", ["lossless", "balanced", SCHEME], ids=["lossless", "", "stc"])
@pytest.mark.parametrize("case", ["wrong shapes", "a name missing"])
def test_a_strategy_that_calls_flowers_own_is_protected(federation, caplog, strategy, policy, case):
    make, words = RECORDS[f"verbatim, {case}"]
    hostile = lambda content: content.__setitem__("arrays", make(None))  # noqa: E731
    words = f"{words}|without the scheme" if policy is SCHEME else words
    holds(*run(federation, policy, hostile, strategy), words, caplog)


@pytest.mark.parametrize("case", CONTENTS)
def test_contents_under_a_strategy_that_calls_flowers_own(federation, caplog, case):
    hostile, words = CONTENTS[case]
    holds(*run(federation, "balanced", hostile, Calls), words, caplog)


def test_private_aggregation_of_a_strategy_of_ones_own_loses_the_round_alone(federation):
    """Flower's wrapper does without a round in which a reply failed; it must not end the run."""
    grid, inner, _ = federation("balanced")

    seen = []

    def change(reply):
        seen.append(reply.metadata.src_node_id)
        if seen.count(2) == 1 and seen[-1] == 2:  # in the first round
            reply.content["arrays"] = to_record(WRONG)
        return reply

    inner.on_reply = change
    result = private(Calls)(fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=to_record(ARRAYS), num_rounds=2
    )
    (refused,) = [e for e in grid.ledger.entries if e.kind == "error"]
    assert (refused.node, "(3, 3)" in refused.reason) == (2, True)
    assert list(result.arrays) == list(ARRAYS)


class Pads(FedAvg):
    """Brings replies to one shape before Flower averages them."""

    def aggregate_train(self, server_round, replies):
        for reply in replies:
            whole = np.zeros((64, 40), np.float32)
            part = reply.content["arrays"]["fc.weight"].numpy()
            whole[:, : part.shape[1]] = part
            reply.content["arrays"]["fc.weight"] = Array(whole)
        return super().aggregate_train(server_round, replies)


def test_a_strategy_that_brings_replies_to_one_shape_gets_them_all(federation):
    grid, inner, _ = federation("balanced")

    def change(reply):
        width = 10 * int(reply.metadata.src_node_id)
        part = changed(fc_weight=np.ones((64, width), np.float32))
        reply.content["arrays"] = plain(part)
        return reply

    inner.on_reply = change
    strategy = Pads(fraction_evaluate=0.0)
    result = strategy.start(grid=grid, initial_arrays=to_record(ARRAYS), num_rounds=1)
    assert not [e for e in grid.ledger.entries if e.kind == "error"]
    columns = result.arrays["fc.weight"].numpy()[0]
    np.testing.assert_allclose(columns[[0, 15, 25, 35]], [1, 5 / 6, 0.5, 0], rtol=1e-6)


def test_a_loop_that_aggregates_by_a_strategy_is_protected(federation):
    """Replies pulled by hand; what was refused is an error from then on."""
    grid, inner, _ = federation("balanced")

    def change(reply):
        if reply.metadata.src_node_id == 2:
            reply.content["arrays"] = plain(WRONG)
        return reply

    inner.on_reply = change
    content = RecordDict({"arrays": to_record(ARRAYS)})
    ids = grid.push_messages([Message(content, node, "train") for node in (1, 2, 3)])
    replies = list(grid.pull_messages(ids))
    assert not any(reply.has_error() for reply in replies)
    assert len(grid._streams.node(2).accepted) == 1
    arrays, _ = FedAvg().aggregate_train(1, replies)
    assert {n: a.shape for n, a in arrays.items()} == {n: a.shape for n, a in ARRAYS.items()}
    (failed,) = [reply for reply in replies if reply.has_error()]
    assert (failed.metadata.src_node_id, "(3, 3)" in failed.error.reason) == (2, True)
    assert (grid._streams.node(2).accepted, len(grid._streams.node(2).given_up)) == ([], 1)


def test_trees_of_different_sizes_are_taken(federation, tmp_path):
    app = ClientApp(mods=[compression_mod(tmp_path / "store")])
    trees = (
        b'{"learner":{"gradient_booster":{"model":{"gbtree_model_param":{"num_trees":"1",'
        b'"num_parallel_tree":"1"},"trees":[{"id":0}],"tree_info":[0],"iteration_indptr":[0,1]}}}}'
    )

    @app.train()
    def train(message, context):
        grown = trees + b" " * int(context.node_id)
        content = RecordDict({"arrays": ArrayRecord([np.frombuffer(grown, np.uint8)])})
        content["metrics"] = metrics(num_examples=1)
        return Message(content, reply_to=message)

    grid, _, _ = federation("balanced", app=app)
    strategy = FedXgbBagging(fraction_evaluate=0.0)
    start = ArrayRecord([np.frombuffer(trees, np.uint8)])
    result = strategy.start(grid=grid, initial_arrays=start, num_rounds=1)
    assert len(result.arrays["0"].numpy()) > len(trees)
    assert not [e for e in grid.ledger.entries if e.kind == "error"]


def test_dense_stays_as_plain_flower(federation):
    grid, inner, _ = federation("dense", app=make_app(None))
    inner.on_reply = lambda reply: reply.content.__setitem__("arrays", to_record(NAN)) or reply
    result = FedAvg(fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=to_record(ARRAYS), num_rounds=1
    )
    assert np.isnan(result.arrays["fc.bias"].numpy()).all()


def bomb(nbytes):
    """A payload of some kilobytes that states so many bytes of zeros, beside a little noise."""
    return plain({"z": np.zeros(nbytes // 4, np.float32), "pad": np.arange(9)})


def test_a_few_bytes_that_decode_to_much(federation, caplog):
    small = bomb(1 << 24)
    hostile = lambda content: content.__setitem__("arrays", small)  # noqa: E731
    grid, arrays = run(federation, "balanced", hostile, rounds=1)
    holds(grid, arrays, "above the limits", caplog, rounds=1)


@pytest.mark.parametrize(("records", "refused"), [(3, False), (8, True)])
def test_all_records_of_a_reply_share_what_it_may_decode_to(
    federation, tmp_path, monkeypatch, records, refused
):
    for name, value in {"_FREE": 0, "_TIMES": 4, "_EXPANSION": 0}.items():
        monkeypatch.setattr(inbound, name, value)
    grid, inner, _ = federation("balanced", nodes=2)

    def change(reply):
        if reply.metadata.src_node_id == 2:
            base = held(tmp_path / "store")
            exact = {name: np.ones(t.shape, t.dtype) for name, t in base.tensors.items()}
            record = payload_record(encode_update(base, exact, stream=STREAM))
            for number in range(records):
                reply.content[f"more {number}"] = record
        return reply

    inner.on_reply = change
    content = RecordDict({"arrays": to_record(ARRAYS)})
    first, second = grid.send_and_receive([Message(content, node, "train") for node in (1, 2)])
    assert not first.has_error()
    assert second.has_error() is refused


def test_a_scheme_bounds_what_it_decodes_by_what_was_sent(federation, caplog):
    scheme = SCHEME.scheme
    many = {name: np.zeros(1 << 20, np.float32) for name in ("a", "b")}
    payload, _ = scheme.encode(many, scheme.init(layout_of(many)), key=1)
    assert len(payload) < 1 << 18

    def change(content):
        content["arrays"] = coded_record(payload, {})

    holds(*run(federation, SCHEME, change, rounds=1), "above Limits.elements", caplog, rounds=1)


# -- any replies ----------------------------------------------------------------------------------

AVERAGE = Aggregation("num-examples", arrays=True, shapes=True, lengths=True)
ANY_ARRAY = st.builds(
    lambda shape, dtype: Array(np.ones(shape, dtype)),
    st.sampled_from([(), (1,), (2,), (1, 2), (2, 2)]),
    st.sampled_from(["f4", "f8", "i1", "?", "c8", "U1"]),
)
ANY_RECORD = st.dictionaries(st.sampled_from("wb"), ANY_ARRAY, max_size=2).map(ArrayRecord)
ANY_METRIC = st.one_of(
    st.integers(-1, 5), st.floats(), st.lists(st.floats(0, 1), min_size=1, max_size=2)
)
ANY_METRICS = st.dictionaries(
    st.sampled_from(["num-examples", "loss"]), ANY_METRIC, max_size=2
).map(MetricRecord)
ANY_REPLY = st.builds(
    lambda arrays, metrics: RecordDict({**arrays, **metrics}),
    st.dictionaries(st.sampled_from(["arrays", "more"]), ANY_RECORD, max_size=2),
    st.dictionaries(st.sampled_from(["metrics", "other"]), ANY_METRICS, max_size=2),
)
USUAL = RecordDict(
    {
        "arrays": ArrayRecord({"w": Array(np.ones(2, "f4"))}),
        "metrics": MetricRecord({"num-examples": 1}),
    }
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(ANY_REPLY, st.just(USUAL)), min_size=1, max_size=5))
def test_what_is_left_can_be_aggregated_by_flower(replies):
    identify_process(RUN_ID, 1)
    content = RecordDict({"arrays": USUAL["arrays"]})
    sent = Prepared(Batch([]), *[Message(content, 1, "train")] * 2)
    found = misfits([(reply, sent) for reply in replies], AVERAGE)
    left = [reply for index, reply in enumerate(replies) if index not in found]
    if left and is_consistent(left):
        if not any(a.dtype == "<U1" for r in left[0].array_records.values() for a in r.values()):
            average(left)
    elif left:  # as in plain Flower, where no reply can be aggregated even alone
        assert not any(is_consistent([reply]) for reply in replies)


def is_consistent(replies):
    try:
        validate_message_reply_consistency(replies, "num-examples", check_arrayrecord=True)
    except InconsistentMessageReplies:
        return False
    return True


def average(left):
    for record in (
        aggregate_arrayrecords(left, "num-examples"),
        aggregate_metricrecords(left, "num-examples"),
    ):
        assert len(record) >= 0
