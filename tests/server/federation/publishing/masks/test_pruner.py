"""When masks change: held between events, chosen once, rewound, and the same after a resume."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

from prunecast.compression.pruning.criteria import CRITERIA, Criterion, Knowledge
from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.statistics import pack_statistics, statistic_shape
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.server.federation import Checkpoint, Policy, PolicyError
from prunecast.server.federation.publishing.masks.mask_state import MaskState
from prunecast.server.federation.publishing.publisher import Publisher
from support.federation import initial_arrays, to_record

SMALL = {"pruning_begin": 2, "pruning_end": 8, "pruning_min_size": 100, "sparsity": 0.75}


def masters(count: int, seed: int = 3) -> Iterator[dict[str, np.ndarray]]:
    """Weights that move by more than a mask would survive if it followed them."""
    rng = np.random.default_rng(seed)
    weight, bias = rng.normal(size=(40, 50)), rng.normal(size=40)
    for _ in range(count):
        yield {"w": weight.astype(np.float32), "b": bias.astype(np.float32)}
        weight = weight + 0.5 * rng.normal(size=weight.shape)
        bias = bias + 0.1


def published(policy: Policy, count: int = 12) -> tuple[Publisher, list[Any]]:
    publisher = Publisher(policy, b"s", policy.pruning())
    return publisher, [publisher.publish(master).model for master in masters(count)]


def kept(model: Any) -> np.ndarray:
    return np.asarray(model.masks().get("w", np.ones((40, 50), bool)))


@pytest.mark.parametrize(
    ("schedule", "changes"),
    [("iterative", [3, 4, 6, 7]), ("one-shot", [3]), ("static", [1]), ("linear", range(3, 9))],
)
def test_held_masks_change_where_the_schedule_rises_and_nowhere_else(
    schedule: str, changes: Sequence[int]
) -> None:
    policy = Policy(**SMALL, pruning_schedule=schedule, pruning_masks="held")
    publisher, models = published(policy)
    found, before = [], np.ones((40, 50), bool)
    for version, model in enumerate(models, start=1):
        mask = kept(model)
        assert not (mask & ~before).any()  # what is removed stays removed
        if (mask != before).any():
            found.append(version)
        assert int((~mask).sum()) == int(publisher.pruner.plan.schedule(version) * mask.size)
        before = mask
    assert found == list(changes)


def test_without_a_word_masks_follow_the_master_but_for_schedules_that_hold_them() -> None:
    rules = {name: Policy(pruning_schedule=name).mask_rule for name in ("cubic", "one-shot")}
    assert rules == {"cubic": "dpf", "one-shot": "dpf"}
    for name in ("static", "iterative"):
        assert Policy(pruning_schedule=name).mask_rule == "held"
        assert Policy(pruning_schedule=name, pruning_masks="dpf").mask_rule == "dpf"
    _, models = published(Policy(**SMALL, pruning_schedule="one-shot"))
    assert all((kept(a) != kept(b)).any() for a, b in itertools.pairwise(models[3:]))


def test_a_weight_that_is_kept_stays_alive_where_it_crosses_zero() -> None:
    policy = Policy(**SMALL, pruning_schedule="static")
    publisher = Publisher(policy, b"s", policy.pruning())
    (first,) = masters(1)
    mask = kept(publisher.publish(first).model)
    crossing = {**first, "w": first["w"] * 1e-4}
    crossing["w"][:20] *= -1
    model = publisher.publish({**crossing, "w": np.where(mask, crossing["w"], first["w"])}).model
    assert (kept(model) == mask).all()
    signs = np.sign(model.tensors["w"].q)
    assert (signs[mask] == np.sign(crossing["w"][mask])).all()


def test_a_static_mask_waits_for_what_its_criterion_asks_the_nodes_for() -> None:
    """As of SNIP: the first round is dense and measures; then the mask is chosen, for good."""
    policy = Policy(
        sparsity=0.5, pruning_schedule="static", pruning_criterion="fisher", pruning_min_size=1
    )
    publisher = Publisher(policy, b"s", policy.pruning(4))
    models, asked = [], []
    for version, master in enumerate(masters(4)):
        half = np.zeros((40, 50), np.float32)
        half[:, version * 5 : version * 5 + 25] = 1
        statistics = {"gradient": {"w": half}} if version else None
        models.append(publisher.publish(master, statistics).model)
        asked.append(publisher.wanted)
    assert asked == [("gradient",), (), (), ()]
    assert models[0].sparsity() == 0 or not models[0].masks()
    for model in models[1:]:
        assert kept(model)[:, 5:30].all()
        assert int(kept(model).sum()) == 1000


def test_a_run_of_few_rounds_is_pruned_where_masks_are_chosen_at_its_start() -> None:
    policy = Policy(sparsity=0.75, pruning_schedule="static", pruning_min_size=1)
    publisher = Publisher(policy, b"s", policy.pruning())
    publisher.expect(2)
    (master,) = masters(1)
    assert int((~kept(publisher.publish(master).model)).sum()) == 1500


def test_layers_that_a_held_mask_leaves_next_to_nothing_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rng = np.random.default_rng(0)
    weights = {"wide": rng.uniform(-0.01, 0.01, (40, 50)), "narrow": rng.uniform(-1, 1, (40, 50))}
    for scope, said in (("layer", 0), ("global", 1)):
        policy = Policy(
            sparsity=0.9, pruning_schedule="static", pruning_scope=scope, pruning_min_size=1
        )
        publisher = Publisher(policy, b"s", policy.pruning())
        for _ in range(2):
            publisher.publish({name: array.astype("f4") for name, array in weights.items()})
        assert caplog.text.count("1 layers such as 'wide'") == said
        assert caplog.text.count("of 2000 weights are kept") == said


def test_layers_are_pruned_one_after_the_other() -> None:
    policy = Policy(
        sparsity=0.5, pruning_schedule="layer-by-layer", pruning_masks="held",
        pruning_begin=1, pruning_end=5, pruning_min_size=1,
    )  # fmt: skip
    publisher = Publisher(policy, b"s", policy.pruning())
    rng = np.random.default_rng(0)
    found = []
    for _ in range(6):
        master = {n: rng.normal(size=(10, 10)).astype(np.float32) for n in ("in", "out")}
        model = publisher.publish(master).model
        found.append({n: int(m.sum()) for n, m in model.masks().items()})
    assert found == [{}, {"in": 50}, {"in": 50}, *[{"in": 50, "out": 50}] * 3]


@pytest.mark.parametrize("pattern", ["", "2x5"])
@pytest.mark.parametrize("scope", ["global", "lamp", "erk", "sensitivity"])
def test_layers_that_are_held_one_after_the_other_come_to_the_sparsity_of_the_model(
    scope: str, pattern: str
) -> None:
    """Though each was chosen among weights that have moved since."""
    policy = Policy(
        sparsity=0.83, pruning_schedule="layer-by-layer", pruning_masks="held", pruning_begin=1,
        pruning_end=5, pruning_min_size=1, pruning_scope=scope, pruning_pattern=pattern,
    )  # fmt: skip
    publisher = Publisher(policy, b"s", policy.pruning())
    rng = np.random.default_rng(0)
    before: dict[str, np.ndarray] = {}
    for version in range(7):
        shapes = {"in": (10, 40), "mid": (20, 20), "tall": (60, 5), "out": (8, 50)}
        sizes = enumerate(shapes.items(), start=1)
        master = {
            n: (rng.normal(size=s) ** (1 + (i + version) % 3)).astype(np.float32)
            for i, (n, s) in sizes
        }
        masks = publisher.publish(master).model.masks()
        assert all((masks[name] == mask).all() for name, mask in before.items())
        before = masks
    unit = 10 if pattern else 1
    removed = sum(int((~mask).sum()) for mask in before.values())
    assert removed == int(0.83 * 1500 / unit) * unit


@pytest.mark.parametrize("rounds", [30, 50, 100])
def test_nodes_are_asked_before_every_event_of_a_clock_that_follows_learning(rounds: int) -> None:
    """It goes on by more than a round at a time where there are many."""
    policy = Policy(
        sparsity=0.9, pruning_schedule="iterative", pruning_steps=7, pruning_criterion="fisher",
        pruning_min_size=1,
    )  # fmt: skip
    publisher = Publisher(policy, b"s", policy.pruning())
    publisher.expect(rounds)
    rng = np.random.default_rng(1)
    weight, asked, events, waits = rng.normal(size=(20, 30)), (), 0, 0
    for version in range(1, rounds + 1):
        gradient = {"gradient": {"w": rng.random((20, 30)).astype(np.float32)}} if asked else {}
        publisher.publish({"w": weight.astype(np.float32)}, gradient)
        if publisher.pruner.pruned:
            events += 1
            assert asked == ("gradient",)
        asked = publisher.wanted
        waits += not asked
        weight = weight + rng.normal(size=weight.shape) * 0.3 / (1 + version / 3)
    assert events == 7
    assert waits > rounds / 3  # it is not asked all the time either


# -- rewinding -----------------------------------------------------------------------------------

REWOUND = {**SMALL, "pruning_schedule": "iterative", "pruning_steps": 2, "pruning_rewind": 2}


def test_every_event_rewinds_what_it_keeps_to_the_early_version() -> None:
    policy = Policy(**REWOUND, down_step=0.01)
    publisher = Publisher(policy, b"s", policy.pruning())
    given = list(masters(9))
    for version, master in enumerate(given, start=1):
        made = publisher.publish(master)
        early = given[1] if version in (3, 6) else master
        assert (made.master["w"] == early["w"]).all()
        assert (made.master["b"] == early["b"]).all()
        mask = kept(made.model)
        step = made.model.tensors["w"].step
        assert np.abs(made.model.arrays()["w"] - early["w"])[mask].max() <= step


def test_a_jump_of_the_server_is_no_update_of_the_nodes() -> None:
    """Neither of a model that was rewound nor of a weight that was grown."""
    for knobs in (REWOUND, {**SMALL, "pruning_masks": "rigl", "pruning_interval": 1}):
        policy = Policy(**{**knobs, "pruning_end": 20, "sparsity": 0.5})
        seen: list[Knowledge] = []

        def note(known: Knowledge, seen: list[Knowledge] = seen) -> Any:
            seen.append(known)
            return {}

        scores = CRITERIA["magnitude"].scores
        criterion = Criterion(scores, uses_update=True, accumulates=note)
        plan = replace(policy.pruning(), criterion=criterion)
        publisher = Publisher(policy, b"s", plan)
        rng = np.random.default_rng(0)
        weight, moves = rng.normal(size=(40, 50)), rng.normal(size=(26, 40, 50))
        votes: Any = {}
        for version in range(26):
            made = publisher.publish({"w": weight.astype(np.float32)}, {"growth": votes})
            if version:
                np.testing.assert_allclose(seen[-1].update["w"], moves[version - 1], atol=1e-5)
            votes = {"w": rng.normal(size=weight.shape).astype(np.float32)}
            weight = made.master["w"] + moves[version]


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"pruning_rewind": 3}, r"pruning-rewind.*up to prunecast.pruning-begin = 2"),
        ({"pruning_rewind": -1}, "pruning-rewind"),
        ({"pruning_rewind": 1, "pruning_schedule": "cubic"}, "pruning-masks = 'held'"),
        ({"pruning_steps": 0}, "pruning-steps.*1 or more"),
        ({"pruning_masks": "loose"}, "choose 'auto' or 'dpf' or 'held'"),
    ],
)
def test_what_cannot_be_asked_is_refused(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        Policy(**{**REWOUND, **knobs})


# -- a resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("schedule", ["iterative", "linear", "static", "layer-by-layer"])
def test_masks_and_weights_go_on_after_a_resume_as_if_nothing_had_been(
    schedule: str, at: int, federation: Any, tmp_path: Any
) -> None:
    """Also right after an event, whose version is published once more."""
    policy = Policy(
        **{**REWOUND, "pruning_schedule": schedule, "pruning_masks": "held"}, hysteresis=0.5
    )
    given = [to_record({**m, **initial_arrays()}) for m in masters(10)]
    whole, _, _ = federation(policy)
    expected = [whole.published(record) for record in given]
    first, _, _ = federation(policy)
    for record in given[:at]:
        first.published(record)
    first.checkpoint(given[at - 1]).save(tmp_path / "checkpoint.safetensors")
    resumed, _, _ = federation(policy, run_id=77)
    master = resumed.resume(Checkpoint.load(tmp_path / "checkpoint.safetensors"))
    found = [resumed.published(record) for record in [master, *given[at:]]]
    for one, other in zip(found, expected[at - 1 :], strict=True):
        assert {n: m.tolist() for n, m in one.masks().items()} == {
            n: m.tolist() for n, m in other.masks().items()
        }
        assert all((a == other.arrays()[n]).all() for n, a in one.arrays().items())


@pytest.mark.parametrize("criterion", ["snip", "fisher", "activation", "movement"])
def test_what_pruning_knows_goes_on_after_a_resume(
    criterion: str, federation: Any, tmp_path: Any
) -> None:
    """Statistics of the last round, too, that no version was made with yet."""
    policy = Policy(**SMALL, pruning_criterion=criterion, pruning_schedule="linear", hysteresis=0.5)
    shapes = {name: array.shape for name, array in initial_arrays().items()}
    rng = np.random.default_rng(2)
    given = [to_record(initial_arrays(seed)) for seed in range(6)]

    def pruner(grid: Any) -> Any:
        return grid._streams.stream(grid.run.run_id, "arrays").pruner

    whole, _, _ = federation(policy)
    for record in given[:4]:
        whole.published(record)
        for wanted in pruner(whole).wanted:  # as nodes answer
            found = {n: rng.normal(size=statistic_shape(wanted, s)) for n, s in shapes.items()
                     if len(s) > 1}  # fmt: skip
            pruner(whole).statistics.add(pack_statistics({wanted: found}), (wanted,), shapes)
    whole.checkpoint(given[3]).save(tmp_path / "checkpoint.safetensors")
    resumed, _, _ = federation(policy, run_id=77)
    master = resumed.resume(Checkpoint.load(tmp_path / "checkpoint.safetensors"))
    before, after = pruner(whole).state, pruner(resumed).state
    for one, other in ((before.accumulated, after.accumulated), *(
        (before.known[name], after.known[name]) for name in before.known
    )):  # fmt: skip
        assert one.keys() == other.keys()
        assert all(np.array_equal(array, other[name]) for name, array in one.items())
    assert before.known or before.accumulated
    resumed.published(master)
    if criterion != "movement":  # which lacks the last round's update
        masks = [grid.published(given[4]).masks() for grid in (whole, resumed)]
        assert masks[0].keys() == masks[1].keys() == {"conv.weight", "fc.weight"}
        assert all((mask == masks[1][name]).all() for name, mask in masks[0].items())


def test_a_resumed_static_mask_of_snip_is_not_dense_again(federation: Any, tmp_path: Any) -> None:
    policy = Policy(
        sparsity=0.5, pruning_schedule="static", pruning_criterion="snip", pruning_min_size=100
    )
    first, _, _ = federation(policy)
    record = to_record(initial_arrays())
    first.published(record)
    pruned = first.published(to_record(initial_arrays(1)))
    assert pruned.masks()
    first.checkpoint(to_record(initial_arrays(1))).save(tmp_path / "checkpoint.safetensors")
    resumed, _, _ = federation(policy, run_id=77)
    master = resumed.resume(Checkpoint.load(tmp_path / "checkpoint.safetensors"))
    again = resumed.published(master).masks()
    assert {n: m.tolist() for n, m in again.items()} == {
        n: m.tolist() for n, m in pruned.masks().items()
    }


def test_a_federation_holds_its_masks_and_nodes_train_what_is_kept_alone(federation: Any) -> None:
    grid, _, seen = federation(Policy(**SMALL, pruning_schedule="iterative", pruning_steps=2))
    FedAvg(fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=10
    )
    rounds = [arrays["fc.weight"] != 0 for node, _, arrays in seen if node == 1]
    held = itertools.pairwise(rounds[2:])  # before, lattice and mask cannot be told apart
    assert [n for n, (a, b) in enumerate(held, 4) if (a != b).any()] == [6]
    assert int((~rounds[-1]).sum()) == int(0.75 * rounds[-1].size)


def test_channels_go_whatever_nodes_said_of_a_bias() -> None:
    """One that was kept before a bias's activations were refused narrows nothing, and ends none."""
    policy = Policy(**SMALL, pruning_criterion="activation")
    publisher = Publisher(policy, b"s", policy.pruning())
    publisher.publish(next(masters(1)))
    known = {"activation": {"b": np.ones(1), "w": np.arange(50.0).reshape(1, 50)}}
    publisher.pruner.resume((), MaskState(known=known))
    rows, columns = np.arange(40) % 2 == 0, np.arange(50) < 20
    publisher.remove(ChannelPlan({"w": (rows, columns), "b": (rows,)}))
    left = publisher.pruner.state.known["activation"]
    assert left["b"].tolist() == [1]
    assert left["w"].tolist() == [list(range(20))]


@pytest.mark.parametrize("kept", ["early", "masks", "accumulated", "known"])
def test_a_plan_that_cannot_be_followed_changes_nothing(kept: str) -> None:
    policy = Policy(**SMALL, pruning_criterion="fisher")
    publisher = Publisher(policy, b"s", policy.pruning())
    version = publisher.publish(next(masters(1)))
    pruner, odd = publisher.pruner, {"w": np.ones((3, 3), bool)}
    plan = ChannelPlan({"w": (np.arange(40) % 2 == 0, None)}, share=0.5)
    good = {"gradient": {"w": np.ones((40, 50))}}
    pruner.statistics.add(pack_statistics(good), ("gradient",), {"w": (40, 50), "b": (40,)})
    if kept == "known":
        pruner.progress._before = odd  # the last of all
        pruner.resume((), MaskState())
    else:
        pruner.resume((), MaskState(**{kept: odd}))
    before, held = pruner.state, publisher.held(next(iter(publisher.history)))
    with pytest.raises(PlanError, match="another shape"):
        publisher.remove(plan)
    assert publisher.channels is None
    assert publisher.unknown_channels(version, None) is None
    assert publisher.held(next(iter(publisher.history))) is held
    assert publisher.narrowed({"w": np.ones((40, 50))})["w"].shape == (40, 50)
    after = pruner.state
    assert after.known["gradient"]["w"] is before.known["gradient"]["w"]
    assert (after.early, after.masks, after.accumulated) == (
        before.early, before.masks, before.accumulated
    )  # fmt: skip
