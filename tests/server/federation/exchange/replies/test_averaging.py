"""Replies are decoded once; Flower's average merges them without forming their arrays."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, Krum, MultiKrum
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from prunecast.compression.flower import payload_of, payload_record
from prunecast.compression.versions import (
    Change,
    LatticeTensor,
    PublishedModel,
    QuantisedTensor,
    Update,
    UpdateReader,
    encode_update,
)
from prunecast.server.federation import Policy
from prunecast.server.federation.exchange.replies.lazy import LazyArray, WeightedSum, WholeSum
from prunecast.server.federation.reporting.ledger import Entry
from support.federation import initial_arrays, to_record

SMALL = Policy.preset("small", pruning_begin=0, pruning_end=1)
LATTICE = {"conv.weight", "fc.weight", "fc.bias"}


def replies_of(grid, key="arrays"):
    content = RecordDict({key: to_record(initial_arrays())})
    nodes = list(grid.get_node_ids())
    return list(grid.send_and_receive([Message(content, node, "train") for node in nodes]))


def average(replies):
    """What Flower does, on arrays that were read before."""
    plain = []
    for reply in replies:
        arrays = {name: Array(array.numpy()) for name, array in reply.content["arrays"].items()}
        metrics = reply.content["metrics"]
        plain.append(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}))
    return aggregate_arrayrecords(plain, "num-examples")


@pytest.fixture
def formed(monkeypatch):
    """Names of the arrays that are formed."""
    names = []
    apply = Update.apply
    monkeypatch.setattr(
        Update, "apply", lambda self, name, master: names.append(name) or apply(self, name, master)
    )
    return names


@pytest.mark.parametrize("policy", ["balanced", SMALL], ids=["balanced", "small"])
def test_an_average_forms_no_array_of_the_lattice(federation, formed, policy):
    grid, _, _ = federation(policy, nodes=5)
    replies = replies_of(grid)
    contents = [reply.content for reply in replies]
    ours = aggregate_arrayrecords(contents, "num-examples")
    assert not LATTICE & set(formed)
    again = aggregate_arrayrecords(contents, "num-examples")
    theirs = average(replies)
    assert set(formed) >= LATTICE
    for name, array in theirs.items():
        expected, found = array.numpy(), ours[name].numpy()
        assert type(found) is np.ndarray
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=5e-7, atol=1e-8)
        assert found.tobytes() == again[name].numpy().tobytes()
        if name not in LATTICE:
            assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "strategy", [FedAvg, FedAvgM, FedAdam, MultiKrum], ids=lambda s: s.__name__
)
def test_strategies_that_average_merge(federation, formed, strategy):
    grid, _, _ = federation(SMALL, nodes=5)
    random.seed(0)
    made = strategy() if strategy is not MultiKrum else MultiKrum(num_malicious_nodes=1)
    result = made.start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=2)
    assert result.arrays is not None
    # MultiKrum reads every reply to choose among them, and then averages the chosen ones
    assert formed.count("fc.weight") == (10 if strategy is MultiKrum else 0)


def test_strategies_that_choose_read_arrays(federation, formed):
    grid, _, _ = federation(SMALL, nodes=5)
    made = Krum(num_malicious_nodes=1)
    made.start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=1)
    assert formed.count("fc.weight") >= 5


def test_a_lossless_run_reads_arrays(federation, formed):
    grid, _, _ = federation("lossless", nodes=3)
    ours = aggregate_arrayrecords([r.content for r in replies_of(grid)], "num-examples")
    assert formed.count("fc.weight") == 3
    assert set(ours) == set(initial_arrays())


def test_everybody_else_gets_arrays(federation):
    grid, _, _ = federation(SMALL)
    record = replies_of(grid)[0].content["arrays"]
    for array in record.values():
        found = array.numpy()
        assert type(found) is np.ndarray
        assert found.flags.writeable
        assert np.load(__import__("io").BytesIO(array.data)).tobytes() == found.tobytes()
    state = record.to_torch_state_dict()
    assert torch.equal(state["fc.weight"], torch.from_numpy(record["fc.weight"].numpy()))
    assert all(type(array) is np.ndarray for array in record.to_numpy_ndarrays())


def test_a_copy_is_the_array_alone(federation):
    grid, _, _ = federation(SMALL, nodes=1)
    record = replies_of(grid)[0].content["arrays"]
    pickled = pickle.loads(pickle.dumps(record))  # noqa: S301 - of our own making
    for copied in (pickled, copy.deepcopy(record)):
        for name, array in record.items():
            assert type(copied[name]) is Array
            assert copied[name].data == array.data
            assert (copied[name].dtype, copied[name].shape) == (array.dtype, array.shape)
    assert type(copy.copy(record["fc.weight"])) is Array


@pytest.mark.parametrize("verify", [True, False])
def test_a_reply_is_decoded_once_however_often_it_is_read(federation, monkeypatch, verify):
    decoded = []
    inner = Update._decode
    monkeypatch.setattr(
        Update,
        "_decode",
        lambda self, name: (
            (decoded.append(name) if name in self._left else None) or inner(self, name)
        ),
    )
    grid, _, _ = federation(SMALL, nodes=1, verify_replies=verify)
    (reply,) = replies_of(grid)
    assert bool(decoded) is verify
    for _ in range(3):
        reply.content["arrays"].to_numpy_ndarrays()
    assert len(decoded) == len(set(decoded)) > 0
    (entry,) = [e for e in grid.ledger.entries if e.direction == "up"]
    assert entry.decode_ms > 0


@pytest.mark.usefixtures("unpacked")
def test_without_verifying_a_damaged_reply_stops_the_average(federation):
    grid, inner, _ = federation(SMALL, nodes=2, verify_replies=False)

    def damage(reply):
        payload = bytearray(payload_of(reply.content["arrays"]))
        payload[len(payload) // 2] ^= 1
        reply.content["arrays"] = payload_record(bytes(payload))
        return reply

    inner.on_reply = damage
    # the frame's checksum shows it on arrival in any case
    assert all(reply.has_error() for reply in replies_of(grid))


def test_without_verifying_a_residual_is_committed_when_all_arrays_are_decoded(federation):
    grid, _, _ = federation(SMALL, nodes=1, verify_replies=False)
    (reply,) = replies_of(grid)
    node = grid._streams.node(1)
    *some, last = reply.content["arrays"].values()
    for array in some * 2:
        array.numpy()
    assert node.accepted == []
    last.numpy()
    last.numpy()
    assert len(node.accepted) == 1


# -- the sum itself -------------------------------------------------------------------------------


def reply_to(base, master, seed, metric=1):
    """A content with one lazy array, and the array."""
    mask = base["w"].mask()
    z = np.random.default_rng(seed).integers(-4, 5, base["w"].shape).astype(np.int32)
    if mask is not None:
        z *= mask
    update = UpdateReader(base).read(encode_update(base, {"w": QuantisedTensor(z, 0.125)}))
    entry = Entry(0, 0, "up", "update", "train", 0, 0)
    array = LazyArray(
        lambda: update.apply("w", master),
        master.dtype,
        master.shape,
        entry,
        lambda: WeightedSum(master, update.change("w")),
    )
    metrics = MetricRecord({"num-examples": metric})
    content = RecordDict({"arrays": ArrayRecord({"x": Array(np.zeros(1))}), "metrics": metrics})
    content["arrays"].clear()
    content["arrays"]["w"] = array
    return content, update.apply("w", master)


def base_of(seed, pruned=True):
    q = np.random.default_rng(seed).integers(-3, 4, (30, 20))
    return PublishedModel({"w": LatticeTensor(q, 0.5, pruned)}, seed)


@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_replies_to_different_versions_are_summed_as_arrays(dtype, pruned):
    contents, arrays = [], []
    for version in (1, 2):
        base = base_of(version, pruned)
        master = np.random.default_rng(version).normal(size=(30, 20)).astype(dtype)
        for node in (1, 2):
            content, array = reply_to(base, master, 10 * version + node, metric=node)
            contents.append(content)
            arrays.append((node, array))
    found = aggregate_arrayrecords(contents, "num-examples")["w"].numpy()
    expected = sum(array.astype(np.float64) * (node / 6) for node, array in arrays)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, atol=4 * np.finfo(dtype).eps, rtol=1e-6)


def test_many_replies_are_summed_more_exactly_than_in_float32():
    base = base_of(1)
    master = np.random.default_rng(1).normal(size=(30, 20)).astype(np.float32)
    found, exact = [], 0.0
    for node in range(200):
        content, array = reply_to(base, master, node)
        found.append(content)
        exact = exact + array.astype(np.float64) / 200
    average = aggregate_arrayrecords(found, "num-examples")["w"].numpy()
    np.testing.assert_allclose(average, exact, atol=2e-7)
    # where nothing can change the master stays to the bit, and so does a server's momentum
    pruned = ~base["w"].mask()
    assert average[pruned].tobytes() == master[pruned].tobytes()


def test_a_sum_behaves_as_its_array_in_any_other_use():
    master = np.arange(6, dtype=np.float32).reshape(2, 3)
    change = Change(np.array([4, -8], np.int8), 0.5, np.array([1, 3], np.uint8), None)
    expected = master + np.array([[0, 2, 0], [-4, 0, 0]], np.float32)

    def made():
        return WeightedSum(master, change)

    assert np.array_equal(np.asarray(made()), expected)
    assert np.array_equal(np.asarray(made() * 0.5), expected * 0.5)
    assert np.array_equal(made() * 2 * 0.5, expected)
    assert np.array_equal(0.5 * made(), expected * 0.5)
    assert np.array_equal(made() / 2, expected / 2)
    assert np.array_equal(made() + 1, expected + 1)
    assert np.array_equal(1 - made(), 1 - expected)
    assert np.array_equal(-made(), -expected)
    assert np.array_equal(np.stack([made(), made()]), np.stack([expected, expected]))
    assert np.array_equal(made().astype(np.float64), expected)
    assert (made().shape, made().dtype, made().size) == ((2, 3), np.float32, 6)
    assert made().sum() == expected.sum()
    total = made() * 0.25
    total += made() * 0.75
    assert isinstance(total, WeightedSum)
    total -= expected
    assert np.array_equal(total, np.zeros((2, 3)))
    twice = made() * np.float64(2)
    assert np.array_equal(twice, expected * 2)
    own = made()
    own += own
    assert np.array_equal(own, 2 * expected)
    mixed = made() * 1.0
    mixed += expected
    assert np.array_equal(mixed, 2 * expected)
    array = expected.copy()
    array += made()
    assert np.array_equal(array, 2 * expected)
    assert sum([made(), made()]).tolist() == (2 * expected).tolist()
    assert master.tolist() == [[0, 1, 2], [3, 4, 5]]


# -- whole numbers --------------------------------------------------------------------------------


def mean_of(arrays, weights):
    """As Flower's average does it."""
    total = None
    for array, weight in zip(arrays, weights, strict=True):
        part = WholeSum(array) * (weight / sum(weights))
        if total is None:
            total = part
        else:
            total += part
    return np.asarray(total)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64", "uint64"])
def test_an_average_of_integers_has_their_dtype_and_is_the_nearest(dtype):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 100, (5, 4)).astype(dtype) for _ in range(7)]
    weights = [float(w) for w in rng.integers(1, 50, 7)]
    found = mean_of(arrays, weights)
    expected = np.average([a.astype(np.float64) for a in arrays], axis=0, weights=weights)
    assert found.dtype == dtype
    assert np.abs(found - expected).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(2**63 - 1, "int64"), (-(2**63), "int64"), (2**64 - 1, "uint64"), (2**53 + 1, "int64"),
     (-128, "int8"), (127, "int8"), (0, "uint8"), (True, "bool"), (False, "bool")],
)  # fmt: skip
def test_what_all_replies_agree_on_stays_to_the_last_bit(value, dtype):
    array = np.array([value, value]).astype(dtype)
    found = mean_of([array] * 3, [1.0, 3.0, 7.0])
    assert (found.dtype, found.tolist()) == (array.dtype, array.tolist())


def test_integers_that_differ_a_little_are_averaged_beyond_float64():
    arrays = [np.array([2**60 + k]) for k in (0, 2, 1)]
    assert mean_of(arrays, [1, 1, 1]).tolist() in ([2**60], [2**60 + 1])
    assert mean_of([np.array([True, False]), np.array([True, True])], [1, 3]).tolist() == [True] * 2


def test_a_sum_of_single_numbers_is_an_array():
    total = WholeSum(np.int64(7)) * 0.5  # an average in floats becomes such a number again
    total += WholeSum(np.int64(7)) * 0.5
    assert isinstance(total.array(), np.ndarray)
    assert np.asarray(total) == 7


def test_whole_sums_behave_as_arrays_elsewhere():
    whole = WholeSum(np.array([1, 2, 3]))
    assert (whole + 1).tolist() == [2, 3, 4]
    assert (whole * np.float64(0.5)).tolist() == [0.5, 1, 1.5]
    assert (whole * 0.3).array().tolist() == [0, 1, 1]
    total = WholeSum(np.array([1, 2, 3])) * 1.0
    total += np.array([1.5, 0, 0])
    assert total.tolist() == [2.5, 2, 3]
    assert np.stack([whole, whole]).shape == (2, 3)
