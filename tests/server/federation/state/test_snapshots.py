"""Values that go on: as JSON and tensors, without pickle, the very same on the other side."""

from __future__ import annotations

import json
import random
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.versions import Capabilities, LatticeTensor, PublishedModel, RawTensor
from prunecast.server.federation import Checkpoint, CheckpointError, CompressedGrid, Policy
from prunecast.server.federation.publishing.classes import Treatment
from prunecast.server.federation.publishing.scheme_publisher import SchemePublisher
from prunecast.server.federation.publishing.streams import NodeState
from prunecast.server.federation.state import stream_state as fields
from prunecast.server.federation.state.checkpoints import newest_checkpoint, save_newest
from prunecast.server.federation.state.snapshots import Packer, Unpacker, Unstorable, fingerprint

LARGE = np.arange(6000, dtype=np.float32).reshape(60, 100)


def again(value: Any, known: dict[str, np.ndarray] | None = None) -> Any:
    """A value after it was in a file."""
    packer = Packer(known)
    document = json.loads(json.dumps(packer.pack(value)))
    return Unpacker({**(known or {}), **packer.tensors}.__getitem__).unpack(document)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, 10**30, -0.5, float("inf"), "text", b"bytes", b"x" * 10_000),
        [1, [2, "3"]], (1, (2,)), {"a": 1, 2: (3,)}, {1, 2}, frozenset({"a"}), {(1, "a"): b"b"},
        OrderedDict([("b", 1), ("a", 2)]), deque([1, 2], maxlen=3), np.dtype("<f4"),
        {"bytes": "no bytes"}, {"dict": []}, [{"array": "x"}],
    ],
)  # fmt: skip
def test_plain_values_stay_what_they_are(value: Any) -> None:
    found = again(value)
    assert found == value
    assert type(found) is type(value)
    if isinstance(value, deque):
        assert found.maxlen == value.maxlen


@pytest.mark.parametrize(
    "array",
    [
        LARGE, LARGE.T, LARGE.astype(">f8"), np.array(3.5), np.zeros((0, 3), np.int8),
        np.array([1 + 2j]), np.float16([np.nan, -0.0]), LARGE > 9, np.array([True, False]),
        np.array(["a", "bc"]), np.arange(3, dtype=np.uint64),
    ],
)  # fmt: skip
def test_arrays_stay_what_they_are(array: np.ndarray) -> None:
    found = again({"a": array})["a"]
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()
    found[...] = 0  # and belong to nobody else
    scalar = again(np.float32(0.1))
    assert type(scalar) is np.float32
    assert scalar == np.float32(0.1)


def test_what_libraries_make_stays_what_it_is() -> None:
    odd = Array(dtype="vocabulary", shape=(2,), stype="somebody's", data=b"\0" * 5000)
    record = ArrayRecord({"w": Array(LARGE), "odd": odd})
    content = RecordDict({
        "arrays": record,
        "metrics": MetricRecord({"loss": 0.5, "many": [1, 2]}),
        "config": ConfigRecord({"lr": 0.1, "on": True, "raw": b"x"}),
    })  # fmt: skip
    found = again(content)
    assert found == content
    assert found.object_id == content.object_id
    plan = ChannelPlan({"w": (np.array([True, False]), None)}, share=0.5)
    assert again(plan).to_text() == plan.to_text()
    q = np.array([[1, -300], [0, 2]])
    model = PublishedModel(
        {"w": LatticeTensor(q, 0.25, True, np.dtype("f2")), "n": RawTensor(np.arange(3))}, 7
    )
    same = again(model)
    assert (same.digest, same.counter) == (model.digest, 7)
    assert again(same).tensors["w"].dtype == np.float16


@pytest.mark.parametrize("name", ["PCG64", "MT19937", "Philox", "SFC64"])
def test_generators_draw_on(name: str) -> None:
    generator = np.random.Generator(getattr(np.random, name)(3))
    legacy, plain = np.random.RandomState(4), random.Random(5)
    for one in (generator.random, legacy.rand, plain.random):
        one()
    others = again([generator, legacy, plain])
    assert [others[0].random(), others[1].rand(), others[2].random()] == [
        generator.random(), legacy.rand(), plain.random(),
    ]  # fmt: skip


def test_what_is_there_already_is_not_stored_again() -> None:
    packer = Packer({"w": LARGE})
    packer.pack({"one": LARGE.copy(), "other": LARGE + 1, "again": LARGE + 1, "scalar": LARGE[0]})
    assert [a.shape for a in packer.tensors.values()] == [(60, 100), (100,)]
    assert fingerprint({"a": LARGE.copy()}) == fingerprint({"a": LARGE})
    assert fingerprint({"a": LARGE + 1}) != fingerprint({"a": LARGE})


@pytest.mark.parametrize(
    "value",
    [object(), [lambda: 1], {"a": Path()}, np.array([object()]), 1 + 2j, type("K", (dict,), {})()],
)
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(Unstorable):
        Packer().pack(value)


@pytest.mark.parametrize(
    "document",
    [
        {"generator": {"dict": [["bit_generator", "os"]]}}, {"nothing": 1}, {"array": "absent"},
        {"a": 1, "b": 2}, {"model": [1]}, {"raw": ["x", "|O", [1]]}, {"bytes": "%"}, {},
    ],
)  # fmt: skip
def test_a_document_that_is_none_makes_nothing(document: Any) -> None:
    tensors = {"x": np.zeros(8, np.uint8)}
    with pytest.raises((ValueError, KeyError, AttributeError, TypeError)):
        Unpacker(tensors.__getitem__).unpack(document)


def test_every_field_that_is_left_out_by_name_is_there() -> None:
    """A field that was renamed would be stored under its new name, and the old one stay here."""
    policy = Policy(down="stc", up="stc")
    stream = SchemePublisher(policy, b"", policy.pruning())
    for owner, left_out in (
        (stream, fields._PUBLISHER),
        (stream._lattices, fields._LATTICES),
        (stream.pruner, fields._PRUNER),
        (stream.pruner.progress, fields._PROGRESS),
    ):
        assert left_out <= vars(owner).keys(), left_out - vars(owner).keys()


def test_what_a_node_said_goes_on() -> None:
    said = NodeState(
        {"arrays": b"1" * 16}, ["ab"], ["cd"], True, {"query"}, "small", safe={"ab"},
        able=Capabilities("0.1.0", (1, 1), 10**6, 10**9, 9.7), treatment=Treatment("edge", True),
    )  # fmt: skip
    for node in (said, NodeState()):
        assert fields.nodes_from(again(fields.nodes_state({7: node}))) == {7: node}


def test_of_older_versions_only_what_nodes_hold_is_kept_as_differences(federation: Any) -> None:
    from flwr.serverapp.strategy import FedAvg

    from support.federation import initial_arrays, to_record

    grid, inner, _ = federation("balanced", nodes=3)
    inner.online = {1, 2, 3}
    arrays = to_record(initial_arrays())
    strategy = FedAvg(fraction_evaluate=0.0)
    for number in range(3):
        arrays = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=1).arrays
        if number == 0:
            inner.online = {1, 2}  # the third goes on holding the first version
    grid.published(arrays)
    state = grid.checkpoint(arrays).state
    assert state is not None
    stream = grid._streams.stream(inner.run.run_id, "arrays")
    kept = state["grid"]["streams"]["arrays"]["history"]["whole"]
    held = {node.held["arrays"] for node in grid._streams._nodes.values()}
    assert {digest for digest, *_ in kept} == held | {stream._latest.digest[:16]}
    later, _, _ = federation("balanced", run_id=99)
    later.go_on(Checkpoint({}, 0, {}, state=state))
    restored = later._streams.stream(99, "arrays")
    assert set(restored.history) == {digest for digest, *_ in kept}
    for digest in restored.history:
        assert restored.history.get(digest).digest == stream.history.get(digest).digest
    assert isinstance(later, CompressedGrid)


def test_the_last_few_checkpoints_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoint.safetensors"
    assert newest_checkpoint(path) is None
    for number in range(5):
        save_newest(Checkpoint({"w": LARGE}, number, {}), path, 3)
    names = {p.name: Checkpoint.load(p).counter for p in path.parent.iterdir()}
    assert names == {
        "checkpoint.safetensors": 4, "checkpoint-1.safetensors": 3, "checkpoint-2.safetensors": 2,
    }  # fmt: skip
    path.unlink()
    found = newest_checkpoint(path)
    assert found is not None
    assert found.counter == 3


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    Checkpoint({"w": LARGE[:2]}, 1, {}, state={"a": LARGE, "b": b"x" * 9000}).save(path)
    data = path.read_bytes()
    for place in range(8, len(data), len(data) // 40):
        damaged = bytearray(data)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="not a usable checkpoint"):
            Checkpoint.load(path)
