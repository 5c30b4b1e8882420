"""signSGD, integers per channel and half precision against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from prunecast.compression.schemes import BadConfig, LayoutMismatch, OutOfRange, WrongScheme
from prunecast.compression.schemes.dense import Fp16, Int4, Int8, SignSgd, majority_vote
from prunecast.compression.schemes.interface import Scheme
from prunecast.compression.schemes.layout import layout_of
from prunecast.compression.schemes.registry import inspect, scheme

Vector = NDArray[np.float32]


def once(one: Scheme, tensors: dict[str, Vector], key: int = 0) -> tuple[bytes, dict[str, Vector]]:
    payload, _ = one.encode(tensors, one.init(layout_of(tensors)), key=key)
    return payload, one.decode(payload)


# --- signSGD ---------------------------------------------------------------------------------


def test_one_bit_an_entry() -> None:
    w = np.random.default_rng(0).normal(size=1001).astype("f4")
    payload, decoded = once(SignSgd(), {"w": w})
    assert np.array_equal(decoded["w"], np.sign(w))
    assert inspect(payload).body_bytes == 4 + (1001 + 7) // 8
    assert payload[-4 - 126 : -4] == np.packbits(w > 0).tobytes()


def test_mean_magnitude_is_that_of_karimireddy() -> None:
    w = np.float32([1, -2, 6])
    assert once(SignSgd(step=0), {"w": w})[1]["w"].tolist() == [3, -3, 3]


def test_zero_is_a_coin_or_positive() -> None:
    zeros = {"w": np.zeros(4000, "f4")}
    assert (once(SignSgd(ties="positive"), zeros)[1]["w"] == 1).all()
    first, second = (once(SignSgd(), zeros, key=key)[1]["w"] for key in (1, 2))
    for coins in (first, second):
        assert abs(coins.mean()) < 4 / np.sqrt(4000)
    assert 0.45 < (first == second).mean() < 0.55


def test_stochastic_signs_are_fedbats_binarisation() -> None:
    x = np.repeat(np.float32([-3, -1, -0.5, 0, 0.25, 1, 2]), 4000)
    sign = SignSgd(step=1, rounding="stochastic")
    got = once(sign, {"w": x})[1]["w"].reshape(7, 4000)
    assert set(np.unique(got)) == {-1, 1}
    expected = np.float32([-1, -1, -0.5, 0, 0.25, 1, 1])  # cut to [-step, step]
    assert np.abs(got.mean(axis=1) - expected).max() < 4 / np.sqrt(4000)
    assert (got[[0, 1]] == -1).all()
    assert (got[[5, 6]] == 1).all()
    # the step that training would begin with
    values = once(SignSgd(step=0, rounding="stochastic"), {"w": x})[1]["w"]
    assert np.abs(values).max() == pytest.approx(np.abs(x).mean())


@pytest.mark.parametrize("voters", [1, 3, 4])
@pytest.mark.parametrize("coding", ["paper", "prunecast"])
def test_majority(voters: int, coding: str) -> None:
    rng = np.random.default_rng(voters)
    votes = rng.normal(size=(voters, 300)).astype("f4")
    sign = SignSgd(coding=coding, step=0.5)
    payloads = [once(sign, {"a": v[:100], "b": v[100:].reshape(10, 20)})[0] for v in votes]
    answer = sign.decode(majority_vote(payloads, key=7, coding=coding))
    got = np.concatenate([answer["a"], answer["b"].ravel()])
    sums = [sum(1 if v[i] > 0 else -1 for v in votes) for i in range(300)]
    for value, total in zip(got.tolist(), sums, strict=True):
        if total:
            assert value == (0.5 if total > 0 else -0.5)
        else:
            assert abs(value) == 0.5
    ties = np.array(sums) == 0
    assert ties.any() == (voters == 4)
    if voters == 4:
        assert 0 < (got[ties] > 0).mean() < 1
        same = sign.decode(majority_vote(payloads, key=7))
        assert np.array_equal(same["a"], answer["a"])
        ruled = sign.decode(majority_vote(payloads, key=7, ties="positive"))
        flat = np.concatenate([ruled["a"], ruled["b"].ravel()])
        assert (flat[ties] > 0).all()


def test_majority_is_one_bit_an_entry_too() -> None:
    w = np.ones(8000, "f4")
    payload, _ = once(SignSgd(), {"w": w})
    assert len(majority_vote([payload] * 3, key=0)) == len(payload)


def test_majority_of_other_things() -> None:
    vote, _ = once(SignSgd(), {"w": np.ones(3, "f4")})
    other, _ = once(SignSgd(), {"w": np.ones(4, "f4")})
    renamed, _ = once(SignSgd(), {"v": np.ones(3, "f4")})
    half, _ = once(Fp16(), {"w": np.ones(3, "f4")})
    for wrong in (other, renamed):
        with pytest.raises(LayoutMismatch):
            majority_vote([vote, wrong], key=0)
    with pytest.raises(WrongScheme):
        majority_vote([vote, half], key=0)
    with pytest.raises(BadConfig):
        majority_vote([], key=0)
    with pytest.raises(BadConfig):
        majority_vote([vote], key=0, ties="negative")


# --- integers per channel --------------------------------------------------------------------


@pytest.mark.parametrize(("name", "top"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("coding", ["paper", "prunecast"])
def test_integers_per_channel(name: str, top: int, coding: str) -> None:
    rng = np.random.default_rng(1)
    w = (rng.normal(size=(6, 4, 3, 3)) * np.exp(rng.normal(size=(6, 1, 1, 1)) * 3)).astype("f4")
    w[2] = 0
    _, decoded = once(scheme(name, coding=coding), {"w": w, "b": w[0, 0, 0]})
    for channel, got in zip(w, decoded["w"], strict=True):
        scale = float(np.abs(channel).max()) / top
        # |w - q s| <= s / 2, with room for float32's rounding of the product and of s
        assert np.abs(channel.astype(float) - got).max() <= scale / 2 * (1 + 1e-5)
        if scale:
            q = np.rint(channel.astype(float) / scale)
            assert np.abs(q).max() == top
            np.testing.assert_allclose(got, q * scale, rtol=1e-6)
    bias = w[0, 0, 0].astype(float)
    assert np.abs(bias - decoded["b"]).max() <= np.abs(bias).max() / top / 2 * (1 + 1e-5)


def test_bytes_of_integers() -> None:
    tensors = {"w": np.float32([[7, -7, 3], [0, 1, -1]])}
    payload, _ = once(Int8(), tensors)
    scales = np.array([7 / 127, 1 / 127], "f4")
    scales = np.where(
        scales.astype(float) * 127 < [7, 1], np.nextafter(scales, np.float32(9)), scales
    )
    body = payload[inspect(payload).head_bytes - 4 : -4]
    assert (
        body
        == scales.astype("<f4").tobytes() + np.array([127, -127, 54, 0, 127, -127], "i1").tobytes()
    )
    payload, _ = once(Int4(), {"w": np.float32([7, -7, 3])})
    body = payload[inspect(payload).head_bytes - 4 : -4]
    # 7 and -7 are the low and the high half of one byte, then 3 alone.
    assert body == np.float32(1).tobytes() + bytes([0x97, 0x03])


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_stochastic_rounding_is_right_on_average(name: str) -> None:
    w = np.random.default_rng(2).normal(size=50).astype("f4")
    one = scheme(name, rounding="stochastic")
    drawn = np.array([once(one, {"w": w}, key=key)[1]["w"] for key in range(800)], np.float64)
    spread = drawn.std(axis=0) / np.sqrt(800)
    assert (np.abs(drawn.mean(axis=0) - w) <= 5 * spread + 1e-6).all()
    scale = np.abs(w).max() / (127 if name == "int8" else 7)
    assert np.abs(drawn - w).max() < scale * (1 + 1e-5)


# --- half precision --------------------------------------------------------------------------


@pytest.mark.parametrize("coding", ["paper", "prunecast"])
def test_half_is_numpys(coding: str) -> None:
    rng = np.random.default_rng(3)
    w = (rng.normal(size=5000) * np.exp(8 * rng.normal(size=5000))).astype("f4")
    w = w[np.abs(w) < 65504]
    with np.errstate(under="ignore"):
        half = w.astype(np.float16)
    payload, decoded = once(Fp16(coding=coding), {"w": w})
    assert np.array_equal(decoded["w"], half.astype("f4"))
    if coding == "paper":
        assert payload[inspect(payload).head_bytes - 4 : -4] == half.astype("<f2").tobytes()


def test_overflow_is_an_error_that_names_the_tensor_or_saturates() -> None:
    w = np.float32([1, 70000, -1e30])
    with pytest.raises(OutOfRange, match="'w' reaches 1e\\+30"):
        once(Fp16(), {"w": w})
    assert once(Fp16(overflow="saturate"), {"w": w})[1]["w"].tolist() == [1, 65504, -65504]
    # 65,519 still rounds down; the first that does not is 65,520
    assert once(Fp16(), {"w": np.float32([65519])})[1]["w"].tolist() == [65504]
    with pytest.raises(OutOfRange):
        once(Fp16(), {"w": np.float32([65520])})
