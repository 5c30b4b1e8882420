import dataclasses
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunecast.common.files import StorageError
from prunecast.compression.codec import CodecError, Limits
from prunecast.compression.versions import (
    BadPayload,
    BaseMissing,
    DigestMismatch,
    InvalidModel,
    Kind,
    LatticeTensor,
    PublishedModel,
    QuantisedTensor,
    RawTensor,
    VersionsError,
    WrongStream,
    decode_model,
    decode_update,
    encode_delta,
    encode_keyframe,
    encode_plain,
    encode_update,
    inspect,
    load_model,
    open_plain,
    refine,
    save_model,
)

STREAM = b"run 7/arrays"


def model_of(seed, *, pruned=0.0, step=0.01, counter=1):
    rng = np.random.default_rng(seed)
    weight = np.rint(rng.normal(size=(40, 30)) * 20).astype(np.int32)
    if pruned:
        weight[np.abs(weight) < np.quantile(np.abs(weight), pruned)] = 0
    return PublishedModel(
        {
            "layer.weight": LatticeTensor(weight, step, pruned > 0),
            "layer.bias": LatticeTensor(rng.integers(-500, 500, 40, dtype=np.int32), step / 4),
            "half": LatticeTensor(rng.integers(-9, 9, 5), 0.5, False, np.dtype(np.float16)),
            "norm.running_mean": RawTensor(rng.normal(size=40).astype(np.float32)),
            "norm.num_batches_tracked": RawTensor(np.array(seed, np.int64)),
            "empty": RawTensor(np.zeros((0, 3), np.float32)),
            "flags": RawTensor(rng.integers(0, 2, 9).astype(bool)),
        },
        counter,
    )


def assert_same(a, b):
    assert a.digest == b.digest
    assert list(a) == list(b)
    for name, left in a.arrays().items():
        right = b.arrays()[name]
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert left.tobytes() == right.tobytes()


def test_keyframe_round_trip():
    model = model_of(1, pruned=0.8, counter=9)
    payload = encode_keyframe(model, stream=STREAM)
    assert inspect(payload).kind is Kind.KEYFRAME
    back = decode_model(payload, stream=STREAM)
    assert_same(model, back)
    assert back.counter == 9
    assert back.masks().keys() == {"layer.weight"}


def test_payloads_do_not_depend_on_who_encodes_them():
    assert encode_keyframe(model_of(1)) == encode_keyframe(model_of(1))


@pytest.mark.parametrize("old_step", [0.01, 0.02, 0.005, 0.013])
def test_delta_is_exact_across_masks_and_steps(old_step):
    held = model_of(1, pruned=0.5, step=old_step)
    new = model_of(2, pruned=0.9, step=0.01, counter=17)
    payload = encode_delta(held, new, stream=STREAM)
    assert_same(new, decode_model(payload, held=held, stream=STREAM))


def test_a_delta_between_close_versions_is_small():
    held = model_of(1, pruned=0.9)
    weight = held["layer.weight"].q.astype(np.int32)
    moved = weight.copy()
    moved.ravel()[np.flatnonzero(weight)[::50]] += 1
    new = dataclasses.replace(
        held, tensors={**held.tensors, "layer.weight": LatticeTensor(moved, 0.01, True)}
    )
    assert len(encode_delta(held, new)) < len(encode_keyframe(new)) / 4


def test_delta_of_another_base_is_base_missing():
    payload = encode_delta(model_of(1), model_of(2), stream=STREAM)
    for held in (None, model_of(3)):
        with pytest.raises(BaseMissing, match="keyframe"):
            decode_model(payload, held=held, stream=STREAM)


def test_delta_between_different_structures_is_refused():
    held = model_of(1)
    fewer = PublishedModel({"layer.bias": held["layer.bias"]})
    with pytest.raises(InvalidModel, match="keyframe"):
        encode_delta(held, fewer)


def test_a_delta_carries_tensors_that_changed_their_kind():
    held = model_of(1)
    new = PublishedModel(
        {
            **held.tensors,
            "norm.num_batches_tracked": RawTensor(np.array(2.5)),
            "half": RawTensor(np.arange(5, dtype=np.float16)),
            "empty": LatticeTensor(np.ones((3, 2), np.int32), 0.5),
        },
        2,
    )
    payload = encode_delta(held, new, stream=STREAM)
    assert_same(new, decode_model(payload, held=held, stream=STREAM))
    assert_same(held, decode_model(encode_delta(new, held), held=new))


def test_a_delta_in_which_nothing_can_be_predicted():
    held = PublishedModel({"w": RawTensor(np.arange(4, dtype=np.int64))})
    new = PublishedModel({"w": RawTensor(np.arange(4.0))}, 2)
    assert_same(new, decode_model(encode_delta(held, new), held=held))


def test_payload_of_another_stream_is_refused():
    payload = encode_keyframe(model_of(1), stream=STREAM)
    with pytest.raises(WrongStream):
        decode_model(payload, stream=b"run 8/arrays")


def test_every_truncation_and_every_flipped_byte_is_refused():
    held, new = model_of(1, pruned=0.9), model_of(2, pruned=0.9)
    for payload in (encode_keyframe(new), encode_delta(held, new)):
        for size in range(0, len(payload), 7):
            with pytest.raises(VersionsError):
                decode_model(payload[:size], held=held)
        for position in range(0, len(payload), 11):
            damaged = bytearray(payload)
            damaged[position] ^= 0x40
            with pytest.raises(VersionsError):
                decode_model(bytes(damaged), held=held)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_hostile_bytes_raise_only_our_errors(data, with_magic):
    head = b"PCM\x01" if with_magic else b""
    with pytest.raises(VersionsError):
        decode_model(head + data, held=model_of(1))


def test_a_keyframe_that_declares_an_enormous_tensor_is_refused_before_allocation():
    model = PublishedModel({"w": RawTensor(np.zeros(3, np.float32))})
    from prunecast.compression.versions import frame, layout

    heads = layout.pack_heads(model.tensors).replace(struct.pack("<Q", 3), struct.pack("<Q", 2**60))
    payload = frame.pack(Kind.KEYFRAME, b"", 0, model.digest, layout=heads, body=b"x" * 40)
    with pytest.raises(BadPayload, match="limits"):
        decode_model(payload)


def test_a_model_that_is_not_the_announced_one_is_refused():
    from prunecast.compression.versions import frame

    model, other = model_of(1), model_of(2)
    parsed = frame.unpack(encode_keyframe(model), stream=b"")
    forged = frame.pack(Kind.KEYFRAME, b"", 1, other.digest, layout=parsed.layout, body=parsed.body)
    with pytest.raises(DigestMismatch):
        decode_model(forged)


def test_digest_sees_names_steps_flags_and_values_but_not_the_counter():
    q = np.array([[1, 0], [0, 2]])
    base = PublishedModel({"w": LatticeTensor(q, 0.5)}, 1)
    same = PublishedModel({"w": LatticeTensor(q.astype(np.int8), 0.5)}, 2)
    assert base.digest == same.digest
    others = [
        PublishedModel({"v": LatticeTensor(q, 0.5)}),
        PublishedModel({"w": LatticeTensor(q, 0.25)}),
        PublishedModel({"w": LatticeTensor(q, 0.5, True)}),
        PublishedModel({"w": LatticeTensor(q.T.reshape(1, 4), 0.5)}),
        PublishedModel({"w": LatticeTensor(q + 1, 0.5)}),
        PublishedModel({"w": LatticeTensor(q, 0.5, False, np.dtype(np.float64))}),
    ]
    assert len({m.digest for m in [base, *others]}) == len(others) + 1


def test_the_mask_is_exactly_the_support():
    model = model_of(4, pruned=0.7)
    assert np.array_equal(model.masks()["layer.weight"], model["layer.weight"].q != 0)
    assert model.sparsity() == pytest.approx(0.7, abs=0.02)


def test_dense_values_have_no_negative_zero():
    dense = LatticeTensor(np.array([-1, 0, 1]), 0.1).dense()
    assert not np.signbit(dense[1])


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan"), float("inf"), 1e-60])
def test_impossible_steps_are_refused(step):
    with pytest.raises(InvalidModel, match="step"):
        LatticeTensor(np.array([1]), step)


@given(
    st.lists(st.integers(-(2**20), 2**20), min_size=1, max_size=30),
    st.integers(-10, 10),
    st.floats(2**-20, 2**10, width=32),
)
def test_refining_keeps_values_and_coarsening_rounds(values, power, step):
    q = np.array(values, np.int32)
    new_step = step * 2.0**power
    moved = refine(q, step, new_step)
    assert moved is not None
    error = np.abs(moved.astype(np.float64) * new_step - q.astype(np.float64) * step)
    assert np.all(error <= (0 if power <= 0 else new_step / 2))


def test_refining_gives_up_where_it_cannot_be_exact():
    assert refine(np.array([1]), 0.1, 0.15) is None
    assert refine(np.array([2**30]), 1.0, 0.125) is None


# -- updates ------------------------------------------------------------------------------------


def test_update_round_trip_masked_quantised_and_exact():
    base = model_of(1, pruned=0.8)
    rng = np.random.default_rng(0)
    mask = base.masks()["layer.weight"]
    z = (rng.integers(-2, 3, mask.shape) * mask).astype(np.int32)
    statistics = rng.normal(size=40).astype(np.float32)
    payload = encode_update(
        base,
        {
            "layer.weight": QuantisedTensor(z, 0.25),
            "norm.running_mean": statistics,
            "norm.num_batches_tracked": np.array(12, np.int64),
        },
        stream=STREAM,
    )
    update = decode_update(payload, base, stream=STREAM)
    master = rng.normal(size=mask.shape).astype(np.float32)
    expected = master + z.astype(np.float32) * np.float32(0.25)
    assert np.array_equal(update.apply("layer.weight", master), expected)
    assert update.apply("norm.running_mean", statistics * 0).tobytes() == statistics.tobytes()
    assert update.apply("norm.num_batches_tracked", np.array(1, np.int64)) == 12
    bias = np.ones(40, np.float32)
    assert np.array_equal(update.apply("layer.bias", bias), bias)


def test_update_off_the_mask_is_refused():
    base = model_of(1, pruned=0.8)
    z = np.ones((40, 30), np.int32)
    with pytest.raises((VersionsError, CodecError)):
        encode_update(base, {"layer.weight": QuantisedTensor(z, 0.25)})


def test_update_of_another_version_is_refused():
    payload = encode_update(model_of(1), {}, stream=STREAM)
    with pytest.raises(BaseMissing):
        decode_update(payload, model_of(2), stream=STREAM)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("nobody", np.zeros(3, np.float32)),
        ("layer.bias", np.zeros(41, np.float32)),
        ("layer.bias", np.zeros(40, np.float64)),
        ("norm.running_mean", QuantisedTensor(np.zeros(40, np.int32), 1.0)),
    ],
)
def test_updates_that_do_not_fit_are_refused(name, change):
    with pytest.raises(InvalidModel, match=name):
        encode_update(model_of(1), {name: change})


def test_a_damaged_update_is_refused():
    base = model_of(1)
    z = np.random.default_rng(0).integers(-3, 4, (40, 30)).astype(np.int32)
    payload = encode_update(base, {"layer.weight": QuantisedTensor(z, 0.25)})
    for position in range(0, len(payload), 5):
        damaged = bytearray(payload)
        damaged[position] ^= 0x10
        with pytest.raises(VersionsError):
            decode_update(bytes(damaged), base)


def test_plain_records_keep_every_bit():
    special = np.array([np.nan, -0.0, np.inf, 1e-45, 3.5], np.float32)
    arrays = {"f": special, "i": np.array(-(2**63), np.int64), "e": np.zeros((2, 0), np.uint8)}
    back = open_plain(encode_plain(arrays, stream=STREAM), stream=STREAM)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()


# -- files --------------------------------------------------------------------------------------


def test_saved_models_come_back(tmp_path):
    model = model_of(5, pruned=0.9, counter=3)
    save_model(model, tmp_path / "deep" / "model.pcm")
    assert_same(model, load_model(tmp_path / "deep" / "model.pcm"))


def test_damaged_or_missing_files_are_named(tmp_path):
    path = tmp_path / "model.pcm"
    with pytest.raises(StorageError, match=r"model\.pcm"):
        load_model(path)
    save_model(model_of(1), path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(StorageError, match=r"model\.pcm"):
        load_model(path)


def test_limits_reach_the_decoder(tmp_path):
    with pytest.raises(BadPayload):
        decode_model(encode_keyframe(model_of(1)), limits=Limits(elements=100))
