import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunecast.compression.pruning import CubicSchedule, magnitude_masks

WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(max_dims=3, max_side=12),
    elements=st.floats(-4, 4, width=32),
)


@given(WEIGHTS, st.floats(0, 0.99))
def test_exact_number_removed_and_kept_are_the_largest(weights, sparsity):
    mask = magnitude_masks({"w": weights}, sparsity)["w"]
    assert mask.shape == weights.shape
    assert np.count_nonzero(~mask) == int(sparsity * weights.size)
    if mask.any() and not mask.all():
        assert np.abs(weights[mask]).min() >= np.abs(weights[~mask]).max()


@given(WEIGHTS, WEIGHTS, st.floats(0, 0.99))
def test_global_scope_ranks_all_tensors_together(first, second, sparsity):
    masks = magnitude_masks({"a": first, "b": second}, sparsity, scope="global")
    removed = sum(int(np.count_nonzero(~m)) for m in masks.values())
    assert removed == int(sparsity * (first.size + second.size))
    kept = np.concatenate([np.abs(first)[masks["a"]], np.abs(second)[masks["b"]]])
    gone = np.concatenate([np.abs(first)[~masks["a"]], np.abs(second)[~masks["b"]]])
    if kept.size and gone.size:
        assert kept.min() >= gone.max()


def test_ties_are_broken_by_position():
    mask = magnitude_masks({"w": np.ones(10, np.float32)}, 0.3)["w"]
    assert mask.tolist() == [True] * 7 + [False] * 3


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_impossible_sparsity_is_refused(sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        magnitude_masks({"w": np.ones(3, np.float32)}, sparsity)


def test_cubic_schedule_rises_once_and_stays():
    schedule = CubicSchedule(0.9, begin=2, end=25)
    values = [schedule(version) for version in range(40)]
    assert values[:3] == [0.0, 0.0, 0.0]
    assert all(a <= b for a, b in itertools.pairwise(values))
    assert values[25:] == [pytest.approx(0.9)] * 15


@pytest.mark.parametrize("arguments", [(1.0, 2, 25), (-0.1, 2, 25), (0.5, 5, 5), (0.5, -1, 5)])
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="must"):
        CubicSchedule(*arguments)
