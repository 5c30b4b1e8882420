"""Allocations: how much of which tensor, to the weight."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from prunecast.compression.pruning.allocation import ALLOCATIONS

SHAPES = {"stem": (16, 3, 3, 3), "conv": (32, 16, 3, 3), "fc": (256, 512), "head": (10, 256)}
OVER_ALL = sorted(ALLOCATIONS.keys() - {"layer"})


def normal(shapes=SHAPES, seed=0):
    rng = np.random.default_rng(seed)
    return {name: np.abs(rng.normal(size=shape)) for name, shape in shapes.items()}


def densities(masks):
    return {name: float(mask.mean()) for name, mask in masks.items()}


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_kernels_are_as_dense_as_their_axes_say(sparsity):
    """Against the formula of Evci et al. 2020: density in proportion to sum over product."""
    masks = ALLOCATIONS["erk"](normal(), sparsity)
    size = sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == size - int(sparsity * size)
    found = densities(masks)
    raw = {name: sum(shape) / np.prod(shape) for name, shape in SHAPES.items()}
    sparse = [name for name in SHAPES if found[name] < 1]
    units = [found[name] / raw[name] for name in sparse]
    np.testing.assert_allclose(units, units[0], rtol=0.01)
    for name in SHAPES.keys() - set(sparse):  # dense, because it would have been denser than that
        assert raw[name] * units[0] >= 0.99
    assert found["stem"] >= found["conv"] > found["fc"]
    assert found["head"] > found["fc"]


def test_each_tensor_keeps_its_own_highest_by_kernel():
    scores = normal()
    scores["fc"] *= 1e-6  # a scale says nothing
    masks = ALLOCATIONS["erk"](scores, 0.9)
    assert masks["fc"].sum() == ALLOCATIONS["erk"](normal(), 0.9)["fc"].sum()
    for name, mask in masks.items():
        assert mask.all() or scores[name][mask].min() >= scores[name][~mask].max()


def test_every_tensor_gives_up_the_same_share_of_its_squares():
    rng = np.random.default_rng(0)
    scores = {
        "even": rng.uniform(0.9, 1.1, size=(40, 50)),
        "normal": np.abs(rng.normal(size=(40, 50))) * 1e-3,
        "peaked": rng.lognormal(0, 2.5, size=(40, 50)),
    }
    masks = ALLOCATIONS["sensitivity"](scores, 0.5)
    lost = {n: float(np.square(s[~masks[n]]).sum() / np.square(s).sum()) for n, s in scores.items()}
    assert max(lost.values()) - min(lost.values()) < 0.01
    found = densities(masks)
    assert found["even"] > found["normal"] > found["peaked"]
    assert sum(int(mask.sum()) for mask in masks.values()) == 3000
    twice = ALLOCATIONS["sensitivity"]({n: s * 7 for n, s in scores.items()}, 0.5)
    assert all(np.array_equal(mask, twice[name]) for name, mask in masks.items())


@pytest.mark.parametrize("scope", OVER_ALL)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    st.floats(0, 0.999),
    st.integers(0, 5),
    st.booleans(),
)
def test_no_tensor_is_emptied_and_the_number_is_exact(scope, shapes, sparsity, seed, ties):
    rng = np.random.default_rng(seed)
    scores = {str(at): rng.lognormal(0, 20, size=shape) for at, shape in enumerate(shapes)}
    if ties:
        scores = {name: np.floor(score) for name, score in scores.items()}
    size = sum(score.size for score in scores.values())
    kept = size - int(sparsity * size)
    assume(kept >= len(scores))
    masks = ALLOCATIONS[scope](scores, sparsity)
    assert all(mask.any() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == kept
    for name, mask in masks.items():
        assert mask.all() or scores[name][mask].min() >= scores[name][~mask].max()


@pytest.mark.parametrize("scope", OVER_ALL)
def test_a_sparsity_that_leaves_less_than_a_weight_for_each_is_refused(scope):
    scores = normal({"a": (2, 5), "b": (2, 5), "c": (2, 5)})
    assert all(mask.sum() == 1 for mask in ALLOCATIONS[scope](scores, 0.9).values())
    with pytest.raises(ValueError, match=r"0\.95 leaves 2 of 30 for 3 tensors, so a layer would"):
        ALLOCATIONS[scope](scores, 0.95)


@pytest.mark.parametrize("scope", ALLOCATIONS)
def test_nothing_to_prune_is_nothing_pruned(scope):
    assert ALLOCATIONS[scope]({}, 0.5) == {}
    empty = ALLOCATIONS[scope]({"none": np.zeros((5, 0)), "w": np.ones((2, 4))}, 0.5)
    assert empty["none"].shape == (5, 0)
    assert empty["w"].sum() == 4
