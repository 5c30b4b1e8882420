"""Running statistics: which tensors they are, and what rounding keeps of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunecast.compression.versions import is_statistic, rounded_floats

MANTISSA = {"f2": 10, "f4": 23, "f8": 52}


def test_statistics_are_told_by_the_names_of_torch_and_keras() -> None:
    names = ["layer1.0.bn1.running_mean", "running_var", "bn/moving_mean", "x.moving_variance"]
    assert all(map(is_statistic, names))
    others = ["bn.weight", "bn.num_batches_tracked", "running_var.weight", "moving_meanings"]
    assert not any(map(is_statistic, others))


@pytest.mark.parametrize("dtype", MANTISSA)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whatever_is_rounded_is_near_ends_in_zeros_and_means_the_same(
    dtype: str, data: st.DataObject
) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, max_side=6))
    array = np.asarray(data.draw(hnp.arrays(dtype, shape)))
    bits = data.draw(st.integers(0, 23))
    found = rounded_floats(array, bits)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    drop = MANTISSA[dtype] - bits
    if drop <= 0:
        assert found.tobytes() == array.tobytes()
        return
    finite = np.isfinite(array)
    pattern = found.view(f"u{found.itemsize}")
    assert not (pattern[finite] & pattern.dtype.type((1 << drop) - 1)).any()
    assert found[~finite].tobytes() == array[~finite].tobytes()
    assert np.isfinite(found[finite]).all()
    assert np.array_equal(np.signbit(found), np.signbit(array))
    assert np.array_equal(found == 0, array == 0)
    top = np.finfo(array.dtype).max * array.dtype.type(0.5)
    usual = finite & (np.abs(array) >= np.finfo(array.dtype).tiny) & (np.abs(array) < top)
    np.testing.assert_allclose(found[usual], array[usual], rtol=2.0 ** -(bits + 1))
    assert rounded_floats(found, bits).tobytes() == found.tobytes()


def test_halves_go_away_from_zero_and_nothing_to_zero_or_infinity() -> None:
    values = np.array([1.125, -1.125, 1.124, np.finfo("f4").max, 1e-45, -1e-45], np.float32)
    found = rounded_floats(values, 2)
    assert found[:3].tolist() == [1.25, -1.25, 1.0]
    assert found[3] == np.float32(1.75 * 2.0**127)
    assert found[4:].tolist() == [2.0**-128, -(2.0**-128)]


def test_a_published_value_stays_while_the_new_one_is_near() -> None:
    last = rounded_floats(np.full(8, 1.5, np.float32), 6)
    spacing = 2.0**-6
    away = np.array([0, 0.6, -0.6, 0.75, 0.76, -0.76, 1.4, -3]) * spacing
    found = rounded_floats((1.5 + away).astype("f4"), 6, last=last, hysteresis=0.75)
    assert ((found - 1.5) / spacing).tolist() == [0, 0, 0, 0, 1, -1, 1, -3]
    plain = rounded_floats((1.5 + away).astype("f4"), 6, last=last)
    assert ((plain - 1.5) / spacing).tolist() == [0, 1, -1, 1, 1, -1, 1, -3]
    # spacings change at powers of two: below 2 they are half of those above
    below = np.array([2 - 0.7 / 64, 2 - 0.8 / 64, 2 + 0.7 / 32, 2 + 0.8 / 32], np.float32)
    found = rounded_floats(below, 6, last=np.full(4, 2, np.float32), hysteresis=0.75)
    assert found.tolist() == [2, 2 - 1 / 64, 2, 2 + 1 / 32]


def test_what_changed_its_meaning_does_not_stay() -> None:
    last = np.array([1.0, -1.0, np.inf, 0.0, 2.0**-149, np.nan, 1.000001], np.float32)
    new = np.array([-1.0, np.nan, 1e38, 2.0**-149, 0.0, 1.0, 1.000002], np.float32)
    found = rounded_floats(new, 6, last=last, hysteresis=1.0)
    assert found.tobytes() == rounded_floats(new, 6).tobytes()
