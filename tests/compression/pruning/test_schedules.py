"""Schedules: their values, one by one, and what all of them have in common."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunecast.compression.pruning.criteria import Knowledge
from prunecast.compression.pruning.plan import PruningPlan
from prunecast.compression.pruning.schedules import (
    SCHEDULES,
    IterativeSchedule,
    LayerSchedule,
)

VALUES = {
    "cubic": [0, 0, 0.3904, 0.6272, 0.7488, 0.7936, 0.8, 0.8],
    "linear": [0, 0, 0.16, 0.32, 0.48, 0.64, 0.8, 0.8],
    # what is left falls by the same factor, 0.2 ** (1 / 5), in every round
    "exponential": [0, 0, 0.27522, 0.474694, 0.619269, 0.724054, 0.8, 0.8],
    "cosine": [0, 0, 0.076393, 0.276393, 0.523607, 0.723607, 0.8, 0.8],
    "one-shot": [0, 0, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8],
    "static": [0.8] * 8,
    # four steps in five rounds
    "iterative": [0, 0, 0.33126, 0.552786, 0.700930, 0.8, 0.8, 0.8],
    "layer-by-layer": [0, 0, 0.16, 0.32, 0.48, 0.64, 0.8, 0.8],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_values_from_two_rounds_of_dense_models_to_the_seventh(name):
    schedule = SCHEDULES[name](0.8, 2, 7)
    found = [schedule(version) for version in range(1, 9)]
    assert found == pytest.approx(VALUES[name], abs=1e-6)
    assert found[-2:] == [0.8, 0.8]  # exactly: counts of weights follow from it


@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.floats(0, 0.99),
    st.integers(0, 50),
    st.integers(1, 50),
)
def test_every_schedule_rises_from_zero_to_its_end(name, final, begin, length):
    schedule = SCHEDULES[name](final, begin, begin + length)
    found = [schedule(version / 4) for version in range(4 * (begin + length) + 8)]
    assert all(0 <= a <= b <= final for a, b in itertools.pairwise(found))
    assert found[4 * (begin + length)] == final
    if name != "static":
        assert set(found[: 4 * begin + 1]) == {0.0}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("arguments", [(1.0, 2, 25), (-0.1, 2, 25), (0.5, 5, 5), (0.5, -1, 5)])
def test_every_schedule_refuses_what_cannot_be(name, arguments):
    with pytest.raises(ValueError, match="must"):
        SCHEDULES[name](*arguments)


def test_iterations_leave_rounds_to_recover_after_each():
    schedule = IterativeSchedule(0.9, 4, 16, steps=3)
    found = [schedule(version) for version in range(1, 18)]
    rises = [v for v, (a, b) in enumerate(itertools.pairwise(found), start=2) if b > a]
    assert rises == [5, 9, 13]
    left = [1 - schedule(version) for version in (4, 5, 9, 13)]
    ratios = [b / a for a, b in itertools.pairwise(left)]
    assert ratios == pytest.approx([0.1 ** (1 / 3)] * 3)
    with pytest.raises(ValueError, match="1 step or more, not 0"):
        IterativeSchedule(0.5, steps=0)


def weights(count=3):
    rng = np.random.default_rng(1)
    return {f"layer{n}": rng.normal(size=(10, 10)) for n in range(count)}


def test_layers_are_pruned_one_by_one_from_the_input_each_to_the_end():
    plan = PruningPlan(LayerSchedule(0.75, 1, 7), min_size=0)
    known = Knowledge(weights())
    found = {v: plan.masks(v, known) for v in range(1, 9)}
    turns = ["layer0"], ["layer0", "layer1"], ["layer0", "layer1", "layer2"]
    expected = {1: [], 2: turns[0], 3: turns[0], 4: turns[1], 5: turns[1], 6: turns[2]}
    assert {v: list(found[v]) for v in expected} == expected
    for masks in found.values():
        assert [int((~mask).sum()) for mask in masks.values()] == [75] * len(masks)
    stages = [plan.stage(v, 3) for v in range(1, 9)]
    assert stages == [0, 1, 1, 2, 2, 3, 3, 3]


@given(st.sampled_from(sorted(SCHEDULES)), st.floats(0.05, 0.95), st.integers(0, 2**32 - 1))
def test_what_is_not_kept_does_not_come_back_and_counts_are_exact(name, final, seed):
    """Whatever the weights become from one event to the next."""
    plan = PruningPlan(SCHEDULES[name](final, 1, 6), min_size=0)
    rng = np.random.default_rng(seed)
    kept = {}
    for version in range(1, 9):
        known = Knowledge({n: rng.integers(-3, 4, w.shape) / 2.0 for n, w in weights(4).items()})
        masks = plan.masks(version, known, kept)
        for tensor, mask in masks.items():
            assert not (mask & ~kept.get(tensor, np.ones_like(mask))).any()
            sparsity = final if name == "layer-by-layer" else plan.schedule(version)
            assert int((~mask).sum()) == int(sparsity * mask.size)
        kept = masks
