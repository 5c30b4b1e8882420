import dataclasses
import gc
import struct
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunecast.common.files import StorageError
from prunecast.compression.codec import CodecError, Limits, Payload
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
    UpdateReader,
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


def masters_of(model, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(rng.normal(size=spec.shape), spec.dtype)
        for name, spec in model.specs.items()
    }


@pytest.mark.parametrize("density", [0.0, 0.02, 0.9])
@pytest.mark.parametrize("largest", [1, 100, 1000, 100_000])
@pytest.mark.parametrize("pruned", [0.0, 0.8])
def test_what_stays_of_an_update_is_narrow_and_gives_the_same_arrays(density, largest, pruned):
    base = model_of(1, pruned=pruned)
    rng = np.random.default_rng(3)
    z = (rng.integers(-largest, largest + 1, (40, 30)) * (rng.random((40, 30)) < density)).astype(
        np.int32
    )
    if pruned:
        z *= base.masks()["layer.weight"]
    half = np.array([0, 2, 0, -1, 0], np.int32)
    changes = {"layer.weight": QuantisedTensor(z, 1e-3), "half": QuantisedTensor(half, 0.5)}
    update = decode_update(encode_update(base, changes, stream=STREAM), base, stream=STREAM)
    masters = masters_of(base)
    masters["layer.weight"][::3] = -0.0
    update.verify(masters)
    for name, change in changes.items():
        master = masters[name]
        step = np.float32(change.step)
        moved = change.z.astype(np.float32) * step + np.float32(0)
        expected = master if not change.z.any() else master + moved.astype(master.dtype)
        for _ in range(2):
            array = update.apply(name, master)
            assert array.dtype == master.dtype
            assert array.tobytes() == expected.tobytes()
            array += 1  # the caller's own
    change = update.change("layer.weight")
    if not z.any():
        assert change is None
        return
    narrow = np.min_scalar_type(-int(np.abs(z).max()))
    assert change.values.dtype == narrow
    kept = z.size if not pruned else int(base.masks()["layer.weight"].sum())
    assert change.values.size == (kept if density > 0.5 else np.count_nonzero(z))
    assert change.reach == pytest.approx(np.abs(z).max() * 1e-3)


def test_an_update_is_decoded_once_and_its_bytes_are_released(monkeypatch):
    base = model_of(1)
    z = np.random.default_rng(0).integers(-3, 4, (40, 30)).astype(np.int32)
    changes = {
        "layer.weight": QuantisedTensor(z, 0.25),
        "norm.running_mean": np.ones(40, np.float32),
    }
    payload = encode_update(base, changes)
    reads = []
    for method in ("nonzeros", "__getitem__"):
        inner = getattr(Payload, method)
        monkeypatch.setattr(
            Payload, method, lambda self, name, inner=inner: reads.append(name) or inner(self, name)
        )
    update = UpdateReader(base).read(payload)
    opened = weakref.ref(update._body)
    masters = masters_of(base)
    update.verify(masters)
    for name in [*masters, *masters]:
        update.apply(name, masters[name])
    assert sorted(reads) == ["layer.weight", "norm.running_mean"]
    gc.collect()
    assert opened() is None


def test_updates_of_one_version_share_what_the_version_decides():
    base = model_of(1, pruned=0.8)
    reader = UpdateReader(base, stream=STREAM)
    mask = base.masks()["layer.weight"]
    updates = []
    for seed in range(3):
        z = (np.random.default_rng(seed).integers(-2, 3, mask.shape) * mask).astype(np.int32)
        changes = {"layer.weight": QuantisedTensor(z, 0.25)}
        if seed:
            changes["half"] = QuantisedTensor(np.ones(5, np.int32), 0.5)
        payload = encode_update(base, changes, stream=STREAM)
        updates.append(reader.read(payload))
        array = updates[-1].apply("layer.weight", np.zeros(mask.shape, np.float32))
        assert np.array_equal(array, z * np.float32(0.25))
    kept = [update.change("layer.weight").kept for update in updates]
    assert kept[0] is kept[1] is kept[2]
    with pytest.raises(BaseMissing):
        reader.read(encode_update(model_of(2), {}, stream=STREAM))
    with pytest.raises(WrongStream):
        reader.read(encode_update(base, {}, stream=b"other"))


def test_a_reader_keeps_few_contexts_whatever_nodes_send():
    tensors = {f"w{i}": LatticeTensor(np.arange(1, 9), 0.1) for i in range(5)}
    base = PublishedModel(tensors, 1)
    reader = UpdateReader(base)
    for code in range(32):
        changed = [name for i, name in enumerate(tensors) if code >> i & 1]
        z = np.full(8, code + 1, np.int32)
        payload = encode_update(base, {name: QuantisedTensor(z, 1.0) for name in changed})
        update = reader.read(payload)
        for name in tensors:
            expected = z if name in changed else np.zeros(8)
            assert np.array_equal(update.apply(name, np.zeros(8, np.float32)), expected)
    assert len(reader._contexts) <= 16


@pytest.mark.parametrize("few", [True, False])
def test_an_exact_array_that_hardly_changes_is_kept_as_what_differs(few):
    base = PublishedModel({"table": RawTensor(np.zeros((100, 8), np.float32))}, 1)
    new = base["table"].dense().copy()
    new[3] = [np.nan, -0.0, 1, 2, 3, 4, np.inf, 0]
    if not few:
        new += np.arange(800, dtype=np.float32).reshape(100, 8)
    update = decode_update(encode_update(base, {"table": new}), base)
    for _ in range(2):
        array = update.apply("table", base["table"].dense())
        assert array.tobytes() == new.tobytes()
        array[:] = 7  # the caller's own
    assert (update._exact["table"][0].size == 7) is few
    with pytest.raises(BadPayload, match="'table' makes NaN or infinity"):
        update.verify({"table": base["table"].dense()})


@pytest.mark.parametrize(
    ("dtype", "weight", "z", "step", "finite"),
    [
        ("float32", 1.0, 3, 0.5, True),
        ("float32", 3e38, 2**30, 1e30, False),
        ("float32", -3e38, 2**30, 3e29, True),  # only the array itself shows it
        ("float32", 3e38, -(2**30), 3e29, True),
        ("float16", 1.0, 3, 0.5, True),
        ("float16", 1.0, 2**20, 1.0, False),
        ("float16", -60000.0, 60000, 1.0, True),
        ("float64", 1.0, 2**30, 3e38, False),  # changes are float32
        ("float64", 1e300, 3, 0.5, True),
    ],
)
def test_what_leaves_the_range_is_refused(dtype, weight, z, step, finite):
    tensor = LatticeTensor(np.ones(6, np.int32), 1.0, False, np.dtype(dtype))
    base = PublishedModel({"w": tensor}, 1)
    changes = {"w": QuantisedTensor(np.array([0, z, 0, 0, 0, 0], np.int32), step)}
    update = decode_update(encode_update(base, changes), base)
    masters = {"w": np.array([0, weight, 0, 0, 0, 0], dtype)}
    if finite:
        update.verify(masters)
    else:
        with pytest.raises(BadPayload, match="'w' makes NaN or infinity"):
            update.verify(masters)


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
