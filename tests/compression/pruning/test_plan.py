"""Plans: masks of any criterion, the schedules, what is prunable."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunecast.compression.pruning.allocation import ALLOCATIONS
from prunecast.compression.pruning.criteria import CRITERIA, Knowledge
from prunecast.compression.pruning.plan import (
    ChannelSchedule,
    PlanError,
    PruningPlan,
    low_rank_factors,
    tied_weights,
)
from prunecast.compression.pruning.schedules import (
    SCHEDULES,
    CubicSchedule,
    LayerSchedule,
    StaticSchedule,
)

WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(max_dims=3, max_side=12),
    elements=st.floats(-4, 4, width=32),
)


def leave_one_each(*tensors, sparsity):
    """Whether a sparsity leaves as many weights as there are tensors."""
    size = sum(tensor.size for tensor in tensors)
    return size - int(sparsity * size) >= len(tensors)


def magnitude_masks(weights, sparsity, *, scope="layer"):
    return ALLOCATIONS[scope](CRITERIA["magnitude"].scores(Knowledge(weights)), sparsity)


@given(WEIGHTS, st.floats(0, 0.99))
def test_exact_number_removed_and_kept_are_the_largest(weights, sparsity):
    mask = magnitude_masks({"w": weights}, sparsity)["w"]
    assert mask.shape == weights.shape
    assert np.count_nonzero(~mask) == int(sparsity * weights.size)
    if mask.any() and not mask.all():
        assert np.abs(weights[mask]).min() >= np.abs(weights[~mask]).max()


@given(WEIGHTS, WEIGHTS, st.floats(0, 0.99))
def test_global_scope_ranks_all_tensors_together(first, second, sparsity):
    assume(leave_one_each(first, second, sparsity=sparsity))
    masks = magnitude_masks({"a": first, "b": second}, sparsity, scope="global")
    removed = sum(int(np.count_nonzero(~m)) for m in masks.values())
    assert removed == int(sparsity * (first.size + second.size))
    ranked = {"a": masks["a"].copy(), "b": masks["b"].copy()}
    for name, tensor in (("a", first), ("b", second)):
        assert masks[name].ravel()[np.abs(tensor).argmax()]  # the highest stays whatever it is
        ranked[name].ravel()[np.abs(tensor).argmax()] = False
    kept = np.concatenate([np.abs(first)[ranked["a"]], np.abs(second)[ranked["b"]]])
    gone = np.concatenate([np.abs(first)[~masks["a"]], np.abs(second)[~masks["b"]]])
    if kept.size and gone.size:
        assert kept.min() >= gone.max()


@given(WEIGHTS, WEIGHTS, st.floats(0, 0.99))
def test_layer_adaptive_scores_are_those_of_the_paper(first, second, sparsity):
    def lamp(weights):  # equation 4, one weight after the other
        squares = np.sort(np.square(weights.ravel().astype(np.float64)))[::-1]
        return [squares[i] / max(squares[: i + 1].sum(), 1e-300) for i in range(squares.size)]

    assume(first.any() and second.any())  # nothing ranks zeros, of which one stays
    assume(leave_one_each(first, second, sparsity=sparsity))
    masks = magnitude_masks({"a": first, "b": second}, sparsity, scope="lamp")
    scores = np.sort(lamp(first) + lamp(second))
    removed = int(sparsity * scores.size)
    assert removed == sum(int(np.count_nonzero(~mask)) for mask in masks.values())
    kept = []
    for name, weights in (("a", first), ("b", second)):
        mask, size = masks[name], np.abs(weights)
        kept += lamp(weights)[: np.count_nonzero(mask)]
        if mask.any() and not mask.all():  # within a tensor the largest stay
            assert size[mask].min() >= size[~mask].max()
    np.testing.assert_allclose(np.sort(kept), scores[removed:], rtol=1e-9, atol=1e-300)


def test_layer_adaptive_scores_do_not_depend_on_a_tensors_scale():
    rng = np.random.default_rng(0)
    small, other = (rng.normal(size=(40, 50)).astype(np.float32) for _ in range(2))
    masks = [
        magnitude_masks({"a": small * np.float32(by), "b": other}, 0.9, scope="lamp")
        for by in (1, 2.0**-90, 2.0**90)
    ]
    for mask in masks[1:]:
        np.testing.assert_array_equal(mask["a"], masks[0]["a"])
    spared = magnitude_masks({"a": small * np.float32(2.0**-90), "b": other}, 0.9, scope="global")
    assert np.flatnonzero(spared["a"]).tolist() == [np.abs(small).argmax()]
    assert np.count_nonzero(spared["b"]) == 399


def test_ties_are_broken_by_position():
    mask = magnitude_masks({"w": np.ones(10, np.float32)}, 0.3)["w"]
    assert mask.tolist() == [True] * 7 + [False] * 3


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("scope", ALLOCATIONS)
def test_impossible_sparsity_is_refused(sparsity, scope):
    with pytest.raises(ValueError, match="sparsity"):
        magnitude_masks({"w": np.ones(3, np.float32)}, sparsity, scope=scope)


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


@pytest.mark.parametrize("scope", ALLOCATIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("informed", [False, True])
def test_every_plan_prunes_as_much_as_it_says(criterion, schedule, scope, informed):
    """Also of float16, of zeros and of nothing, and before anything is known but the weights."""
    rng = np.random.default_rng(5)
    weights = {
        "a": rng.normal(size=(20, 30)).astype(np.float16),
        "b": np.zeros((7, 9), np.float32),
        "c": rng.normal(size=(5, 0)),
    }
    known = Knowledge(weights)
    if informed:
        other = {n: rng.normal(size=w.shape).astype(np.float32) for n, w in weights.items()}
        statistics = dict.fromkeys(CRITERIA[criterion].statistics, other)
        known = Knowledge(weights, other, statistics)
    plan = PruningPlan(
        SCHEDULES[schedule](0.8, 1, 6), CRITERIA[criterion], ALLOCATIONS[scope], min_size=0
    )
    first = plan.masks(1, known)
    assert first == {} if schedule != "static" else list(first) == list(weights)
    for version in (2, 6, 7) if schedule != "layer-by-layer" else (6, 7):
        masks = plan.masks(version, known)
        assert {n: m.shape for n, m in masks.items()} == {n: w.shape for n, w in weights.items()}
        removed = sum(int(np.count_nonzero(~m)) for m in masks.values())
        assert removed == pytest.approx(plan.schedule(version) * 663, abs=2)
        again = plan.masks(version, known)
        assert all(np.array_equal(mask, again[name]) for name, mask in masks.items())


def test_taylor_keeps_what_the_update_needed_and_falls_back_on_magnitude():
    taylor = CRITERIA["taylor"]
    assert taylor.uses_update
    weights = {"w": np.array([4.0, 1.0, 2.0, 0.5])}
    moved = {"w": np.array([0.0, 3.0, -1.0, 0.0])}
    order = np.argsort(taylor.scores(Knowledge(weights, moved))["w"]).tolist()
    assert order == [3, 0, 2, 1]  # what stood still comes first, the smaller of it before
    for nothing in ({}, {"w": np.zeros(4)}):
        assert taylor.scores(Knowledge(weights, nothing))["w"].tolist() == [4.0, 1.0, 2.0, 0.5]
    two = {**weights, "v": np.ones(2)}  # of which no update is known: as much as the average
    assert taylor.scores(Knowledge(two, moved))["v"] == pytest.approx(np.sqrt([2.5, 2.5]))


def test_fisher_ranks_by_weight_and_curvature():
    weights = {"w": np.array([4.0, -1.0, 2.0])}
    sizes = {"gradient": {"w": np.array([0.1, 1.0, 0.3])}}
    found = CRITERIA["fisher"].scores(Knowledge(weights, statistics=sizes))["w"]
    assert found == pytest.approx([0.4, 1.0, 0.6])
    assert CRITERIA["fisher"].scores(Knowledge(weights))["w"].tolist() == [4.0, 1.0, 2.0]
    two = Knowledge({**weights, "v": np.ones(1)}, statistics=sizes)
    assert CRITERIA["fisher"].scores(two)["v"] == pytest.approx(np.sqrt([1.1 / 3]))


def test_what_is_prunable():
    arrays = {
        "conv": np.zeros((4, 3, 3, 3)),
        "small": np.zeros((2, 3)),
        "bias": np.zeros(500),
        "head.weight": np.zeros((20, 20)),
    }
    assert list(PruningPlan(min_size=100, exclude=("head.*",)).prunable(arrays)) == ["conv"]
    assert list(PruningPlan(min_size=0).prunable(arrays)) == ["conv", "small", "head.weight"]


def tied_model():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(40, 30)).astype(np.float32)
    return {
        "tokens.weight": table,
        "fc.weight": rng.normal(size=(40, 30)).astype(np.float32),
        "head.weight": table.copy(),
        "first.zeros": np.zeros((40, 30), np.float32),
        "second.zeros": np.zeros((40, 30), np.float32),
    }


def test_tied_weights_are_those_that_are_the_same():
    arrays = tied_model()
    assert tied_weights(arrays) == {"head.weight": "tokens.weight"}
    arrays["head.weight"][-1, -1] += 1
    assert tied_weights(arrays) == {}
    arrays["other"] = arrays["tokens.weight"].astype(np.float64)
    assert tied_weights(arrays) == {}


@pytest.mark.parametrize("scope", ALLOCATIONS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_tied_weights_get_one_mask_and_count_once(criterion, scope):
    arrays = {n: a for n, a in tied_model().items() if "zeros" not in n}
    rng = np.random.default_rng(1)
    other = {n: rng.normal(size=a.shape) for n, a in arrays.items() if n != "head.weight"}
    known = Knowledge(arrays, other, dict.fromkeys(CRITERIA[criterion].statistics, other))
    plan = PruningPlan(StaticSchedule(0.9), CRITERIA[criterion], ALLOCATIONS[scope])
    masks = plan.masks(1, known)
    assert list(masks) == list(arrays)
    np.testing.assert_array_equal(masks["head.weight"], masks["tokens.weight"])
    alone = plan.masks(1, replace(known, weights={name: arrays[name] for name in other}))
    assert all(np.array_equal(masks[name], mask) for name, mask in alone.items())
    assert sum(int((~mask).sum()) for mask in alone.values()) == 2160


def test_tied_weights_get_one_mask_where_layers_have_their_turn():
    arrays = {n: a for n, a in tied_model().items() if "zeros" not in n}
    plan = PruningPlan(LayerSchedule(0.5, 0, 3))
    assert list(plan.masks(1, Knowledge(arrays))) == ["tokens.weight", "head.weight"]
    assert list(plan.masks(2, Knowledge(arrays))) == list(arrays)


def test_tied_weights_are_not_pruned_apart():
    apart = PruningPlan(StaticSchedule(0.5), exclude=("head.*",))
    with pytest.raises(
        PlanError, match=r"apart: 'head\.weight' and 'tokens\.weight'.*exclude both or neither"
    ):
        apart.check(tied_model())
    apart.check(tied_model(), trained=False)  # layers that were only copied
    for exclude in ((), ("head.*", "tokens.*")):
        PruningPlan(StaticSchedule(0.5), exclude=exclude).check(tied_model())


def test_a_model_that_cannot_be_pruned_is_refused():
    with pytest.raises(PlanError, match=r"no tensor that may be pruned: none is .* 1024 elements"):
        PruningPlan(StaticSchedule(0.5)).check({"bias": np.ones(5000), "small": np.ones((4, 4))})
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(10, n)) for name, n in (("a", 10), ("b", 1), ("c", 10))}
    given = {"min_size": 1, "allocation": ALLOCATIONS["global"]}
    PruningPlan(StaticSchedule(0.985), **given).check(arrays)
    with pytest.raises(PlanError, match=r"0\.99 leaves 3 of 220 for 4 .* such as 'b' would vanish"):
        PruningPlan(StaticSchedule(0.99), **given).check({**arrays, "d": arrays["b"].T.copy()})
    PruningPlan(StaticSchedule(0.99), min_size=1).check(arrays)  # each tensor keeps its share


@pytest.mark.parametrize(
    ("names", "shapes", "found"),
    [
        (["q.lora_A.default.weight", "q.lora_B.default.weight"], [(8, 64), (64, 8)], True),
        (["lora_a", "lora_b"], [(64, 8), (8, 64)], True),  # by name, whatever the orientation
        (["adapter.0.weight", "x.hada_w1_a"], [(64, 64), (64, 64)], True),
        (["layer.A", "layer.B"], [(8, 64), (32, 8)], True),
        (["proj_down.weight", "proj_up.weight"], [(8, 64), (64, 8)], True),
        (["layer.U", "layer.V"], [(64, 8), (8, 64)], True),
        (["layer.A", "layer.B"], [(16, 63), (63, 16)], False),  # of no low rank
        (["layer.A", "other.B"], [(8, 64), (64, 8)], False),  # of two layers
        (["encoder.weight", "decoder.weight"], [(8, 64), (64, 8)], False),  # an autoencoder
        (["a.weight", "explorer.weight"], [(64, 8), (64, 64)], False),
    ],
)
def test_low_rank_factors_are_left_alone_unless_asked(names, shapes, found):
    arrays = {name: np.zeros(shape) for name, shape in zip(names, shapes, strict=True)}
    assert low_rank_factors({n: a.shape for n, a in arrays.items()}) == set(names if found else ())
    dense = {**arrays, "fc.weight": np.zeros((20, 20))}
    kept = PruningPlan(min_size=1).prunable(dense)
    assert list(kept) == (["fc.weight"] if found else list(dense))
    assert list(PruningPlan(min_size=1, adapters=True).prunable(dense)) == list(dense)


def test_the_smallest_numbers_of_float16_rank_at_a_second_event_too():
    ranks = np.random.default_rng(0).permutation(np.arange(1, 1025)).reshape(32, 32)
    weights = (ranks * 6e-8).astype(np.float16)  # what is not normal among them ends at 6.1e-5
    plan = PruningPlan(CubicSchedule(0.5, 1, 4))
    first = plan.masks(2, Knowledge({"w": weights}))
    second = plan.masks(9, Knowledge({"w": np.where(first["w"], weights, 0)}), first)
    assert np.array_equal(second["w"], ranks > 512)


def test_statistics_are_asked_for_while_they_decide():
    plan = PruningPlan(CubicSchedule(0.5, 2, 4), CRITERIA["fisher"])
    asked = [bool(plan.wanted(version, {})) for version in range(1, 7)]
    assert asked == [False, True, True, True, True, True]
    known = {key: {} for key in plan.criterion.statistics}
    assert [bool(plan.wanted(v, known)) for v in range(1, 7)] == [False, True, True] + [False] * 3
    assert PruningPlan(CubicSchedule(0.5, 2, 4)).wanted(3, {}) == ()


def test_what_is_asked_once_is_asked_until_it_is_known_and_only_where_pruning_comes():
    plan = PruningPlan(CubicSchedule(0.5, 3, 6), CRITERIA["snip"])
    assert [plan.wanted(version, {}) for version in (1, 2, 9)] == [("sensitivity",)] * 3
    assert plan.wanted(1, {"sensitivity": {}}) == ()
    assert PruningPlan(criterion=CRITERIA["snip"]).wanted(1, {}) == ()


def test_channels_go_in_rounds_by_the_same_factor_each_time():
    plan = PruningPlan(CubicSchedule(0.5, 6, 9), channels=ChannelSchedule(0.25, (2, 4)))
    assert [plan.channels.after(n) for n in (1, 2, 3, 4, 9)] == [1.0, 0.5, 0.5, 0.25, 0.25]
    assert [(plan.channels.after(n) < 1, plan.schedule(n + 1) > 0) for n in (1, 5, 9)] == [
        (False, False),
        (True, False),
        (True, True),
    ]
    assert (PruningPlan().channels.after(50), PruningPlan().schedule(51)) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("share", "at", "said"),
    [
        (0.0, (2,), "lies in"),
        (1.5, (2,), "lies in"),
        (0.5, (), "both a share"),
        (1.0, (2,), "both a share"),
        (0.5, (0,), "rounds of 1 or more"),
        (0.5, (4, 2), "ascending"),
        (0.5, (4, 4), "ascending"),
    ],
)
def test_a_schedule_of_channels_that_cannot_be_is_refused(share, at, said):
    with pytest.raises(PlanError, match=said):
        ChannelSchedule(share, at)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_what_is_removed_stays_so_where_kept_weights_score_zero(allocation):
    """As of inputs that are never anything else, which more and more weights get."""
    rng = np.random.default_rng(0)
    weights = {"w": np.ones((30, 30), np.float32)}
    plan = PruningPlan(
        lambda version: version, CRITERIA["fisher"], ALLOCATIONS[allocation], min_size=1
    )
    first = rng.random((30, 30)) * (rng.random((30, 30)) > 0.25)
    second = first * (rng.random((30, 30)) > 0.9)
    kept = plan.masks(0.2, Knowledge(weights, statistics={"gradient": {"w": first}}))
    later = plan.masks(0.4, Knowledge(weights, statistics={"gradient": {"w": second}}), kept)
    assert not (later["w"] & ~kept["w"]).any()
    assert int((~later["w"]).sum()) == 360
