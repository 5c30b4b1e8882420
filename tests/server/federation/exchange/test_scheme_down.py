"""Models that travel down by a scheme: nodes hold what the server says they hold."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from prunecast.compression.codec import CodecError
from prunecast.compression.flower.chains import decode_chain, encode_chain
from prunecast.compression.schemes.layout import layout_of
from prunecast.compression.schemes.registry import scheme
from prunecast.compression.schemes.sparse import Stc
from prunecast.compression.versions import (
    BaseMissing,
    PublishedModel,
    RawTensor,
    VersionsError,
    model_limits,
)
from prunecast.server.federation import CompressedGrid, Ledger, Policy
from prunecast.server.federation.errors import PolicyError
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import initial_arrays, make_app, to_record

STC = Policy(down="stc", down_options={"density": 0.05}, up="stc", up_options={"density": 0.05})


def sent(grid: CompressedGrid, arrays: dict[str, np.ndarray], number: int, nodes=(1, 2)) -> None:
    record = to_record(arrays)
    content = {"arrays": record, "config": ConfigRecord({"server-round": number})}
    messages = [Message(RecordDict(content), node, "evaluate") for node in nodes]
    replies = list(grid.send_and_receive(messages))
    assert not [reply.error for reply in replies if reply.has_error()]


def federation(tmp_path, policy=STC):
    seen: list[tuple[int, str, dict[str, np.ndarray]]] = []
    inner = InProcessGrid(make_app(tmp_path, seen), num_nodes=2)
    return CompressedGrid(inner, policy, ledger=Ledger(keep=1000)), seen


def masters(count: int) -> list[dict[str, np.ndarray]]:
    found, rng = [initial_arrays()], np.random.default_rng(4)
    for _ in range(count - 1):
        last = found[-1]
        steps = {n: a + 0.1 * rng.laplace(size=a.shape).astype("f4") for n, a in last.items()}
        steps["bn.running_var"] = np.abs(steps["bn.running_var"])
        found.append(steps)
    return found


def test_nodes_hold_the_sum_of_what_was_coded_with_what_was_dropped_coded_next(tmp_path):
    grid, seen = federation(tmp_path)
    stc = Stc(density=0.05)  # with its residual, as in algorithm 2 of the paper
    weights = ("conv.weight", "fc.weight", "fc.bias")
    begin, *others = masters(5)
    state = stc.init(layout_of({n: begin[n] for n in weights}))
    held, before = {n: begin[n] for n in weights}, begin
    sent(grid, begin, 1)
    for number, master in enumerate(others, start=2):
        sent(grid, master, number)
        change = {n: master[n] - before[n] for n in weights}
        payload, state = stc.encode(change, state, key=0)
        for name, values in stc.decode(payload).items():
            held[name] = held[name] + values
        for node, _, arrays in seen[-2:]:
            for name in weights:
                np.testing.assert_allclose(arrays[name], held[name], atol=2e-6, err_msg=str(node))
            # statistics travel exactly
            np.testing.assert_array_equal(arrays["bn.running_var"], master["bn.running_var"])
        published = grid.published(to_record(master)).arrays()
        assert all(np.array_equal(published[n], arrays[n]) for n in published)
        before = master
    grid.ledger.flush()
    kinds = [e.kind for e in grid.ledger.entries if e.direction == "down"]
    assert kinds == ["keyframe"] * 2 + ["scheme"] * 8


@pytest.mark.parametrize(("missed", "kind"), [(1, "scheme"), (6, "scheme"), (60, "keyframe")])
def test_a_node_that_missed_messages_gets_all_of_them(tmp_path, missed, kind):
    grid, seen = federation(tmp_path)
    rounds = masters(missed + 2)
    sent(grid, rounds[0], 1)
    for number, master in enumerate(rounds[1:-1], start=2):
        sent(grid, master, number, nodes=(1,))
    sent(grid, rounds[-1], missed + 2)
    (_, _, first), (_, _, late) = seen[-2:]
    for name, array in first.items():
        np.testing.assert_array_equal(array, late[name])
    grid.ledger.flush()
    *_, usual, last = [e for e in grid.ledger.entries if e.direction == "down"]
    assert (usual.kind, last.kind) == ("scheme", kind)
    # nothing is free: as many payloads as were missed
    if kind == "scheme":
        assert last.payload_bytes > usual.payload_bytes + missed * 150


@pytest.mark.parametrize("name", ["topk", "stc", "qsgd", "signsgd", "int8", "int4", "fp16"])
def test_every_scheme_trains_in_both_directions(tmp_path, name):
    options = {"signsgd": {"step": 0}, "topk": {"density": 0.1}, "stc": {"density": 0.1}}
    given = options.get(name, {})
    policy = Policy(down=name, down_options=given, up=name, up_options=given)
    grid, _ = federation(tmp_path, policy)
    result = FedAvg(min_available_nodes=2, min_train_nodes=2, fraction_evaluate=0).start(
        grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=3
    )
    assert all(np.isfinite(a.numpy()).all() for a in result.arrays.values())
    grid.ledger.flush()
    entries = grid.ledger.entries
    assert [e.kind for e in entries if e.direction == "up"] == [name] * 6
    down = [e for e in entries if e.direction == "down"]
    assert [e.kind for e in down] == ["keyframe"] * 2 + ["scheme"] * 4
    assert max(e.payload_bytes for e in down[2:]) < 0.8 * down[0].payload_bytes


def test_a_drawn_model_comes_as_its_seed_and_goes_on_by_changes(tmp_path):
    grid, seen = federation(tmp_path)
    drawn = grid.draw_initial(to_record(initial_arrays()), 7)
    start = {name: array.numpy() for name, array in drawn.items()}
    sent(grid, start, 1)
    sent(grid, {n: a + np.float32(0.01) for n, a in start.items()}, 2)
    for name, array in seen[0][2].items():
        np.testing.assert_array_equal(array, start[name])
    grid.ledger.flush()
    first, _, second, _ = [e for e in grid.ledger.entries if e.direction == "down"]
    assert (first.kind, second.kind) == ("keyframe", "scheme")
    assert first.payload_bytes < 0.3 * second.dense_bytes


def test_damaged_and_foreign_chains_are_refused():
    held = PublishedModel({"w": RawTensor(np.ones(40, "f4")), "n": RawTensor(np.array(3))}, 1)
    stc = scheme("stc", density=0.1)
    change = {"w": np.linspace(-1, 1, 40, dtype=np.float32)}
    part, _ = stc.encode(change, stc.init({"w": (40,)}), key=0)
    after = {"w": held.arrays()["w"] + stc.decode(part)["w"], "n": np.array(5)}
    model = PublishedModel({n: RawTensor(a) for n, a in after.items()}, 2)
    payload = encode_chain(held.digest, model, [part], frozenset({"w"}), stream=b"s")
    limits = model_limits(1000)
    found = decode_chain(payload, held=held, stream=b"s", limits=limits)
    assert found.digest == model.digest
    with pytest.raises(BaseMissing):
        decode_chain(payload, held=model, stream=b"s", limits=limits)
    for cut in range(len(payload)):
        with pytest.raises(VersionsError):
            decode_chain(payload[:cut], held=held, stream=b"s", limits=limits)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(payload)
        damaged[rng.integers(len(payload))] ^= int(rng.integers(1, 256))
        try:
            found = decode_chain(bytes(damaged), held=held, stream=b"s", limits=limits)
        except (VersionsError, CodecError):
            continue
        assert found.digest == model.digest  # the counter is no part of it


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"down": "zip", "up": "dense"}, "choose one of"),
        ({"down": "stc", "up": "lattice"}, "it needs"),
        ({"down": "stc", "up": "dense", "sparsity": 0.5}, "pruning needs"),
        ({"down": "stc", "up": "dense", "down_options": {"speed": 1}}, "no option 'speed'"),
        ({"down": "dense", "up": "dense", "down_options": {"density": 1}}, "belong to a scheme"),
    ],
)
def test_mistakes_name_the_knob(knobs, says):
    with pytest.raises(PolicyError, match=says):
        Policy(**knobs)
