"""The search itself: few evaluations on smooth functions, an honest answer on others."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunecast.compression.codec.quantisation.search import find


@given(st.floats(-20, 20), st.floats(0.3, 3), st.floats(-8, 8))
def test_finds_the_window_of_a_power(start: float, power: float, target: float) -> None:
    wanted = 2.0 ** (target * power)
    window = (wanted * 0.99, wanted * 1.01)
    found = find(lambda x: 2.0 ** (x * power), window, start=start, bounds=(-20, 20))
    assert found.inside is not None
    assert window[0] <= found.inside.value <= window[1]
    assert found.evaluations <= 16


def test_a_good_guess_is_taken() -> None:
    found = find(math.exp, (0.99, 1.01), start=5.0, bounds=(-9, 9), guess=lambda p: 0.0)
    assert found.inside is not None
    assert found.evaluations == 2


@given(st.floats(-5, 5), st.floats(-9, 9))
def test_a_jump_is_bracketed(edge: float, start: float) -> None:
    found = find(lambda x: 4.0 if x > edge else 0.0, (1, 2), start=start, bounds=(-9, 9))
    assert found.inside is None
    assert found.below is not None
    assert found.above is not None
    assert found.below.x <= edge <= found.above.x
    assert found.above.x - found.below.x <= 1e-6
    assert found.evaluations <= 60


@pytest.mark.parametrize(("value", "side"), [(0.5, "below"), (3.0, "above"), (math.inf, "above")])
def test_a_window_out_of_reach_ends_at_the_bound(value: float, side: str) -> None:
    found = find(lambda x: value, (1, 2), start=0.0, bounds=(-30, 30))
    assert found.inside is None
    point = getattr(found, side)
    assert abs(point.x) == 30
    assert point.value == value
