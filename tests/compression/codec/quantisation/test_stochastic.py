"""Stochastic rounding: unbiased, bound to key and name, the same everywhere."""

from __future__ import annotations

import hashlib
import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunecast.compression.codec import (
    CounterStream,
    NonFiniteError,
    QuantiseError,
    quantise_stochastically,
)

DRAWS = 200_000


def by_definition(x: float, step: float, key: int, name: str, index: int) -> int:
    """The rule in exact arithmetic, apart from the one division."""
    label = b"prunecast stochastic rounding 1\0" + struct.pack("<Q", key) + name.encode()
    origin = int.from_bytes(hashlib.sha256(label).digest()[:8], "little")
    word = int(CounterStream(origin).words(index, index + 1)[0])
    a = Fraction(abs(x) / step)
    up = Fraction(word >> 11, 1 << 53) < a - math.floor(a)
    q = math.floor(a) + up
    return -q if x < 0 else q


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(max_side=5), elements=st.floats(-1e6, 1e6, width=32)),
    st.sampled_from([0.25, 0.1, 3.0]),
    st.integers(0, 2**64 - 1),
)
def test_the_definition(x: np.ndarray, step: float, key: int) -> None:
    q = quantise_stochastically(x, step, key=key, name="näme")
    assert q.dtype == np.int32
    assert q.shape == x.shape
    values = x.astype(np.float64).ravel().tolist()
    expected = [by_definition(v, step, key, "näme", i) for i, v in enumerate(values)]
    assert q.ravel().tolist() == expected


def test_these_very_integers_come_out_on_every_machine() -> None:
    x = np.linspace(-2, 2, 16, dtype=np.float32)
    q = quantise_stochastically(x, 0.5, key=20, name="w")
    assert q.tolist() == [-4, -3, -3, -3, -2, -1, -1, -1, 1, 0, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("x", [0.01, 0.3, 0.5, 0.97, -0.3, -12.7, 1000.25])
def test_unbiased_over_positions(x: float) -> None:
    q = quantise_stochastically(np.full(DRAWS, x), 1.0, key=3, name="w")
    rest = abs(x) % 1
    deviation = math.sqrt(rest * (1 - rest) / DRAWS)
    assert abs(float(q.mean()) - x) < 4.5 * deviation
    assert set(np.unique(q)) <= {math.floor(x), math.ceil(x)}


def test_unbiased_over_keys_at_every_position() -> None:
    x = np.linspace(-1.9, 1.9, 39)
    keys = 4000
    total = sum(quantise_stochastically(x, 0.7, key=k, name="w") for k in range(keys))
    a = np.abs(x) / 0.7
    rest = a - np.floor(a)
    deviation = np.sqrt(np.maximum(rest * (1 - rest), 1e-6) / keys)
    assert (np.abs(total / keys - x / 0.7) < 4.5 * deviation + 1e-12).all()


def test_the_mean_of_a_tensor_survives_where_nearest_rounding_loses_it() -> None:
    rng = np.random.default_rng(4)
    x = (rng.normal(size=DRAWS) * 0.1 + 0.05).astype(np.float32)
    q = quantise_stochastically(x, 1.0, key=1, name="w")
    assert abs(float(q.mean()) - float(x.mean())) < 4.5 * 0.5 / math.sqrt(DRAWS)
    assert abs(float(np.rint(x).mean()) - float(x.mean())) > 0.04


@pytest.mark.parametrize(("key", "name"), [(1, "v"), (2, "w")])
def test_other_names_and_keys_give_independent_streams(key: int, name: str) -> None:
    x = np.full(DRAWS, 0.5)
    a = quantise_stochastically(x, 1.0, key=1, name="w") - 0.5
    b = quantise_stochastically(x, 1.0, key=key, name=name) - 0.5
    correlation = float((a * b).mean()) * 4
    assert abs(correlation) < 4.5 / math.sqrt(DRAWS)


def test_neighbouring_positions_are_independent() -> None:
    q = quantise_stochastically(np.full(DRAWS, 0.5), 1.0, key=9, name="w") - 0.5
    for lag in (1, 2, 3, 64):
        correlation = float((q[lag:] * q[:-lag]).mean()) * 4
        assert abs(correlation) < 4.5 / math.sqrt(DRAWS - lag)


def test_a_lattice_point_stays() -> None:
    x = np.arange(-50, 51) * 0.25
    for key in range(20):
        q = quantise_stochastically(x, 0.25, key=key, name="w")
        assert (q == np.arange(-50, 51)).all()


def test_blocks_do_not_show() -> None:
    size = (1 << 20) + 5
    x = np.full(size, 0.5, np.float32)
    whole = quantise_stochastically(x, 1.0, key=7, name="w")
    assert whole[-5:].tolist() == [
        by_definition(0.5, 1.0, 7, "w", i) for i in range(size - 5, size)
    ]


def test_shapes_dtypes_and_errors() -> None:
    assert quantise_stochastically(np.array(2.0), 1.0, key=0, name="s").shape == ()
    assert quantise_stochastically(np.zeros((0, 3)), 1.0, key=0, name="e").shape == (0, 3)
    assert quantise_stochastically(np.float16([2.0]), 1.0, key=0, name="h").tolist() == [2]
    with pytest.raises(NonFiniteError, match="'w'"):
        quantise_stochastically(np.array([np.nan]), 1.0, key=0, name="w")
    with pytest.raises(QuantiseError, match="larger step"):
        quantise_stochastically(np.array([2.0**31 - 0.5]), 1.0, key=0, name="w")
    top = quantise_stochastically(np.array([2.0**31 - 1.5]), 1.0, key=0, name="w")
    assert top in (2**31 - 2, 2**31 - 1)
    for key in (-1, 1 << 64):
        with pytest.raises(QuantiseError, match="key"):
            quantise_stochastically(np.ones(2), 1.0, key=key, name="w")
    with pytest.raises(QuantiseError):
        quantise_stochastically(np.ones(2, np.int32), 1.0, key=0, name="w")
