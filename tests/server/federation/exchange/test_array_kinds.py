"""Arrays of every kind that frameworks hand over, through grid and mod, and trees."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedXgbBagging, FedXgbCyclic

from prunecast.client.training import compression_mod

W = np.random.default_rng(0).normal(size=(64, 40))
KINDS = {
    "float64": W,
    "float32": W.astype(np.float32),
    "float16": W.astype(np.float16),
    "bfloat16": W.astype(ml_dtypes.bfloat16),
    "float8": W.astype(ml_dtypes.float8_e4m3fn),
    "long double": W.astype(np.longdouble),
    "complex": (W + 1j).astype(np.complex64),
    "int8": np.arange(-128, 128).astype(np.int8),
    "uint64": np.array([2**64 - 1, 0, 5], np.uint64),
    "bool": W > 0,
    "bytes of a model": np.frombuffer(b"tree " * 100, np.uint8),
    "strings": np.array(["a", "bcd"]),
    "byte strings": np.array([b"a", b"bcd"]),
    "dates": np.array(["2020-01-01"], "datetime64[D]"),
    "empty": np.zeros(0, np.uint8),
    "empty matrix": np.zeros((0, 4), np.float32),
    "no dimensions": np.array(1.5, np.float32),
    "an integer": np.array(7, np.int64),
    "fortran": np.asfortranarray(W.astype(np.float32)),
    "view": W.astype(np.float32)[::2, ::-1],
    "big-endian": W.astype(">f4"),
    "big-endian integers": np.arange(5, dtype=">i4"),
}
NAMES = ("", ".", "a.b/c", "é\n=", "prunecast", "=k", "0=k", "\0places", "x" * 60_000)


def exchanged(federation, tmp_path, policy, arrays, change):
    """What a node was given and the strategy got back, twice: first whole, then a change of it."""
    app, given = ClientApp(mods=[compression_mod(tmp_path / "store")]), []

    @app.train()
    def train(message, context):
        given.append(dict(message.content["arrays"]))
        replied = {name: Array(change(a.numpy())) for name, a in given[-1].items()}
        content = {"arrays": ArrayRecord(replied), "m": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    grid, _, _ = federation(policy, nodes=1, app=app)
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    got = []
    for number in (1, 2):
        content = RecordDict({"arrays": record, "c": ConfigRecord({"server-round": number})})
        (reply,) = grid.send_and_receive([Message(content, 1, "train")])
        assert not reply.has_error(), reply.error.reason
        got.append(dict(reply.content["arrays"]))
        record = ArrayRecord(got[-1])
    return given, got, grid


def as_it_was(array):
    return array


def wrapped(array):
    """Another value everywhere, beyond the end of integers."""
    if array.dtype.kind in "iu":
        return np.asarray(array + np.array(200).astype(array.dtype))
    if array.dtype.kind != "f" or array.itemsize > 8:  # a long double has bytes that say nothing
        return array
    return np.asarray(array * 2, array.dtype)


@pytest.mark.parametrize("change", [as_it_was, wrapped])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_arrives_exactly(federation, tmp_path, kind, change):
    array = KINDS[kind]
    given, got, _ = exchanged(federation, tmp_path, "lossless", {"w": array}, change)
    native = array.dtype.newbyteorder("=") if array.dtype.kind in "fiu" else array.dtype
    # as plain Flower hands it over: what is NumPy's own it reads again, the rest as bytes
    seen = Array(np.asarray(array, native)).numpy()
    expected = np.asarray(seen)
    for sent, replied in zip(given, got, strict=True):
        assert sent["w"].numpy().tobytes() == expected.tobytes()
        assert sent["w"].numpy().dtype == expected.dtype
        expected = change(expected)
        assert replied["w"].numpy().tobytes() == expected.tobytes()
        assert replied["w"].numpy().dtype == expected.dtype
        assert replied["w"].shape == array.shape


@pytest.mark.parametrize("kind", ["float64", "float16"])
def test_a_lattice_keeps_the_dtype(federation, tmp_path, kind):
    array = KINDS[kind]
    given, got, grid = exchanged(
        federation, tmp_path, "fine", {"w": array}, lambda a: a * a.dtype.type(1.01)
    )
    for records in (given, got):
        for record in records:
            assert record["w"].numpy().dtype == array.dtype
            assert np.linalg.norm(record["w"].numpy() - array) < 0.1 * np.linalg.norm(array)
    assert [e.kind for e in grid.ledger.entries] == ["keyframe", "update", "delta", "update"]


def test_names_of_any_kind(federation, tmp_path):
    arrays = {name: W.astype(np.float32) * n for n, name in enumerate(NAMES, 1)}
    given, got, grid = exchanged(federation, tmp_path, "lossless", arrays, wrapped)
    for sent, replied in zip(given, got, strict=True):
        assert list(sent) == list(replied) == list(NAMES)
        for name in NAMES:
            assert (replied[name].numpy() == 2 * sent[name].numpy()).all()
    assert {e.kind for e in grid.ledger.entries if e.direction == "up"} == {"update"}


def test_one_array_without_a_name(federation, tmp_path):
    _, got, grid = exchanged(federation, tmp_path, "lossless", {"": KINDS["float32"]}, wrapped)
    assert (got[-1][""].numpy() == 4 * KINDS["float32"]).all()
    assert {e.kind for e in grid.ledger.entries if e.direction == "up"} == {"update"}


def test_grid_and_mod_need_no_torch():
    program = (
        "import sys; sys.modules['torch'] = sys.modules['onnx'] = None\n"
        "from prunecast.client import compression_mod, current_masks\n"
        "from prunecast.server import CompressedGrid, Policy\n"
        "compression_mod(); Policy.preset('small')"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)


# -- trees ----------------------------------------------------------------------------------------


def forest(*trees):
    """As XGBoost writes it, with what Flower's aggregation reads."""
    written = [
        {"id": number, "split_conditions": np.random.default_rng(seed).normal(size=30).tolist()}
        for number, seed in enumerate(trees)
    ]
    parts = {
        "gbtree_model_param": {"num_parallel_tree": "1", "num_trees": str(len(trees))},
        "iteration_indptr": list(range(len(trees) + 1)),
        "tree_info": [0] * len(trees),
        "trees": written,
    }
    whole = {"learner": {"gradient_booster": {"model": parts, "name": "gbtree"}}, "version": [3, 2]}
    return json.dumps(whole).encode()


def conditions(written):
    model = json.loads(written)["learner"]["gradient_booster"]["model"]
    return [tree["split_conditions"] for tree in model["trees"]]


@pytest.mark.parametrize("policy", ["balanced", "lossless"])
@pytest.mark.parametrize("strategy", [FedXgbBagging, FedXgbCyclic])
def test_flowers_strategies_for_trees(federation, tmp_path, strategy, policy):
    """The first model is empty; each reply is one tree (or all and one more), longer than it."""
    app, rounds, nodes = ClientApp(mods=[compression_mod(tmp_path / "store")]), 6, 3

    @app.train()
    def train(message, context):
        held = message.content["arrays"]["0"].numpy().tobytes()
        number = message.content["config"]["server-round"]
        grown = context.node_id * 100 + number
        if strategy is FedXgbCyclic and held:
            kept = json.loads(held)
            kept["learner"]["gradient_booster"]["model"]["trees"].append(
                json.loads(forest(grown))["learner"]["gradient_booster"]["model"]["trees"][0]
            )
            trees = json.dumps(kept).encode()
        else:
            trees = forest(grown)
        record = ArrayRecord([np.frombuffer(trees, np.uint8)])
        content = {"arrays": record, "m": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    grid, _, _ = federation(policy, nodes=nodes, app=app)
    made = strategy(fraction_evaluate=0.0, min_available_nodes=nodes)
    result = made.start(
        grid=grid, initial_arrays=ArrayRecord([np.zeros(0, np.uint8)]), num_rounds=rounds
    )
    found = conditions(result.arrays["0"].numpy().tobytes())
    a_round = nodes if strategy is FedXgbBagging else 1
    assert len(found) == rounds * a_round
    exact = {
        n * 100 + r: conditions(forest(n * 100 + r))[0] for n in range(1, 4) for r in range(1, 7)
    }
    assert all(tree in exact.values() for tree in found)
    down = [e for e in grid.ledger.entries if e.direction == "down"]
    assert all(e.kind in ("keyframe", "delta", "reuse") for e in down)
    if strategy is FedXgbBagging:
        # the last message brings three trees, and costs no more than they do
        assert down[-1].kind == "delta"
        assert down[-1].payload_bytes < 3 * len(forest(1)) < down[-1].dense_bytes / 4
