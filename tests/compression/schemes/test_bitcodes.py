"""Golomb and Elias codes against codes written out by hand and bit by bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prunecast.compression.codec import MalformedPayload
from prunecast.compression.schemes.bitcodes import (
    BitView,
    decode_omega,
    encode_gaps,
    encode_omega,
    pack_fields,
    rice_parameter,
    walk,
)
from prunecast.compression.schemes.bitcodes import decode_gaps as gap_pieces
from support.golomb import expected_bits


def omega_by_hand(k: int) -> str:
    code = "0"
    while k > 1:
        code = f"{k:b}{code}"
        k = len(f"{k:b}") - 1
    return code


def decode_gaps(data: bytes, count: int, b: int, most: int) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *gap_pieces(data, count, b, most)])


def starts_of(view: BitView, count: int) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *walk(view, count)])


def golomb_by_hand(gap: int, b: int) -> str:
    quotient, remainder = divmod(gap - 1, 1 << b)
    return "1" * quotient + "0" + (f"{remainder:0{b}b}" if b else "")


def packed(bits: str) -> bytes:
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))


@pytest.mark.parametrize(
    ("k", "code"),  # from Elias 1975
    [
        (1, "0"),
        (2, "100"),
        (3, "110"),
        (4, "101000"),
        (7, "101110"),
        (8, "1110000"),
        (15, "1111110"),
        (16, "10100100000"),
        (100, "1011011001000"),
        (1000, "11100111111010000"),
    ],
)
def test_omega_codewords(k: int, code: str) -> None:
    assert omega_by_hand(k) == code
    codes, lengths = encode_omega(np.array([k]))
    assert f"{int(codes[0]):0{int(lengths[0])}b}" == code


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40) | st.integers(1, 2**32), max_size=80))
def test_omega_round_trip(values: list[int]) -> None:
    data = pack_fields(*encode_omega(np.array(values, np.int64)))
    assert data == packed("".join(map(omega_by_hand, values)))
    view = BitView(data)
    starts = starts_of(view, len(values))
    assert decode_omega(view, starts)[0].tolist() == values
    with pytest.raises(MalformedPayload):
        starts_of(BitView(data + b"\0"), len(values))


def test_omega_across_chunks() -> None:
    values = np.random.default_rng(2).geometric(0.2, 400_000)
    view = BitView(pack_fields(*encode_omega(values)))
    assert view.size > 1 << 20
    starts = starts_of(view, len(values))
    assert np.array_equal(decode_omega(view, starts)[0], values)


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff" * 40, bytes.fromhex("a4c0"), b"\0"])
def test_omega_that_does_not_end(data: bytes) -> None:
    with pytest.raises(MalformedPayload):
        starts_of(BitView(data), 9)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30) | st.integers(1, 3000), max_size=80), st.integers(0, 12))
def test_golomb_round_trip(gaps: list[int], b: int) -> None:
    data = encode_gaps(np.array(gaps, np.int64), b)
    assert data == packed("".join(golomb_by_hand(g, b) for g in gaps))
    assert decode_gaps(data, len(gaps), b, sum(gaps)).tolist() == gaps


def test_golomb_across_chunks_and_with_a_run_longer_than_one() -> None:
    gaps = np.random.default_rng(3).geometric(0.01, 150_000)
    gaps[70_000] = 1_200_000
    gaps[-1] = 1_900_000
    for b in (0, 6):
        data = encode_gaps(gaps, b)
        assert np.array_equal(decode_gaps(data, len(gaps), b, int(gaps.sum())), gaps)


def test_golomb_that_does_not_fit() -> None:
    data = encode_gaps(np.array([3, 9, 100]), 2)
    assert decode_gaps(data, 3, 2, 112).tolist() == [3, 9, 100]
    with pytest.raises(MalformedPayload, match="beyond"):
        decode_gaps(data, 3, 2, 111)
    with pytest.raises(MalformedPayload):
        decode_gaps(data, 2, 2, 112)  # left over
    with pytest.raises(MalformedPayload):
        decode_gaps(data, 6, 2, 1000)  # used up
    with pytest.raises(MalformedPayload):
        decode_gaps(data[:-1], 3, 2, 112)
    with pytest.raises(MalformedPayload, match="beyond"):
        decode_gaps(b"\xff\xff\xff\x7f" + bytes(4), 1, 32, 1 << 33)


@pytest.mark.parametrize("p", [0.0001, 0.001, 0.0025, 0.01, 0.04, 0.1, 0.3, 0.5])
def test_rice_parameter_and_expected_bits_are_the_papers(p: float) -> None:
    golden = (math.sqrt(5) + 1) / 2
    best = 1 + math.floor(math.log2(math.log(golden - 1) / math.log(1 - p)))
    assert rice_parameter(p) == max(0, best)
    assert expected_bits(p) == pytest.approx(
        rice_parameter(p) + 1 / (1 - (1 - p) ** (2 ** rice_parameter(p)))
    )
    # It is the best: no other divisor is expected to need less.
    assert all(expected_bits(p) <= expected_bits(p, b) + 1e-12 for b in range(20))
    # The same, summed over the geometric distribution.
    b, d = rice_parameter(p), np.arange(1, int(40 / p))
    lengths = ((d - 1) >> b) + 1 + b
    assert (lengths * p * (1 - p) ** (d - 1)).sum() == pytest.approx(expected_bits(p), rel=1e-6)


def test_the_papers_worked_figure() -> None:
    """Section VI-D states 8.38 bits at p = 0.01: those of b = 7; its own formula says 6."""
    assert expected_bits(0.01, 7) == pytest.approx(8.38, abs=5e-3)
    assert rice_parameter(0.01) == 6
    assert expected_bits(0.01) == pytest.approx(8.108, abs=1e-3)
    assert round(expected_bits(0.01), 2) == 8.11


@pytest.mark.parametrize("p", [0.001, 0.01, 0.1])
def test_random_positions_cost_what_the_formula_says(p: float) -> None:
    mask = np.random.default_rng(7).random(2_000_000) < p
    positions = np.flatnonzero(mask)
    bits = 8 * len(encode_gaps(np.diff(positions, prepend=-1), rice_parameter(p)))
    assert bits / len(positions) == pytest.approx(expected_bits(p), rel=0.02)


def test_fields_of_all_widths_and_places() -> None:
    rng = np.random.default_rng(5)
    widths = rng.integers(1, 57, 500)
    values = rng.integers(0, 2**62, 500) & (1 << widths) - 1
    data = pack_fields(values.astype(np.uint64), widths)
    assert data == packed(
        "".join(f"{v:0{w}b}" for v, w in zip(values.tolist(), widths.tolist(), strict=True))
    )
    starts = np.cumsum(widths) - widths
    assert np.array_equal(BitView(data).fields(starts, widths), values.astype(np.uint64))
