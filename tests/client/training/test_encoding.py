"""Tensors of a reply, each coded as what it is: a change, values of its own, or exactly."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunecast.client.training.encoding import _in_few_bits, align, compress_reply
from prunecast.client.training.store import NonFiniteUpdate
from prunecast.compression.codec import QuantiseError, TensorSpec
from prunecast.compression.versions import (
    LatticeTensor,
    PublishedModel,
    QuantisedTensor,
    RawTensor,
    ReplyTensor,
    UpdateRule,
    decode_update,
    encode_update,
    frame,
    rounded_floats,
)

RULE = UpdateRule(1.0, 0.5)
ERROR = 0.5  # of its root mean square, at most: a step of 1 leaves half a step


def model_of(*, pruned=False, scale=1.0):
    rng = np.random.default_rng(1)
    q = np.rint(rng.normal(size=(60, 40)) * 40 * scale).astype(np.int32)
    if pruned:
        q[np.abs(q) < 20] = 0
    return PublishedModel(
        {
            "w": LatticeTensor(q, 0.025, pruned),
            "b": LatticeTensor(np.zeros(60, np.int32), 0.01),
            "norm.running_mean": RawTensor(np.arange(8, dtype=np.float32)),
            "count": RawTensor(np.array(3.0)),
        },
        1,
    )


def noise(shape, scale, seed=0, dtype=np.float32):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def sent(base, arrays, rule=RULE, residual=None, **options):
    """What the server reads of a record, its master weights being the published ones."""
    coded = compress_reply(base, arrays, residual or {}, rule, **options)
    update = decode_update(encode_update(base, coded.changes, tensors=coded.tensors), base)
    masters = base.arrays()
    update.verify(masters)
    return {n: update.apply(n, update.start(n, masters)) for n in coded.tensors}, coded


def error(got, meant):
    return np.linalg.norm(got - meant) / np.linalg.norm(meant)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.3, 1e3])
def test_gradients_arrive_within_the_error_of_themselves(scale, pruned):
    base = model_of(pruned=pruned)
    gradient = {name: noise(base[name].shape, scale) for name in ("w", "b")}
    got, coded = sent(base, gradient)
    for name in gradient:
        assert error(got[name], gradient[name]) < ERROR
    assert coded.changes["w"].values


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.1])
def test_weights_are_changes_within_the_error_of_the_change(scale):
    base = model_of()
    trained = {n: base[n].dense() + noise(base[n].shape, scale) for n in ("w", "b")}
    got, coded = sent(base, trained)
    assert not coded.changes["w"].values
    for name, array in trained.items():
        assert error(got[name] - base[name].dense(), array - base[name].dense()) < ERROR


def test_in_one_record_every_tensor_is_what_it_is_itself():
    """Weights beside the difference of a control variate."""
    rng = np.random.default_rng(3)
    q = rng.integers(-99, 99, (50, 50))
    base = PublishedModel({"x": LatticeTensor(q, 0.01), "c": LatticeTensor(q, 0.01)}, 1)
    reply = {"x": base["x"].dense() + noise((50, 50), 1e-3), "c": noise((50, 50), 1e-3, 4)}
    got, coded = sent(base, reply)
    assert [coded.changes[n].values for n in "xc"] == [False, True]
    assert error(got["x"] - base["x"].dense(), reply["x"] - base["x"].dense()) < ERROR
    assert error(got["c"], reply["c"]) < ERROR


def test_what_is_pruned_does_not_change_by_a_change_and_arrives_as_a_value():
    base = model_of(pruned=True)
    mask = base["w"].mask()
    trained = {"w": base["w"].dense() + noise((60, 40), 0.01)}
    got, _ = sent(base, trained)
    assert not got["w"][~mask].any()
    gradient = {"w": noise((60, 40), 0.01)}
    got, _ = sent(base, gradient)
    assert error(got["w"][~mask], gradient["w"][~mask]) < ERROR


def test_a_tie_goes_with_the_record():
    """A bias that is published as zero says nothing; its record does."""
    base = model_of()
    bias = noise((60,), 0.1)
    _, coded = sent(base, {"w": base["w"].dense() + noise((60, 40), 0.01), "b": bias})
    assert not coded.changes["b"].values
    _, coded = sent(base, {"w": noise((60, 40), 0.01), "b": bias})
    assert coded.changes["b"].values


@pytest.mark.parametrize("same", [False, True])
def test_zeros_and_unchanged_weights_cost_nothing(same):
    base = model_of()
    reply = base.arrays() if same else {n: np.zeros(base[n].shape, np.float32) for n in ("w", "b")}
    got, coded = sent(base, reply)
    payload = encode_update(base, coded.changes, tensors=coded.tensors)
    assert len(payload) < 180
    for name, array in reply.items():
        assert np.array_equal(got[name], array)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_dtype_of_the_reply_is_kept(dtype):
    base = model_of()
    trained = {"w": (base["w"].dense() + noise((60, 40), 0.05)).astype(dtype)}
    got, _ = sent(base, trained)
    assert got["w"].dtype == dtype
    change = trained["w"].astype("f8") - base["w"].dense()
    assert error(got["w"] - base["w"].dense().astype("f8"), change) < ERROR + 0.02


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "float32", "float64", "bool"])
def test_what_travels_exactly_comes_in_its_own_dtype(dtype):
    base = model_of()
    record = {"count": np.array(4).astype(dtype), "norm.running_mean": np.arange(8).astype(dtype)}
    got, _ = sent(base, record)
    for name, array in record.items():
        assert (got[name].dtype, got[name].tobytes()) == (array.dtype, array.tobytes())


def test_non_finite_values_are_legal_where_they_travel_exactly():
    mask = np.triu(np.full((16, 16), -np.inf, np.float32), 1)
    statistics = np.array([np.inf, np.nan, -0.0], np.float32)
    base = PublishedModel(
        {"mask": RawTensor(mask), "low": RawTensor(statistics), **model_of().tensors}, 1
    )
    reply = {"mask": mask, "low": statistics[::-1].copy(), "w": base["w"].dense()}
    got, coded = sent(base, reply)
    assert "mask" not in coded.changes
    for name in ("mask", "low"):
        assert got[name].tobytes() == reply[name].tobytes()


@pytest.mark.parametrize("step", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_trained_tensor_that_becomes_non_finite_is_refused_by_name(value, step):
    base = model_of()
    trained = base["w"].dense().copy()
    trained[3, 4] = value
    with pytest.raises(NonFiniteUpdate, match=r"'w'.*learning rate"):
        compress_reply(base, {"w": trained}, {}, UpdateRule(step))


def test_what_int32_cannot_hold_goes_exactly_and_its_residual_waits():
    base = model_of()
    trained = {n: base[n].dense() + noise(base[n].shape, 1e-12) for n in ("w", "b")}
    trained["w"] = base["w"].dense() + np.float32(1e-6)
    residual = {"b": np.full(60, 1e9, np.float32)}
    got, coded = sent(base, trained, residual=residual)
    assert got["b"].tobytes() == trained["b"].tobytes()
    assert np.array_equal(coded.dropped["b"], residual["b"])
    assert isinstance(coded.changes["w"], QuantisedTensor)
    # beyond float32 there is no step: it diverged
    with pytest.raises(QuantiseError, match="'b'"):
        compress_reply(base, {"b": np.full(60, 3e38, np.float32)}, {}, UpdateRule(3.0))


# -- tensors that the version does not have -------------------------------------------------------


def test_small_extras_are_exact_and_large_ones_fine():
    base = model_of()
    record = {
        "loss": np.float32(0.3) * np.ones((), np.float32),
        "per_class": noise((100,), 3.0),
        "logits": noise((300, 10), 3.0),
        "wrong_shape": noise((4096,), 1.0, dtype=np.float64),
        "histogram": np.arange(5000),
        "nothing": np.zeros((2000,), np.float32),
        "masked": np.where(np.arange(2000) % 7, 1.0, -np.inf),
    }
    got, coded = sent(base, record, UpdateRule(3.0, 0.6))
    for name in ("logits", "wrong_shape"):
        assert 0 < error(got[name], record[name]) < 0.03
        assert got[name].dtype == record[name].dtype
    for name in record.keys() - {"logits", "wrong_shape"}:
        assert got[name].tobytes() == record[name].tobytes(), name
    assert not coded.dropped
    exact, _ = sent(base, record, UpdateRule(0.0))
    assert all(exact[name].tobytes() == array.tobytes() for name, array in record.items())


def test_names_in_another_order_missing_or_without_names_find_their_tensors():
    base = model_of()
    trained = {n: a.astype(a.dtype) for n, a in base.arrays().items()}
    for name, array in trained.items():
        spec = TensorSpec(array.dtype, array.shape)
        trained[name] = array
        assert align({name: array}, base.specs) == {name: ReplyTensor(spec, name)}
    backwards = dict(reversed(trained.items()))
    assert [t.like for t in align(backwards, base.specs).values()] == list(backwards)
    unnamed = {str(place): array for place, array in enumerate(trained.values())}
    assert [t.like for t in align(unnamed, base.specs).values()] == list(trained)
    # another number, or another shape: nothing says which is which
    assert {t.like for t in align(dict(list(unnamed.items())[:3]), base.specs).values()} == {None}
    assert align({"w": np.zeros(3)}, base.specs)["w"].like is None
    assert align({"w": None}, base.specs)["w"] == ReplyTensor(None)


# -- error feedback -------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_feedback_makes_up_for_what_was_dropped(own):
    base = model_of()
    rule = UpdateRule(3.0, 0.6)
    residual, total = {}, 0.0
    reply = noise((60, 40), 0.01) + (0 if own else base["w"].dense())
    for _ in range(40):
        got, coded = sent(base, {"w": reply}, rule, residual)
        residual = coded.dropped
        total = total + got["w"]
    assert error(total / 40 - (0 if own else base["w"].dense()), noise((60, 40), 0.01)) < 0.1


def test_a_reply_that_becomes_another_thing_is_not_drowned_by_the_residual():
    """Weights whose updates were large, then a gradient that is small, and back."""
    base = model_of()
    rule = UpdateRule(3.0, 0.6)
    weights = {"w": base["w"].dense() + noise((60, 40), 0.2)}
    _, coded = sent(base, weights, rule)
    assert np.abs(coded.dropped["w"]).max() > 0.25
    gradient = {"w": noise((60, 40), 1e-4)}
    got, coded = sent(base, gradient, rule, coded.dropped)
    assert error(got["w"], gradient["w"]) < 2  # of quantisation, twice at the worst
    assert coded.dropped.keys() == {"w\0values"}
    _, coded = sent(base, weights, rule, coded.dropped)
    assert coded.dropped.keys() == {"w"}


@pytest.mark.parametrize("own", [False, True])
def test_what_was_dropped_beside_zeros_is_made_up_for_whichever_way_it_goes_on(own):
    """A control variate or a head that begins as zero: its first change is its value as well."""
    zero = PublishedModel({"w": LatticeTensor(np.zeros((60, 40), np.int32), 0.025, False)}, 1)
    base, rule = model_of(), UpdateRule(3.0, 0.6)
    first, rest = noise((60, 40), 0.3), noise((60, 40), 0.01, seed=1)
    got, coded = sent(zero, {"w": first}, rule)
    assert coded.dropped.keys() == {"w\0either"}
    total, meant = got["w"], first + 0.0
    for _ in range(3):
        start = 0 if own else base["w"].dense()
        got, coded = sent(base, {"w": rest + start}, rule, coded.dropped)
        assert coded.dropped.keys() == {"w\0values" if own else "w"}
        total, meant = total + got["w"] - start, meant + rest
    assert error(total, meant) < 0.1  # 0.9 without what the first dropped


def test_a_tensor_stays_what_its_residual_is_of_until_it_tells_clearly():
    """Else what was dropped is lost when change and value are alike for once."""
    base, rule = model_of(), UpdateRule(3.0, 0.6)
    weights = base["w"].dense()
    _, coded = sent(base, {"w": 0.1 * noise((60, 40), 1)}, rule)
    assert coded.dropped.keys() == {"w\0values"}
    alike = {"w": (0.45 * weights).astype(np.float32)}  # its record alone would decide, too
    unlike = {"w": (0.6 * weights).astype(np.float32)}
    _, coded = sent(base, unlike, rule, coded.dropped)
    assert coded.dropped.keys() == {"w\0values"}
    _, coded = sent(base, {"w": 0.9 * weights}, rule, coded.dropped)
    assert coded.dropped.keys() == {"w"}
    _, coded = sent(base, alike, rule, coded.dropped)
    assert coded.dropped.keys() == {"w"}


def test_the_residual_of_what_is_not_in_a_reply_stays():
    base = model_of()
    residual = {"w": noise((60, 40), 0.01), "b": noise((60,), 0.01)}
    _, coded = sent(base, {"w": base["w"].dense() + noise((60, 40), 0.01)}, residual=residual)
    assert np.array_equal(coded.dropped["b"], residual["b"])
    assert not np.array_equal(coded.dropped["w"], residual["w"])


def test_a_residual_of_another_shape_is_passed_over():
    base = model_of()
    trained = {"w": base["w"].dense() + noise((60, 40), 0.01)}
    afresh, _ = sent(base, trained)
    other, _ = sent(base, trained, residual={"w": np.ones(3, np.float32)})
    assert np.array_equal(afresh["w"], other["w"])


# -- norms ----------------------------------------------------------------------------------------


def norm(*arrays):
    return float(np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in arrays)))


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("step", [0.3, 1.3, 1.6, 3.0, 30.0])
def test_without_feedback_no_norm_grows(step, pruned):
    base = model_of(pruned=pruned)
    rule = UpdateRule(step, 0.5, error_feedback=False)
    change = {"w": np.sign(noise((60, 40), 1.0)) * np.float32(0.01), "b": noise((60,), 0.5)}
    trained = {n: base[n].dense() + c for n, c in change.items()}
    got, coded = sent(base, trained, rule)
    assert not coded.dropped
    for name in change:
        moved = got[name].astype(np.float64) - base[name].dense()
        assert norm(moved) <= norm(trained[name].astype(np.float64) - base[name].dense()) * 1.00001
    gradients = {n: np.asarray(c * 1e-2) for n, c in change.items()}
    got, _ = sent(base, gradients, rule)
    for name, array in gradients.items():
        assert norm(got[name]) <= norm(array) * 1.000001
    extra = {"x": np.sign(noise((5000,), 1.0))}
    got, _ = sent(base, extra, rule)
    assert norm(got["x"]) <= norm(extra["x"]) * 1.000001


@pytest.mark.parametrize("scale", [1e-4, 0.7])
def test_under_a_clip_changes_of_the_whole_record_stay_in_it(scale):
    base = model_of()
    clip = 0.5
    change = {n: noise(base[n].shape, scale, 7) for n in ("w", "b", "norm.running_mean")}
    change = {n: c * np.float32(min(1, clip / norm(*change.values()))) for n, c in change.items()}
    trained = {n: base[n].dense() + c for n, c in change.items()}
    residual = {"w": np.full((60, 40), 0.1, np.float32)}
    got, coded = sent(base, trained, UpdateRule(1.5), residual, clip=clip)
    assert not coded.dropped
    moved = [got[n].astype(np.float64) - base[n].dense() for n in change]
    given = [trained[n].astype(np.float64) - base[n].dense() for n in change]
    assert norm(*moved) <= min(clip, norm(*given)) * 1.000001
    assert norm(*moved) > 0.5 * norm(*given)


def test_a_number_by_that_name_that_clips_nothing_changes_nothing():
    base = model_of()
    trained = {"w": base["w"].dense() + noise((60, 40), 0.1)}
    rule = UpdateRule(1.0, 0.5, error_feedback=False)
    free, _ = sent(base, trained, rule)
    got, _ = sent(base, trained, rule, clip=0.01)
    assert np.array_equal(free["w"], got["w"])


# -- running statistics ----------------------------------------------------------------------------

ROUNDING = UpdateRule(3.0, 0.6, statistics_bits=6)


def held_statistics():
    names = ("1.running_mean", "1.running_var", "bn.moving_variance")
    return PublishedModel(
        {
            "w": LatticeTensor(np.arange(-50, 50), 0.02),
            **{name: RawTensor(np.ones(40, np.float32)) for name in names},
            "0.running_var": RawTensor(np.ones(1, np.float32)),
            "scale": RawTensor(np.ones(40, np.float32)),
        },
        1,
    )


def trained_statistics(base):
    return {
        name: (tensor.dense() + noise(tensor.shape, 0.3, at)).astype("f4")
        for at, (name, tensor) in enumerate(base.tensors.items())
    }


def test_statistics_are_rounded_to_nearest_in_the_bits_of_the_rule():
    base = held_statistics()
    trained = trained_statistics(base)
    got, _ = sent(base, trained, ROUNDING)
    for name in ("1.running_mean", "1.running_var", "bn.moving_variance"):
        assert (got[name].view("u4") & ((1 << 17) - 1) == 0).all(), name
        np.testing.assert_allclose(got[name], trained[name], rtol=2**-7)
        assert (got[name] != trained[name]).any()
    trained["9.running_var"] = noise((40,), 1.0)
    got, _ = sent(base, trained, ROUNDING)
    for name in ("0.running_var", "scale", "9.running_var"):  # one value, no statistic, not sent
        assert got[name].tobytes() == trained[name].tobytes()
    trained.pop("9.running_var")  # a list without names goes by positions
    unnamed, _ = sent(base, {str(i): a for i, a in enumerate(trained.values())}, ROUNDING)
    assert unnamed["1"].tobytes() == got["1.running_mean"].tobytes()
    odd = np.array([np.inf, -np.inf, np.nan, -0.0] * 10, np.float32)  # a batch of one
    coded = compress_reply(base, {"1.running_var": odd}, {}, ROUNDING)
    assert coded.changes["1.running_var"].tobytes() == odd.tobytes()


@pytest.mark.parametrize(
    ("rule", "clip"),
    [
        (UpdateRule(3.0, 0.6), None),
        (UpdateRule(0.0, statistics_bits=6), None),
        (UpdateRule(3.0, 0.6, error_feedback=False, statistics_bits=6), None),
        (ROUNDING, 100.0),
    ],
    ids=["no bits", "no step", "no feedback", "clip"],
)
def test_statistics_are_exact_where_nothing_may_be_added(rule, clip):
    base = held_statistics()
    trained = trained_statistics(base)
    got, _ = sent(base, trained, rule, clip=clip)
    for name in trained.keys() - {"w"}:
        assert got[name].tobytes() == trained[name].tobytes(), name


def test_rounded_statistics_cost_a_fifth():
    rng = np.random.default_rng(5)
    master = np.exp(rng.normal(size=928)).astype("f4")
    sizes = []
    for bits in (0, 6):
        held = rounded_floats(master, bits) if bits else master
        base = PublishedModel({"running_var": RawTensor(held)}, 1)
        trained = {"running_var": (held * (1 + 0.05 * rng.normal(size=928))).astype("f4")}
        coded = compress_reply(base, trained, {}, UpdateRule(3.0, 0.6, statistics_bits=bits))
        sizes.append(len(encode_update(base, coded.changes, tensors=coded.tensors)))
    assert sizes[1] < 650 < 2200 < sizes[0]


@given(st.floats(0, width=32, allow_infinity=True))
def test_a_step_is_rounded_up_to_few_bits_and_stays_a_float32(step):
    rounded = _in_few_bits(step)
    assert rounded == np.float32(rounded)
    assert step <= rounded <= max(step * 17 / 16, step + 2.0**-149)
    if 0 < rounded < float(np.finfo(np.float32).max) / 2:
        assert math.frexp(rounded)[0] * 32 == int(math.frexp(rounded)[0] * 32)


def test_steps_of_many_tensors_take_half_of_their_bytes_in_the_layout():
    rng = np.random.default_rng(0)
    names = [f"layers.{i}" for i in range(60)]
    base = PublishedModel({n: LatticeTensor(rng.integers(-9, 9, 50), 0.1) for n in names}, 1)
    trained = {
        n: t.dense() + rng.normal(size=50).astype(np.float32) for n, t in base.tensors.items()
    }
    sizes = {}
    for feedback in (True, False):
        coded = compress_reply(base, trained, {}, UpdateRule(3.0, 0.7, feedback))
        payload = encode_update(base, coded.changes)
        layout = len(payload) - len(frame.unpack(payload, stream=None).body)
        sizes[feedback] = layout - 58  # without the frame's fixed fields
    assert sizes[True] < 0.6 * sizes[False]
