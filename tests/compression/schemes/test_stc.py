"""Sparse ternary compression against algorithm 1 of Sattler et al. 2019, written out plainly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from prunecast.compression.codec import MalformedPayload
from prunecast.compression.schemes.layout import layout_of
from prunecast.compression.schemes.registry import inspect, scheme
from prunecast.compression.schemes.sparse import Stc
from support.golomb import expected_bits

Vector = NDArray[np.float32]


def stc_by_hand(update: list[float], p: float) -> list[float]:
    """STC of a flat list, as the paper's algorithm 1 goes."""
    k = max(round(p * len(update)), 1)
    order = sorted(range(len(update)), key=lambda i: (-abs(update[i]), i))[:k]
    mu = sum(abs(update[i]) for i in order) / k
    return [math.copysign(mu, x) if i in order and x else 0.0 for i, x in enumerate(update)]


def once(stc: Stc, tensors: dict[str, Vector]) -> dict[str, Vector]:
    payload, _ = stc.encode(tensors, stc.init(layout_of(tensors)), key=0)
    return stc.decode(payload)


def test_worked_example() -> None:
    # k = 3 of 10; the largest are -6, 5, 4; mu = 15 / 3.
    w = np.float32([1, -6, 0.5, 5, 0, 2, 4, -3, 0.1, -0.2])
    expected = [0, -5, 0, 5, 0, 0, 5, 0, 0, 0]
    assert once(Stc(density=0.3), {"w": w})["w"].tolist() == expected
    assert stc_by_hand(w.tolist(), 0.3) == expected


@pytest.mark.parametrize("density", [0.01, 0.1, 0.37, 1.0])
@pytest.mark.parametrize("coding", ["paper", "prunecast"])
def test_random_vectors(density: float, coding: str) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.laplace(size=(20, 30)).astype("f4"), rng.laplace(size=77).astype("f4")
    flat = np.concatenate([a.ravel(), b])
    whole = once(Stc(density=density, coding=coding), {"a": a, "b": b})
    np.testing.assert_allclose(
        np.concatenate([whole["a"].ravel(), whole["b"]]), stc_by_hand(flat.tolist(), density), 1e-6
    )
    each = once(Stc(density=density, scope="tensor", coding=coding), {"a": a, "b": b})
    np.testing.assert_allclose(each["a"].ravel(), stc_by_hand(a.ravel().tolist(), density), 1e-6)
    np.testing.assert_allclose(each["b"], stc_by_hand(b.tolist(), density), 1e-6)


def test_equal_magnitudes_are_taken_from_the_front_and_never_more_than_k() -> None:
    w = np.float32([2, -2, 2, -2, 2, 0, 0, 0])
    assert once(Stc(density=0.375), {"w": w})["w"].tolist() == [2, -2, 2, 0, 0, 0, 0, 0]


def test_zeros_are_not_sent_though_k_asks_for_them() -> None:
    # mu = (1 / k) sum |T| divides by k = 4, as algorithm 1 has it.
    w = np.float32([0, 0, 8, 0, 0, 0, 0, 0])
    assert once(Stc(density=0.5), {"w": w})["w"].tolist() == [0, 0, 2, 0, 0, 0, 0, 0]


def test_residual_over_several_rounds_is_the_papers() -> None:
    """Algorithm 2, client: T = A + dW; send STC(T); A = T - STC(T)."""
    stc = Stc(density=0.2)
    state = stc.init({"w": (15,)})
    held = [0.0] * 15
    for round_ in range(8):
        w = np.random.default_rng(round_).normal(size=15).astype("f4")
        payload, state = stc.encode({"w": w}, state, key=0)
        wanted = [x + a for x, a in zip(w.tolist(), held, strict=True)]
        sent = stc_by_hand(wanted, 0.2)
        held = [x - y for x, y in zip(wanted, sent, strict=True)]
        np.testing.assert_allclose(stc.decode(payload)["w"], sent, rtol=1e-5)
        np.testing.assert_allclose(state.buffers["residual"]["w"], held, atol=1e-5)


@pytest.mark.parametrize("p", [0.001, 0.01, 0.05])
def test_bytes_are_those_of_the_formula(p: float) -> None:
    """k (b_pos + 1) bits and one float32 (section VI-D), on random positions."""
    n = 1_000_000
    w = np.random.default_rng(4).normal(size=n).astype("f4")
    stc = Stc(density=p)
    payload, _ = stc.encode({"w": w}, stc.init({"w": (n,)}), key=0)
    bits = p * n * (expected_bits(p) + 1) + 32
    assert 8 * inspect(payload).body_bytes == pytest.approx(bits, rel=0.02)


def test_prunecast_coding_needs_less_where_rows_and_columns_move_together() -> None:
    rng = np.random.default_rng(5)
    level = np.exp(rng.normal(size=(300, 1))) * np.exp(rng.normal(size=(1, 400)))
    tensors = {"w": (level * rng.laplace(size=(300, 400))).astype("f4")}
    sizes = {}
    for coding in ("paper", "prunecast"):
        stc = scheme("stc", density=0.02, coding=coding)
        payload, _ = stc.encode(tensors, stc.init(layout_of(tensors)), key=0)
        sizes[coding] = inspect(payload).body_bytes
    assert sizes["prunecast"] < 0.8 * sizes["paper"]


def test_reads_no_more_than_ternary() -> None:
    int8 = scheme("int8", coding="prunecast")
    payload, _ = int8.encode({"w": np.float32([1, 0.5])}, int8.init({"w": (2,)}), key=0)
    # The same body under the number of STC, scope "tensor" in front.
    from prunecast.compression.codec import Limits
    from prunecast.compression.schemes.container import seal, unseal

    body = unseal(payload, Limits()).body
    forged = seal(Stc.name, "prunecast", {"w": (2,)}, b"\0" + body)
    with pytest.raises(MalformedPayload, match="ternary"):
        Stc().decode(forged)
