"""Patterns: masks obey them exactly, gradually and in the end."""

import numpy as np
import pytest

from prunecast.compression.pruning.allocation import ALLOCATIONS
from prunecast.compression.pruning.criteria import CRITERIA, Knowledge
from prunecast.compression.pruning.patterns import Blocks, NOfM, parse_pattern
from prunecast.compression.pruning.plan import PlanError, PruningPlan
from prunecast.compression.pruning.schedules import CubicSchedule, StaticSchedule

LAYER = ALLOCATIONS["layer"]
SHAPES = {"linear": (6, 16), "conv": (8, 12, 3, 3), "signal": (4, 8, 5)}


def normal(shapes=SHAPES, seed=0):
    rng = np.random.default_rng(seed)
    return {name: np.abs(rng.normal(size=shape)) for name, shape in shapes.items()}


def groups_of(mask, size):
    """Groups of neighbouring input channels at each output and position of the kernel."""
    return np.moveaxis(mask, 1, -1).reshape(-1, size)


@pytest.mark.parametrize("text", ["2:4", "1:4", "3:4", "1:2"])
def test_every_group_keeps_its_n_highest(text):
    pattern = parse_pattern(text)
    for name, mask in pattern.masks(normal(), pattern.sparsity, LAYER).items():
        assert mask.shape == SHAPES[name]
        groups, scores = (groups_of(a, pattern.of) for a in (mask, normal()[name]))
        assert (groups.sum(1) == pattern.kept).all()
        ranked = np.sort(scores, axis=1)[:, ::-1]
        assert (
            scores[groups].reshape(-1, pattern.kept).min(1) == ranked[:, pattern.kept - 1]
        ).all()


def test_a_group_is_four_input_channels_at_one_position():
    scores = np.zeros((1, 4, 2, 2))
    scores[0, 1], scores[0, 3] = 1.0, 2.0  # whatever the position, channels 1 and 3 are highest
    mask = NOfM(2, 4).masks({"w": scores}, 0.5, LAYER)["w"]
    assert mask[0, :, 0, 0].tolist() == mask[0, :, 1, 1].tolist() == [False, True, False, True]


def test_dense_turns_into_the_pattern_gradually():
    pattern, before = NOfM(2, 4), None
    for sparsity in (0.01, 0.1, 0.3, 0.49, 0.5):
        masks = pattern.masks(normal(), sparsity, LAYER)
        for name, mask in masks.items():
            assert np.count_nonzero(~mask) == int(sparsity * mask.size)
            assert (groups_of(mask, 4).sum(1) >= 2).all()
            assert before is None or not (mask & ~before[name]).any()
        before = masks
    assert pattern.masks(normal(), 0.9, LAYER)["linear"].mean() == 0.5  # and no further


def test_thirds_are_exact_too():
    masks = NOfM(1, 3).masks(normal({"w": (5, 27)}), 1 - 1 / 3, LAYER)
    assert (groups_of(masks["w"], 3).sum(1) == 1).all()


def test_of_equals_the_earlier_stay():
    mask = NOfM(2, 4).masks({"w": np.ones((1, 8))}, 0.5, LAYER)["w"]
    assert mask.tolist() == [[True, True, False, False] * 2]


@pytest.mark.parametrize("scope", ALLOCATIONS)
def test_blocks_go_whole_and_the_lowest_first(scope):
    pattern, scores = Blocks(2, 4), normal()
    masks = pattern.masks(scores, 0.75, ALLOCATIONS[scope])
    size = sum(mask.size for mask in masks.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert kept == pytest.approx(size / 4, abs=8 * len(masks))
    for name, mask in masks.items():
        rows, columns, *kernel = mask.shape
        grid = (rows // 2, 2, columns // 4, 4, *kernel)
        whole = mask.reshape(grid).sum((1, 3))
        assert set(np.unique(whole)) <= {0, 8}
        pooled = scores[name].reshape(grid).mean((1, 3))
        assert whole.any()
        if (whole == 0).any():
            assert pooled[whole == 8].min() >= pooled[whole == 0].max()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4:2", "1 <= N < M"),
        ("0:4", "1 <= N < M"),
        ("4:4", "1 <= N < M"),
        ("1x1", "such as 4x4"),
        ("0x4", "such as 4x4"),
        ("2:4:8", "N:M such as '2:4', or blocks such as '4x4'"),
        ("block", "N:M such as '2:4', or blocks such as '4x4'"),
        ("2:4 ", "N:M such as '2:4', or blocks such as '4x4'"),
    ],
)
def test_what_is_no_pattern_is_said(text, said):
    with pytest.raises(ValueError, match=said):
        parse_pattern(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "2:4",
            r"does not divide 'conv' of shape \[8, 3, 3, 3\]: 3 input channels are no multiple",
        ),
        ("4x4", r"'conv' of shape \[8, 3, 3, 3\] \(and 1 more: 'odd'\): 8 output and 3 input"),
    ],
)
def test_a_tensor_that_it_does_not_divide_is_named_with_the_remedy(text, said):
    shapes = {"fit": (8, 16), "conv": (8, 3, 3, 3), "odd": (6, 8)}
    given = {"pattern": parse_pattern(text), "min_size": 1}
    schedule = CubicSchedule(0.5, 1, 2)
    with pytest.raises(PlanError, match=said + ".*exclude what it does not divide"):
        PruningPlan(schedule, **given).check(normal(shapes))
    PruningPlan(schedule, exclude=("conv", "odd"), **given).check(normal(shapes))


@pytest.mark.parametrize(
    ("text", "unit", "left"),
    [("", 1, 8), ("4x4", 16, 1), ("4x1", 4, 2)],  # of 128 weights, as so many units
)
def test_layers_that_would_vanish_are_told_by_what_goes_as_one(text, unit, left):
    pattern = parse_pattern(text)
    assert pattern is None or pattern.unit == unit
    arrays = normal({f"{n}.weight": (4, 16) for n in range(2)})
    plan = PruningPlan(
        StaticSchedule(0.94), allocation=ALLOCATIONS["global"], min_size=16, pattern=pattern
    )
    if left >= 2:
        plan.check(arrays)
        return
    with pytest.raises(PlanError, match=f"sparsity 0.94 leaves {left} of {128 // unit} for 2 tens"):
        plan.check(arrays)


def test_n_of_m_goes_one_by_one():
    assert NOfM(2, 4).unit == 1


def test_a_pattern_that_fixes_the_sparsity_goes_with_that_alone():
    pattern = parse_pattern("2:4")
    with pytest.raises(PlanError, match=r"comes to a sparsity of 0\.5, not 0\.9: give that"):
        PruningPlan(StaticSchedule(0.9), min_size=1, pattern=pattern).check(normal())
    with pytest.raises(PlanError, match="choose the scope 'layer'"):
        PruningPlan(allocation=ALLOCATIONS["global"], pattern=pattern)
    PruningPlan(allocation=ALLOCATIONS["global"], pattern=parse_pattern("4x4"))


def test_what_held_masks_removed_stays_removed_within_a_pattern():
    plan = PruningPlan(
        CubicSchedule(0.5, 1, 6), CRITERIA["magnitude"], min_size=1, pattern=NOfM(2, 4)
    )
    kept = None
    for version in range(2, 8):
        known = Knowledge(normal(seed=version))
        masks = plan.masks(version, known, kept)
        for name, mask in masks.items():
            assert kept is None or not (mask & ~kept[name]).any()
        kept = masks
    assert all((groups_of(mask, 4).sum(1) == 2).all() for mask in kept.values())
