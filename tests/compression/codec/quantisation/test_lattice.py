"""quantise and dequantise: rounding, dead zone, errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunecast.compression.codec import (
    CodecError,
    NonFiniteError,
    QuantiseError,
    dequantise,
    quantise,
)


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(max_side=5), elements=st.floats(-1e3, 1e3, width=32)),
    st.sampled_from([0.25, 0.1, 3.0]),
    st.sampled_from([0.5, 0.66, 1.0]),
)
def test_the_definition(x: np.ndarray, step: float, dead_zone: float) -> None:
    q = quantise(x, step, dead_zone=dead_zone)
    wide = x.astype(np.float64)
    assert q.dtype == np.int32
    assert (q == np.sign(wide) * np.floor(np.abs(wide) / step + 1 - dead_zone)).all()


def test_halves_round_away_from_zero() -> None:
    assert quantise(np.array([-1.5, -0.5, 0.5, 2.5]), 1.0).tolist() == [-2, -1, 1, 3]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_name_the_tensor(bad: float) -> None:
    with pytest.raises(NonFiniteError, match=r"'layer\.weight'"):
        quantise(np.array([1.0, bad], np.float32), 0.1, name="layer.weight")


def test_int32_overflow_and_bad_arguments() -> None:
    with pytest.raises(QuantiseError, match="larger step"):
        quantise(np.array([1e10]), 1.0)
    for step in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(QuantiseError):
            quantise(np.ones(2), step)
        with pytest.raises(QuantiseError):
            dequantise(np.ones(2, np.int32), step)
    with pytest.raises(QuantiseError):
        quantise(np.ones(2, np.int32), 1.0)
    with pytest.raises(QuantiseError):
        quantise(np.ones(2), 1.0, dead_zone=0.0)
    with pytest.raises(CodecError):
        dequantise(np.ones(2), 1.0)


def test_dequantise_is_one_float32_multiplication() -> None:
    q = np.array([-7, -1, 0, 3, 2**24], np.int32)
    expected = q.astype(np.float32) * np.float32(0.1)
    assert dequantise(q, 0.1).tobytes() == expected.tobytes()
    assert dequantise(q, 0.1, np.float16).dtype == np.float16


def test_negative_zero_is_canonical() -> None:
    q = np.array([-1, 0], np.int32)
    assert not np.signbit(dequantise(q, 1e-46)).any()
    assert not np.signbit(dequantise(q, 1e-12, np.float16)).any()


def test_scalars_and_empty_arrays() -> None:
    assert quantise(np.array(2.6), 1.0).shape == ()
    assert quantise(np.zeros((0, 3)), 1.0).shape == (0, 3)
    assert dequantise(np.array(2), 0.5).item() == 1.0
