"""What is published of a master: what stays, where masks end, and when pruning follows learning."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from prunecast.client.training.encoding import compress_reply
from prunecast.compression.versions import (
    PublishedModel,
    QuantisedTensor,
    RawTensor,
    UpdateRule,
    decode_model,
    is_large,
    rounded_floats,
    short,
)
from prunecast.server.federation import Policy, PolicyError
from prunecast.server.federation.publishing.lattices import Lattices
from prunecast.server.federation.publishing.masks.progress import (
    Measurements,
    Progress,
    measured_in,
)
from prunecast.server.federation.publishing.publisher import Publisher

LARGE_ONE = (256, 256)


def drifting(count, seed=0, size=(64, 50), by=0.05):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=size).astype(np.float32)
    for _ in range(count):
        yield {"w": weight}
        weight = (weight + by * rng.normal(size=size)).astype(np.float32)


def changes(policy, masters):
    publisher = Publisher(policy, b"s", policy.pruning())
    models = [publisher.publish(master).model for master in masters]
    return [int(np.count_nonzero(a["w"].q != b["w"].q)) for a, b in pairwise(models)], models


def flips(models):
    """Places of which the masks of one version and the next differ."""
    return sum(np.count_nonzero((a["w"].q != 0) != (b["w"].q != 0)) for a, b in pairwise(models))


def test_an_integer_stays_until_the_master_is_far_from_it():
    policy = Policy(down_step=0.4, hysteresis=0.75)
    found, models = changes(policy, drifting(12, size=LARGE_ONE))
    plain, _ = changes(Policy(down_step=0.4, hysteresis=0.5), drifting(12, size=LARGE_ONE))
    assert sum(found) < 0.8 * sum(plain)
    for model, master in zip(models, drifting(12, size=LARGE_ONE), strict=True):
        tensor = model["w"]
        away = np.abs(master["w"] / np.float64(tensor.step) - tensor.q)
        assert away.max() <= 0.75 + 1e-6  # nothing that was published is further away
    assert (away > 0.5).any()


def test_what_stays_is_carried_to_a_finer_or_coarser_lattice():
    policy = Policy(down_step=0.4, hysteresis=0.75)
    lattices = Lattices(policy)
    (master,) = drifting(1)
    last = lattices.tensor("w", master["w"], None, None)
    for scale in (0.2, 5.0):  # the step follows the spread by powers of two
        array = (master["w"] * np.float32(scale)).astype(np.float32)
        tensor = lattices.tensor("w", array, None, last)
        assert np.log2(tensor.step / last.step) % 1 == 0
        assert tensor.step != last.step
        assert np.abs(array / np.float64(tensor.step) - tensor.q).max() <= 0.75 + 1e-6
    shorter = lattices.tensor("w", master["w"][:9], None, last)
    assert shorter.shape == (9, 50)


def test_a_mask_that_is_aligned_ends_where_cells_end_and_comes_back_beyond_them():
    knobs = {"down_step": 0.3, "hysteresis": 0.75, "pruning_begin": 0, "pruning_end": 3}
    policy = Policy(sparsity=0.8, pruning_min_size=1, **knobs)
    _, models = changes(policy, drifting(8, size=LARGE_ONE))
    for before, model in pairwise(models[2:]):
        tensor = model["w"]
        cells = int(np.abs(tensor.q[tensor.q != 0]).min()) - 1
        assert cells >= 1
        assert tensor.pruned
        assert model.sparsity() == pytest.approx(0.8, abs=0.1)
        came_back = (before["w"].q == 0) & (tensor.q != 0)
        assert (np.abs(tensor.q[came_back]) > cells).all()
    apart = Policy(sparsity=0.8, pruning_align=False, pruning_min_size=1, **knobs)
    _, others = changes(apart, drifting(8, size=LARGE_ONE))
    assert flips(models[4:]) < flips(others[4:])


@pytest.mark.parametrize("step", [0.1, 0.4, 0.8, 2.0])
@pytest.mark.parametrize(
    "weights",
    [
        lambda rng: rng.normal(size=LARGE_ONE),
        lambda rng: rng.laplace(size=LARGE_ONE),
        lambda rng: rng.uniform(-1, 1, size=LARGE_ONE),
        lambda rng: rng.choice([-1.0, 1.0], size=LARGE_ONE),  # of one size
        lambda rng: rng.integers(-2, 3, size=LARGE_ONE) + 1e-4 * rng.normal(size=LARGE_ONE),
    ],
    ids=["normal", "laplace", "uniform", "signs", "few cells"],
)
def test_a_finished_mask_keeps_about_as_many_weights_as_wanted(weights, step):
    policy = Policy(sparsity=0.8, down_step=step, pruning_begin=1, pruning_end=3)
    publisher = Publisher(policy, b"s", policy.pruning())
    master = {"w": weights(np.random.default_rng(0)).astype(np.float32)}
    for _ in range(5):
        model = publisher.publish(master).model
    # a lattice as coarse as the weights has fewer that are not zero
    most = np.count_nonzero(np.rint(master["w"] / np.float64(model["w"].step)))
    wanted = min(0.2 * master["w"].size, most)
    assert wanted / 1.51 <= np.count_nonzero(model["w"].q) <= 1.51 * wanted


def test_small_tensors_are_pruned_to_the_weight_and_follow_their_master_more_closely():
    policy = Policy(sparsity=0.8, pruning_begin=0, pruning_end=3, pruning_min_size=1)
    _, models = changes(policy, drifting(8))
    assert models[-1].sparsity() == pytest.approx(0.8, abs=0.001)
    for size, most in (((64, 50), 0.6), (LARGE_ONE, 0.75)):
        _, models = changes(Policy(), drifting(8, size=size))
        away = [
            np.abs(master["w"] / np.float64(model["w"].step) - model["w"].q).max()
            for model, master in zip(models, drifting(8, size=size), strict=True)
        ]
        assert max(away) == pytest.approx(most, abs=0.02)


def test_a_model_that_is_fine_tuned_has_a_finer_lattice():
    scratch, tuned = (changes(Policy(), drifting(6, by=by))[1] for by in (0.3, 0.01))
    assert scratch[0]["w"].step == tuned[0]["w"].step == scratch[-1]["w"].step
    assert tuned[1]["w"].step == tuned[-1]["w"].step == scratch[0]["w"].step / 8


VAST_ONE = (512, 512)


def steps_of_drawn(policy, rounds, size=VAST_ONE):
    """Steps and sparsities of a model that is drawn, learns, and settles."""
    (like,) = drifting(1, size=size)
    publisher = Publisher(policy, b"s", policy.pruning())
    publisher.expect(rounds)
    drawn = publisher.draw(like, 7)
    assert drawn["w"].std() == pytest.approx(like["w"].std(), rel=0.04)
    version = publisher.publish(drawn)
    assert len(publisher.payload(version, None).data) < 200  # its seed
    rng, weight, models = np.random.default_rng(1), drawn["w"], [version.model]
    for number in range(2, rounds + 1):
        by = max(0.6 * 0.7**number, 0.005)
        weight = (weight + by * rng.normal(size=size) * like["w"].std()).astype(np.float32)
        models.append(publisher.publish({"w": weight}).model)
    return [m["w"].step for m in models], [m.sparsity() for m in models], publisher


def test_a_drawn_model_begins_on_a_coarse_lattice_that_is_refined_once_it_is_pruned():
    steps, sparsities, publisher = steps_of_drawn(Policy.preset("small", sparsity=0.9), 20)
    refined = next(i for i, step in enumerate(steps) if step < steps[0])
    assert steps[refined] == steps[-1] == steps[0] / 2
    assert sparsities[refined - 1] == pytest.approx(0.9, abs=0.06)
    assert sparsities[1] == sparsities[2] == 0
    resumed = Publisher(Policy.preset("small"), b"s", Policy.preset("small").pruning())
    resumed.resume(*publisher.position)
    assert resumed.pruner.fineness == (1.0, False)
    steps, _, _ = steps_of_drawn(Policy(), 20)  # nothing is pruned: when it has settled
    assert steps[-1] == steps[0] / 2
    assert steps[1] == steps[0]
    steps, _, _ = steps_of_drawn(Policy.preset("small"), 20, size=(256, 256))
    assert steps[-1] == steps[0] == pytest.approx(0.4, rel=0.01)
    by_taylor = Policy.preset("small", pruning_criterion="taylor")
    assert steps_of_drawn(by_taylor, 20)[0][0] == pytest.approx(0.1, rel=0.05)


def test_tensors_are_large_by_their_weights_and_those_of_their_model():
    assert is_large(65_536, of=65_536)
    assert not is_large(65_535, of=131_071)
    assert is_large(32_768, of=131_072)
    assert not is_large(32_767, of=10**9)


@pytest.mark.parametrize(
    ("weights", "size", "step"),
    [(1 << 17, (256, 128), 0.8), (1 << 17, (256, 127), 0.4), ((1 << 17) - 1, (256, 128), 0.4)],
    ids=["large of a large model", "small tensor", "small model"],
)
def test_only_large_tensors_of_large_models_begin_coarse(weights, size, step):
    lattices = Lattices(Policy())
    lattices.weights = weights
    lattices.refine(1.0, early=True)
    (master,) = drifting(1, size=size)
    tensor = lattices.tensor("w", master["w"], None, None)
    assert tensor.step == pytest.approx(step * master["w"].std(), rel=1e-3)


def test_what_is_no_model_and_low_rank_factors_lie_on_a_fine_lattice():
    (master,) = drifting(1)
    spread = master["w"].std()
    control = Publisher(Policy(), b"s").publish(master).model
    assert control["w"].step == pytest.approx(0.05 * spread, rel=1e-3)
    rng = np.random.default_rng(2)
    adapter = {"q.lora_A": rng.normal(size=(4, 64)), "q.lora_B": rng.normal(size=(64, 4))}
    policy = Policy()
    model = Publisher(policy, b"s", policy.pruning()).publish({**adapter, **master}).model
    for name in adapter:
        assert model[name].step == pytest.approx(0.05 * adapter[name].std(), rel=1e-3)
    assert model["w"].step == pytest.approx(0.4 * spread, rel=1e-3)


def test_criteria_that_do_not_rank_by_size_are_not_aligned():
    policy = Policy(
        sparsity=0.5, pruning_align=True, pruning_criterion="taylor", pruning_begin=0,
        pruning_end=1, pruning_min_size=1,
    )  # fmt: skip
    _, models = changes(policy, drifting(4))
    assert models[-1].sparsity() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("size", "others", "floor"),
    [((64, 50), 0, 0.25), ((64, 50), 1 << 16, 1.0), (LARGE_ONE, 0, 2.0)],
)
def test_a_step_of_an_update_has_a_floor_and_what_it_drops_is_sent_later(size, others, floor):
    policy = Policy(down_step=0.4, up_floor=2.0)
    (master,) = drifting(1, size=size)
    if others:
        master["others"] = np.zeros(others, np.float32)
    base = Publisher(policy, b"s", policy.pruning()).publish(master).model
    assert isinstance(base, PublishedModel)
    rng = np.random.default_rng(1)
    residual = {}
    total, sent = 0.0, 0.0
    for _ in range(30):
        change = (0.05 * base["w"].step * rng.normal(size=size) + 0.02).astype(np.float32)
        trained = {**base.arrays(), "w": base["w"].dense() + change}
        coded = compress_reply(base, trained, residual, policy.update_rule)
        residual, total = coded.dropped, total + (trained["w"] - base["w"].dense())
        found = coded.changes.get("w")
        if isinstance(found, QuantisedTensor):
            assert 1 <= found.step / (floor * base["w"].step) <= 17 / 16
            sent = sent + found.z * np.float32(found.step)
    np.testing.assert_allclose(sent + residual["w"], total, atol=1e-3)
    assert np.any(sent)
    dropping = Policy(down_step=0.4, up_floor=2.0, error_feedback=False).update_rule
    lost = compress_reply(base, trained, {}, dropping)
    assert lost.changes["w"].step < floor * base["w"].step  # or it would never arrive
    without = compress_reply(base, trained, {}, UpdateRule(3.0, 0.6))
    assert without.changes["w"].step < floor * base["w"].step


def test_updates_of_a_small_model_are_finer_unless_nothing_makes_up_for_what_is_dropped():
    rule = UpdateRule(3.0, 0.7, floor=2.0, statistics_bits=6)
    fine = rule.in_model((1 << 16) - 1)
    assert (fine.step, fine.dead_zone, fine.floor) == pytest.approx((2.4, 0.6, 0.5))
    assert fine.statistics_bits == 6
    assert rule.in_model(1 << 16) == rule
    without = UpdateRule(3.0, 0.7, error_feedback=False, floor=2.0)
    assert without.in_model(1000) == without
    assert UpdateRule(0.0).in_model(1000).step == 0.0  # exact stays exact


@pytest.mark.parametrize(
    ("knob", "value"), [("hysteresis", 0.4), ("hysteresis", 1.1), ("vector_step", 0.0),
                        ("up_floor", -1.0), ("pruning_tolerance", -0.1)]
)  # fmt: skip
def test_knobs_outside_their_range_are_named(knob, value):
    with pytest.raises(PolicyError, match=knob):
        Policy(**{knob: value})


# -- running statistics ----------------------------------------------------------------------------


def batch_norm(seed, by=0.05, size=464, count=1):
    """Masters whose statistics move by 5 %, as they do from round to round."""
    rng = np.random.default_rng(seed)
    mean, var = rng.normal(size=size), np.exp(rng.normal(size=size))
    for _ in range(count):
        yield {
            "0.running_mean": mean.astype("f4"),
            "0.running_var": var.astype("f4"),
            "1.running_var": np.ones(1, "f4") * np.float32(0.3),
            "0.num_batches_tracked": np.array(3),
        }
        mean = mean * (1 + by * rng.normal(size=size))
        var = var * (1 + by * rng.normal(size=size))


def test_statistics_are_published_in_a_few_bits_and_stay_while_near():
    policy = Policy(hysteresis=0.75)
    publisher = Publisher(policy, b"s")
    last = {}
    for master in batch_norm(1, by=0.01, count=4):
        version = publisher.publish(master)
        sent = version.model.arrays()
        assert version.master["0.running_var"].tobytes() == master["0.running_var"].tobytes()
        for name in ("0.running_mean", "0.running_var"):
            assert (sent[name].view("u4") & ((1 << 17) - 1) == 0).all()
            expected = rounded_floats(master[name], 6, last=last.get(name), hysteresis=0.75)
            assert sent[name].tobytes() == expected.tobytes()
            np.testing.assert_allclose(sent[name], master[name], rtol=0.75 / 64 * 1.001)
        for name in ("1.running_var", "0.num_batches_tracked"):
            assert sent[name].tobytes() == master[name].tobytes()
        last = sent


@pytest.mark.parametrize(
    ("policy", "exact"),
    [
        (Policy(statistics_bits=0), {"0.running_mean", "0.running_var"}),
        (Policy.preset("lossless"), {"0.running_mean", "0.running_var"}),
        (Policy(lossless=("*running_var",)), {"0.running_var"}),
        (Policy(lossless=()), set()),
    ],
    ids=["0 bits", "lossless", "named", "none named"],
)
def test_statistics_travel_exactly_where_the_policy_says_so(policy, exact):
    (master,) = batch_norm(2)
    sent = Publisher(policy, b"s").publish(master).model
    for name in ("0.running_mean", "0.running_var"):
        assert isinstance(sent[name], RawTensor)  # never on a lattice
        same = sent[name].values.tobytes() == master[name].tobytes()
        assert same == (name in exact), name


def test_statistics_that_are_not_finite_are_published_and_no_sign_of_divergence():
    (master,) = batch_norm(3)
    publisher = Publisher(Policy(hysteresis=1.0), b"s")
    for odd in ([np.inf, -0.0, np.nan], [1.0, np.inf, 0.0], [np.nan, 2.0, np.inf]):
        master["0.running_var"][:3] = odd
        sent = publisher.publish(master).model.arrays()["0.running_var"]
        assert sent[:3].tobytes() == np.array(odd, "f4").tobytes()


def test_a_delta_of_statistics_takes_a_quarter_of_the_bytes():
    """928 values that moved by 5 %: 2.5 kB exactly; nodes get the bits that were published."""
    sizes = []
    for bits in (0, 6):
        publisher = Publisher(Policy(statistics_bits=bits), b"s")
        first, second = (publisher.publish(master) for master in batch_norm(4, count=2))
        payload = publisher.payload(second, short(first.model.digest)).data
        sizes.append(len(payload))
        got = decode_model(payload, held=first.model, stream=b"s")
        assert got.digest == second.model.digest
    assert sizes[1] < 700 < 2400 < sizes[0]


def test_nodes_are_told_the_bits_unless_models_are_exact():
    assert Policy().update_rule.statistics_bits == 6
    assert Policy(statistics_bits=9).update_rule.statistics_bits == 9
    assert Policy.preset("lossless").update_rule.statistics_bits == 0
    assert Policy(down_step=0.0).update_rule.statistics_bits == 0


# -- progress --------------------------------------------------------------------------------------


def clocks(progress, masters):
    found = []
    for number, master in enumerate(masters, start=1):
        progress.observe({"w": master["w"].reshape(40, 25)})
        found.append(progress.clock(number))
    return found


def steady(peak, rounds):
    rng = np.random.default_rng(3)
    weight = rng.normal(size=1000)
    for pace in [peak, *rounds]:
        yield {"w": weight.astype(np.float32)}
        weight = weight + pace * rng.normal(size=1000) * np.linalg.norm(weight) / 1000**0.5
        weight *= 30 / np.linalg.norm(weight)


def test_pruning_waits_for_learning_and_is_over_by_its_end():
    fast = [0.3] * 6 + [0.25, 0.2, 0.14, 0.1, 0.07, 0.05, 0.04, 0.03, 0.02] + [0.01] * 8
    found = clocks(Progress(2, 20), steady(0.3, fast))
    began = next(i for i, clock in enumerate(found) if clock > 2)
    assert 8 <= began <= 11  # after the change fell to half of its peak
    assert found == sorted(found)
    assert found[-1] == 20
    over = next(i for i, clock in enumerate(found) if clock == 20)
    assert over - began >= 5  # not at once


def test_a_model_that_never_settles_is_pruned_in_time_and_none_before_its_beginning():
    found = clocks(Progress(2, 20), steady(0.3, [0.3] * 25))
    assert found[12] == 2 < found[13]
    assert found[19] == 20
    settled = clocks(Progress(8, 20), steady(0.3, [0.01] * 25))
    assert settled[7] == 8
    assert settled[8] > 8


FOLLOWING = {"pruning_begin": 2, "pruning_min_size": 1}


def sparsities(publisher, masters, losses=()):
    found = []
    for number, master in enumerate(masters):
        if number and losses:
            publisher.pruner.measured.add(losses[number - 1], held_out=True)
        found.append(publisher.publish({"w": master["w"].reshape(40, 25)}).model.sparsity())
    return found


def test_the_schedule_of_a_publisher_follows_progress_within_bounds_of_the_rounds():
    policy = Policy(sparsity=0.8, **FOLLOWING)
    publisher = Publisher(policy, b"s", policy.pruning())
    publisher.expect(18)
    found = sparsities(publisher, steady(0.3, [0.3] * 4 + [0.1] * 14))
    assert found[:5] == [0.0] * 5
    assert found == sorted(found)
    assert found[-1] == pytest.approx(0.8, abs=0.01)
    late = Publisher(policy, b"s", policy.pruning())  # never settles: over by 0.7 of the rounds
    late.expect(18)
    found = sparsities(late, steady(0.3, [0.3] * 18))
    assert found[5] == 0.0 < found[6]
    assert found[11] == pytest.approx(0.8, abs=0.01)


def test_what_follows_progress_goes_on_after_a_resume():
    policy = Policy(sparsity=0.8, **FOLLOWING)
    masters = list(steady(0.3, [0.3] * 2 + [0.12] * 14))
    whole, first = (Publisher(policy, b"s", policy.pruning()) for _ in range(2))
    expected = sparsities(whole, masters)
    sparsities(first, masters[:7])
    second = Publisher(policy, b"s", policy.pruning())
    second.resume(*first.position)
    # the change of the round in between is not known: it stands still for one
    found = sparsities(second, masters[6:])
    assert found[0] == expected[6]
    assert found[0] > 0
    assert found[-1] == expected[-1]


def test_automatic_pruning_stands_still_and_goes_back_while_the_loss_is_too_high():
    masters = list(steady(0.3, [0.3] * 2 + [0.04] * 23))
    losses = [2.0, 1.0, 0.5, 0.4] + [0.4] * 6 + [0.46] * 4 + [0.44] * 20
    policy = Policy(
        pruning_schedule="automatic",
        pruning_metric="loss",
        pruning_tolerance=0.05,
        pruning_patience=5,
        **FOLLOWING,
    )
    found = sparsities(Publisher(policy, b"s", policy.pruning()), masters, losses)
    assert found == sorted(found)
    assert not any(found[:8])  # the loss still falls by more than that
    assert 0 < found[9] == found[15] < found[16]
    assert found[-1] > 0.9
    spent = sparsities(Publisher(policy, b"s", policy.pruning()), masters, [0.4] * 10 + [0.5] * 20)
    assert 0 < spent[9] == spent[14] > spent[15] > 0  # its patience is over
    assert spent[15:] == sorted(spent[15:], reverse=True)
    assert spent[-1] < spent[15]  # lower levels do not hold, either


def test_losses_that_were_measured_on_held_out_examples_count_alone():
    losses = Measurements()
    losses.add(1.0, 10, held_out=False)
    losses.add(2.0, 30, held_out=False)
    for nothing in (float("nan"), float("inf")):
        losses.add(nothing, held_out=False)
    losses.add(9.0, 0, held_out=True)
    assert losses.take() == 1.75
    assert losses.take() is None
    losses.add(1.0, held_out=False)
    losses.add(0.5, held_out=True)
    assert losses.take() == 0.5
    assert measured_in(
        {"train-loss": 1, "Eval_Loss": 2.5, "accuracy": 0.5, "loss": [1.0]}, "loss"
    ) == [
        1,
        2.5,
    ]


def test_what_would_make_a_sum_infinite_is_passed_over():
    losses = Measurements()
    losses.add(1e308, 10, held_out=False)  # 1e309
    losses.add(1e308, held_out=False)
    losses.add(1e308, held_out=False)
    losses.add(1.0, 1e308, held_out=True)
    losses.add(1.0, 1e308, held_out=True)
    assert losses.position == (1e308, 1e308, 1e308, 1.0)
    Measurements().resume(losses.position)
    assert losses.take() == 1.0


@pytest.mark.parametrize(("rounds", "bounds"), [(0, (2, 25)), (50, (2, 35)), (16, (2, 11)),
                                                (8, (2, 5)), (7, (0, 0)), (3, (0, 0))])  # fmt: skip
def test_bounds_follow_from_the_number_of_rounds(rounds, bounds):
    assert Policy.preset("small").bounds(rounds) == bounds
    assert Policy.preset("small", pruning_end=9).bounds(rounds) == (2, 9)


def test_a_search_within_fixed_bounds_begins_after_the_one_and_tries_no_more_at_the_other():
    policy = Policy(
        pruning_schedule="automatic", pruning_begin=2, pruning_end=6, pruning_min_size=1,
        pruning_patience=1,
    )  # fmt: skip
    publisher = Publisher(policy, b"s", policy.pruning())
    found = sparsities(publisher, steady(0.3, [0.3] * 11), [0.9] * 11)
    assert found[:2] == [0, 0]
    assert found == pytest.approx([0, 0, 0.5, 0.75, 0.875, *[0.875] * 7], abs=0.03)
