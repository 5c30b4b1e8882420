"""What few bytes may make a node and the server allocate, and who can say otherwise."""

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from prunecast.client.training import compression_mod
from prunecast.compression.versions import (
    LatticeTensor,
    PublishedModel,
    TooLarge,
    decode_model,
    encode_keyframe,
    load_model,
    model_limits,
    save_model,
)
from support.federation import to_arrays, to_record

CONSTANT = {"w": np.zeros((100, 100), np.float32)}
NOISE = {"w": np.random.default_rng(0).normal(size=(100, 100)).astype(np.float32)}


def app_of(tmp_path, most=None, change=lambda arrays: arrays):
    app = ClientApp(mods=[compression_mod(tmp_path / "store", max_model_bytes=most)])

    @app.train()
    def train(message, context):
        arrays = change(to_arrays(message.content["arrays"]))
        content = {"arrays": to_record(arrays), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    return app


def send(grid, *models):
    messages = [
        Message(RecordDict({"arrays": to_record(arrays)}), node, "train")
        for node, arrays in enumerate(models, start=1)
    ]
    return list(grid.send_and_receive(messages))


@pytest.mark.parametrize("policy", ["lossless", "balanced"])
def test_a_nearly_constant_model_of_any_size_is_taken(federation, tmp_path, policy):
    def change(arrays):
        arrays["w"][7, 7] = 1.0
        return arrays

    grid, _, _ = federation(policy, nodes=1, app=app_of(tmp_path, None, change))
    (reply,) = send(grid, {"w": np.zeros((1 << 18, 20), np.float32)})
    assert not reply.has_error(), reply.error.reason
    assert np.count_nonzero(reply.content["arrays"]["w"].numpy()) == 1
    assert grid.ledger.totals().bytes_down < 2000


def test_a_node_says_how_large_a_model_it_takes_and_the_error_names_the_setting(
    federation, tmp_path
):
    for most, refused in ((39_999, True), (40_000, False)):
        grid, _, _ = federation("balanced", nodes=1, app=app_of(tmp_path, most))
        (reply,) = send(grid, CONSTANT)
        assert reply.has_error() is refused
        if refused:
            assert "compression_mod(max_model_bytes=...)" in reply.error.reason
            assert "prunecast-max-model-bytes" in reply.error.reason


@pytest.mark.parametrize(("most", "words"), [(39_999, "above the limits"), (0, "give a positive")])
def test_the_node_config_has_the_setting_too(federation, tmp_path, most, words):
    grid, inner, _ = federation("balanced", nodes=1, app=app_of(tmp_path))
    inner._contexts[1].node_config["prunecast-max-model-bytes"] = most
    (reply,) = send(grid, CONSTANT)
    assert words in reply.error.reason


def test_personal_models_are_bounded_alike(federation, tmp_path):
    for most, refused in ((1000, True), (40_000, False)):
        grid, _, _ = federation("balanced", nodes=2, app=app_of(tmp_path, most))
        replies = send(grid, CONSTANT, {"w": CONSTANT["w"] + 1})
        assert [reply.has_error() for reply in replies] == [refused] * 2
        assert {e.kind for e in grid.ledger.entries if e.direction == "down"} == {"plain"}


def test_what_many_bytes_tell_or_the_node_holds_is_no_question(federation, tmp_path):
    grid, _, _ = federation("balanced", nodes=1, app=app_of(tmp_path, 1000))
    (reply,) = send(grid, NOISE)
    assert not reply.has_error(), reply.error.reason
    next_one = {"w": NOISE["w"].copy()}
    for place in range(2):  # the first change is so small that the lattice is refined
        next_one["w"][0, place] += 1
        (reply,) = send(grid, next_one)
        assert not reply.has_error(), reply.error.reason
    last = [e for e in grid.ledger.entries if e.direction == "down"][-1]
    assert last.kind == "delta"
    assert last.payload_bytes < 2000


@pytest.mark.parametrize(("most", "drawn"), [(39_999, False), (40_000, True)])
def test_a_drawn_model_that_nodes_do_not_take_from_a_seed_travels_whole(
    federation, tmp_path, most, drawn
):
    grid, _, _ = federation("balanced", nodes=1, app=app_of(tmp_path, most))
    start = grid.draw_initial(to_record(NOISE), 1, max_model_bytes=most)
    (reply,) = send(grid, to_arrays(start))
    assert not reply.has_error(), reply.error.reason
    assert (grid.ledger.entries[0].payload_bytes < 1500) is drawn


def test_a_model_file_of_zeros_is_read_again(tmp_path):
    zeros = LatticeTensor(np.zeros((1 << 12, 1 << 13), np.int8), 0.5)
    model = PublishedModel({"w": zeros}, 1)
    save_model(model, tmp_path / "zeros.model")
    assert (tmp_path / "zeros.model").stat().st_size < 1000
    assert load_model(tmp_path / "zeros.model").digest == model.digest


def test_limits_follow_what_is_known():
    model = PublishedModel({"w": LatticeTensor(np.zeros((500, 200), np.int8), 0.5)}, 1)
    payload = encode_keyframe(model)
    assert decode_model(payload, limits=model_limits(400_000)).digest == model.digest
    with pytest.raises(TooLarge, match=r"400000 bytes, above the limits \(399999 bytes\)"):
        decode_model(payload, limits=model_limits(399_999))
