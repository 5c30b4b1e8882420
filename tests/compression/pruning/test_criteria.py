"""Criteria: each ranks as its source says, and has some ranking before it knows what it needs."""

from dataclasses import replace

import numpy as np
import pytest

from prunecast.compression.pruning.criteria import CRITERIA, Criterion, Knowledge

KNOWN = Knowledge({"w": np.array([[3.0, -4.0], [1.0, 1.0], [0.0, -6.0]])})


def scores(name, known=KNOWN):
    return CRITERIA[name].scores(known)["w"]


def conv(channels, seed=0):
    return np.random.default_rng(seed).normal(size=channels)


def test_l2_is_the_norm_of_an_output_channel_per_weight():
    rows = np.sqrt([12.5, 1.0, 18.0])
    np.testing.assert_allclose(scores("l2"), np.repeat(rows[:, None], 2, 1))
    kernel = conv((4, 3, 5, 5))
    found = CRITERIA["l2"].scores(Knowledge({"w": kernel}))["w"]
    norms = np.linalg.norm(kernel.reshape(4, -1), axis=1) / np.sqrt(75)
    np.testing.assert_allclose(found, np.broadcast_to(norms[:, None, None, None], kernel.shape))


def normalised(*names, width=4, scale=1.0):
    """A model in the order of its names: convolutions, and BatchNorm where a name ends in "bn"."""
    model = {}
    for at, name in enumerate(names):
        if "bn" not in name:
            model[f"{name}.weight"] = conv((width, width, 3, 3), at)
            continue
        model[f"{name}.weight"] = scale * (at + np.arange(1.0, width + 1)) * (-1) ** at
        model[f"{name}.bias"] = np.zeros(width)
        model[f"{name}.running_mean"] = np.zeros(width)
        model[f"{name}.running_var"] = np.ones(width)
    weights = {name: array for name, array in model.items() if array.ndim > 1}
    return Knowledge(weights, model=model)


@pytest.mark.parametrize(
    ("names", "follows"),
    [
        (["a", "bn_a", "b", "bn_b"], {"a": 1, "b": 3}),
        (["b.conv1", "b.conv2", "b.bn1", "b.bn2"], {"b.conv1": 2, "b.conv2": 3}),
        (["x.0", "x.1bn", "x.3", "x.4bn"], {"x.0": 1, "x.3": 3}),
    ],
)  # fmt: skip
def test_batch_norm_scales_are_those_of_the_layer_before(names, follows):
    known = normalised(*names)
    found = CRITERIA["batch-norm"].scores(known)
    for name, at in follows.items():
        scale = at + np.arange(1.0, 5.0)
        expected = np.broadcast_to(scale[:, None, None, None], (4, 4, 3, 3))
        np.testing.assert_array_equal(found[f"{name}.weight"], expected)


def test_batch_norm_ranks_what_none_follows_by_l2_on_the_scale_of_the_others():
    known = normalised("a", "bn_a", "head", scale=100.0)
    found = CRITERIA["batch-norm"].scores(known)["head.weight"]
    sizes = CRITERIA["l2"].scores(known)["head.weight"]
    assert np.ptp(found / sizes) == pytest.approx(0, abs=1e-9)
    scale = known.model["bn_a.weight"]
    assert np.sqrt(np.square(found).mean()) == pytest.approx(np.sqrt(np.square(scale).mean()))
    # of no BatchNorm at all: by size alone, and a GroupNorm is none
    bare = Knowledge(known.weights, model={n: a for n, a in known.model.items() if "run" not in n})
    alone, by_size = (CRITERIA[c].scores(bare) for c in ("batch-norm", "l2"))
    assert all(np.array_equal(alone[name], by_size[name]) for name in by_size)


def test_activations_multiply_magnitudes_by_input_channel():
    known = replace(KNOWN, statistics={"activation": {"w": np.array([[2.0, 0.5]])}})
    assert scores("activation", known).tolist() == [[6.0, 2.0], [2.0, 0.5], [0.0, 3.0]]
    kernel = {"w": np.ones((2, 2, 3, 3))}
    sizes = {"activation": {"w": np.array([1.0, 4.0]).reshape(1, 2, 1, 1)}}
    found = CRITERIA["activation"].scores(Knowledge(kernel, statistics=sizes))["w"]
    assert found.shape == (2, 2, 3, 3)
    assert np.unique(found[:, 1]).tolist() == [4.0]
    assert scores("activation").tolist() == np.abs(KNOWN.weights["w"]).tolist()


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_snip_ranks_tensors_of_float16_that_nobody_measured(size):
    """However far sensitivities are from the weights of the others."""
    weights = {name: conv((4, 3), at).astype(np.float16) for at, name in enumerate("wv")}
    measured = {"sensitivity": {"w": (size * conv((4, 3))).astype(np.float32)}}
    found = CRITERIA["snip"].scores(Knowledge(weights, statistics=measured))["v"].ravel()
    assert np.argsort(found).tolist() == np.argsort(np.abs(weights["v"]).ravel()).tolist()
    assert len(set(found.tolist())) == len(set(np.abs(weights["v"]).ravel().tolist()))


def test_snip_ranks_by_what_nodes_measured_and_not_by_todays_weights():
    measured = {"sensitivity": {"w": np.array([[-5.0, 1.0], [2.0, -3.0], [0.0, 0.5]])}}
    known = replace(KNOWN, statistics=measured)
    assert scores("snip", known).tolist() == np.abs(measured["sensitivity"]["w"]).tolist()
    later = replace(known, weights={"w": KNOWN.weights["w"] * [[9.0, 0.1]]})
    assert scores("snip", later).tolist() == scores("snip", known).tolist()
    assert scores("snip").tolist() == np.abs(KNOWN.weights["w"]).tolist()
    two = replace(known, weights={**KNOWN.weights, "v": np.array([1.0, -2.0])})
    other = CRITERIA["snip"].scores(two)["v"]
    ratio = np.linalg.norm(measured["sensitivity"]["w"]) / np.linalg.norm(KNOWN.weights["w"])
    assert other == pytest.approx([ratio, 2 * ratio])


def test_movement_adds_up_over_versions():
    movement = CRITERIA["movement"]
    assert movement.uses_update
    weights, sums = {"w": np.array([1.0, -1.0, 2.0, 0.5])}, {"w": np.zeros(4)}
    for step in ([0.1, 0.1, 0.0, -0.1], [0.1, 0.1, 0.0, -0.1]):
        moved = {"w": weights["w"] + step}
        parts = movement.accumulates(Knowledge(moved, {"w": np.array(step)}))
        np.testing.assert_allclose(parts["w"], weights["w"] * step)
        sums, weights = {"w": sums["w"] + parts["w"]}, moved
    found = movement.scores(Knowledge(weights, accumulated=sums))["w"]
    # away from zero, towards it (twice, the larger one more), and not at all
    assert np.argsort(found).tolist() == [1, 3, 2, 0]
    np.testing.assert_allclose(found, sums["w"] - sums["w"].min())
    assert found.min() == 0
    for nothing in ({}, {"w": np.zeros(4)}):
        assert movement.scores(Knowledge(weights, accumulated=nothing))["w"].tolist() == [
            *np.abs(weights["w"])
        ]


def test_chance_depends_on_seed_and_name_alone():
    one = CRITERIA["random"].scores(KNOWN)["w"]
    moved = Knowledge({"v": np.ones(5), "w": KNOWN.weights["w"] * 3})
    assert CRITERIA["random"].scores(moved)["w"].tolist() == one.tolist()
    assert scores("random", replace(KNOWN, seed=1)).tolist() != one.tolist()
    alike = CRITERIA["random"].scores(Knowledge({"a": np.ones(9), "b": np.ones(9)}))
    assert alike["a"].tolist() != alike["b"].tolist()


def test_a_criterion_asks_for_what_its_name_says():
    asked = {name: criterion.statistics for name, criterion in CRITERIA.items()}
    assert {name: found for name, found in asked.items() if found} == {
        "fisher": ("gradient",),
        "snip": ("sensitivity",),
        "activation": ("activation",),
    }
    assert [name for name, criterion in CRITERIA.items() if criterion.once] == ["snip"]
    assert not Criterion(lambda known: known.weights).once
