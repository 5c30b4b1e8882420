"""QSGD against lemma 3.1, theorem 3.2 and corollary 3.3 of Alistarh et al. 2017."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from prunecast.compression.schemes import OutOfRange
from prunecast.compression.schemes.qsgd import Qsgd
from prunecast.compression.schemes.registry import inspect

Vector = NDArray[np.float32]


def draw(qsgd: Qsgd, v: Vector, keys: int) -> NDArray[np.float64]:
    """One decoded vector per key."""
    state = qsgd.init({"v": v.shape})
    return np.array(
        [qsgd.decode(qsgd.encode({"v": v}, state, key=k)[0])["v"] for k in range(keys)], np.float64
    )


def vector(n: int, seed: int = 0) -> Vector:
    return np.random.default_rng(seed).normal(size=n).astype("f4")


def pieces(v: Vector, bucket: int) -> list[Vector]:
    size = bucket or len(v)
    return [v[i : i + size] for i in range(0, len(v), size)]


def bucket_norm(v: Vector, norm: str) -> float:
    wide = np.abs(v.astype(float))
    return float(wide.max() if norm == "max" else math.sqrt((wide * wide).sum()))


def test_worked_example() -> None:
    """v = (3, -4, 0), |v| = 5, s = 5: 3/5 and 4/5 are levels themselves, nothing is random."""
    qsgd = Qsgd(levels=5, bucket=0)
    for decoded in draw(qsgd, np.float32([3, -4, 0]), 10):
        assert decoded.tolist() == [3, -4, 0]


def test_only_the_two_neighbouring_levels_occur_with_the_right_frequency() -> None:
    """|v| = 5, s = 2, steps of 2.5: 3 lies 0.2 of a step above 2.5."""
    drawn = draw(Qsgd(levels=2, bucket=0), np.float32([3, -4]), 2000)
    assert set(drawn[:, 0]) == {2.5, 5.0}
    assert set(drawn[:, 1]) == {-2.5, -5.0}
    # p = a s - l; four standard errors
    assert np.mean(drawn[:, 0] == 5.0) == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / 2000))
    assert np.mean(drawn[:, 1] == -5.0) == pytest.approx(0.6, abs=4 * math.sqrt(0.24 / 2000))


@pytest.mark.parametrize("bucket", [0, 30])
@pytest.mark.parametrize("levels", [1, 4, 16])
@pytest.mark.parametrize("norm", ["l2", "max"])
def test_unbiased(levels: int, bucket: int, norm: str) -> None:
    v = vector(100)
    keys = 800
    drawn = draw(Qsgd(levels=levels, bucket=bucket, norm=norm, elias="dense"), v, keys)
    # Two points, a step apart: sd = step sqrt(f (1 - f)). 100 means, each within five standard
    # errors, and a few draws more where the rarer point is expected less than once.
    step = np.concatenate(
        [np.full(len(p), bucket_norm(p, norm) / levels) for p in pieces(v, bucket)]
    )
    fraction = np.modf(np.abs(v) / step)[0]
    spread = step * np.sqrt(fraction * (1 - fraction) / keys)
    assert (np.abs(drawn.mean(axis=0) - v) <= 5 * spread + 4 * step / keys).all()


@pytest.mark.parametrize("levels", [1, 2, 8, 64])
def test_variance_bound(levels: int) -> None:
    """E|Q(v) - v|^2 <= min(n / s^2, sqrt(n) / s) |v|^2 (lemma 3.1 ii)."""
    n = 256
    v = vector(n, seed=2)
    drawn = draw(Qsgd(levels=levels, bucket=0), v, 300)
    error = np.square(drawn - v).sum(axis=1).mean()
    bound = min(n / levels**2, math.sqrt(n) / levels) * float(np.square(v.astype(float)).sum())
    assert error <= bound
    assert error > 0.05 * bound  # the test would notice a quantiser of other levels
    # And it is what the two-point distribution says: sum of step^2 f (1 - f).
    norm = math.sqrt(float(np.square(v.astype(float)).sum()))
    fraction = np.modf(np.abs(v).astype(float) / norm * levels)[0]
    exact = (norm / levels) ** 2 * (fraction * (1 - fraction)).sum()
    assert error == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_sparsity_bound(levels: int) -> None:
    """E|Q(v)|_0 <= s (s + sqrt(n)) (lemma 3.1 iii)."""
    n = 1024
    drawn = draw(Qsgd(levels=levels, bucket=0), vector(n, seed=3), 100)
    assert np.count_nonzero(drawn, axis=1).mean() <= levels * (levels + math.sqrt(n))


def mean_bits(qsgd: Qsgd, n: int, keys: int = 20) -> float:
    """Mean bits of norm and codewords: without container, options and the count of non-zeros."""
    bits = []
    for key in range(keys):
        v = vector(n, seed=1000 + key)
        payload, _ = qsgd.encode({"v": v}, qsgd.init({"v": (n,)}), key=key)
        body = 8 * inspect(payload).body_bytes
        nonzeros = np.count_nonzero(qsgd.decode(payload)["v"])
        # levels and bucket (8 bytes), kind of code (1); sparse: length and codeword of the count
        body -= 8 * 9
        if qsgd.elias == "sparse":
            body -= 8 * (8 + (len(omega(nonzeros + 1)) + 7) // 8)
        bits.append(body)
    return float(np.mean(bits))


def omega(k: int) -> str:
    code = "0"
    while k > 1:
        code = f"{k:b}{code}"
        k = len(f"{k:b}") - 1
    return code


@pytest.mark.parametrize(("levels", "n"), [(1, 10_000), (1, 250_000), (2, 250_000), (4, 250_000)])
def test_code_length_of_theorem_3_2(levels: int, n: int) -> None:
    """(3 + 3/2 log2(2 (s^2 + n) / (s (s + sqrt n)))) s (s + sqrt n) + 32, its o(1) taken as 0."""
    density = levels * (levels + math.sqrt(n))
    bound = (3 + 1.5 * math.log2(2 * (levels**2 + n) / density)) * density + 32
    bits = mean_bits(Qsgd(levels=levels, bucket=0, elias="sparse"), n)
    assert bits <= bound
    assert bits > 0.5 * bound


def test_code_length_of_corollary_3_3() -> None:
    """s = sqrt(n): 2.8 n + 32 bits with the o(1) of Elias' code taken as 0.

    At the small integers that occur here that o(1) is not yet small: |Elias(2)| is 3, not
    log2(2) + 1 = 2. For normal vectors the codewords come to 2.95 bits an entry.
    """
    n = 10_000
    bits = mean_bits(Qsgd(levels=100, bucket=0, elias="dense"), n)
    # The expectation itself: level l of |x| with probability 1 - |x - l|, for x standard normal.
    x = np.abs(np.random.default_rng(8).normal(size=400_000))
    low = np.floor(x).astype(int)
    up = x - low
    cost = np.array([len(omega(level + 1)) + (level > 0) for level in range(8)])
    expected = ((1 - up) * cost[low] + up * cost[low + 1]).mean()
    assert bits / n == pytest.approx(expected, rel=0.01)
    assert bits <= 1.06 * (2.8 * n + 32)


def dense_by_hand(levels: list[int]) -> str:
    return "".join(omega(abs(q) + 1) + ("01"[q < 0] if q else "") for q in levels)


def sparse_by_hand(levels: list[int]) -> str:
    bits, last = "", -1
    for i, q in enumerate(levels):
        if q:
            bits += omega(i - last) + "01"[q < 0] + omega(abs(q))
            last = i
    return bits


def packed(bits: str) -> bytes:
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))


@pytest.mark.parametrize("elias", ["sparse", "dense"])
@pytest.mark.parametrize("bucket", [0, 16])
def test_bits_are_those_of_the_codewords(elias: str, bucket: int) -> None:
    v = np.concatenate([vector(40, seed=5), np.zeros(60, np.float32), vector(9, seed=6)])
    qsgd = Qsgd(levels=6, bucket=bucket, elias=elias)
    payload, _ = qsgd.encode({"v": v}, qsgd.init({"v": v.shape}), key=3)
    decoded = qsgd.decode(payload)["v"]
    norms = [np.float32(bucket_norm(p, "l2")) for p in pieces(v, bucket)]
    levels = [
        np.rint(p.astype(float) / (float(norm) or 1) * 6).astype(int).tolist()
        for p, norm in zip(pieces(decoded, bucket), norms, strict=True)
    ]
    expected = (6).to_bytes(4, "little") + bucket.to_bytes(4, "little")
    expected += bytes([elias == "dense"]) + np.array(norms, "<f4").tobytes()
    if elias == "dense":
        expected += packed("".join(map(dense_by_hand, levels)))
    else:
        counts = packed("".join(omega(1 + sum(map(bool, q))) for q in levels))
        expected += len(counts).to_bytes(8, "little") + counts
        expected += packed("".join(map(sparse_by_hand, levels)))
    assert payload[inspect(payload).head_bytes - 4 : -4] == expected


def test_auto_takes_the_shorter_code() -> None:
    chosen = set()
    for levels in (1, 4, 16, 22, 64, 1000):
        sizes = {}
        for elias in ("sparse", "dense", "auto"):
            qsgd = Qsgd(levels=levels, elias=elias)
            sizes[elias] = len(
                qsgd.encode({"v": vector(5000)}, qsgd.init({"v": (5000,)}), key=0)[0]
            )
        assert sizes["auto"] == min(sizes.values())
        chosen.add(min(sizes, key=sizes.__getitem__))
    assert chosen == {"sparse", "dense"}


@pytest.mark.parametrize("coding", ["paper", "prunecast"])
def test_max_norm_and_short_last_bucket(coding: str) -> None:
    v = np.float32([1, 2, 4, 3] * 4 + [16, -12] * 8 + [-3])
    qsgd = Qsgd(levels=4, bucket=16, norm="max", coding=coding)
    payload, _ = qsgd.encode({"v": v}, qsgd.init({"v": (33,)}), key=0)
    assert np.array_equal(qsgd.decode(payload)["v"], v)


def test_norm_beyond_float32() -> None:
    v = np.full(100, 3e38, "f4")
    with pytest.raises(OutOfRange, match="'v'"):
        Qsgd(bucket=0).encode({"v": v}, Qsgd(bucket=0).init({"v": (100,)}), key=0)
