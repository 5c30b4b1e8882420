"""Automatic pruning in a real federation: torch, nodes that train and evaluate, a resume."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from prunecast.client.training import compression_mod
from prunecast.client.training.client_app import LocalTraining, build_client_app
from prunecast.client.training.trainer import TensorBatches, evaluate
from prunecast.compression.pruning.plan import ChannelSchedule, PlanError, Shares
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.pruning.structure.narrowing import fit_module
from prunecast.server.federation import (
    Checkpoint,
    CheckpointError,
    FederationError,
    Policy,
    PolicyError,
    Run,
    read_events,
)
from prunecast.server.federation.publishing.publisher import Publisher
from prunecast.server.federation.shrinking.choosing import module_chooser
from prunecast.server.federation.shrinking.removals import check_channels
from prunecast.simulations.runner.inprocess import InProcessGrid
from support import attentive
from support.federation import RUN_ID, initial_arrays, to_record

AUTOMATIC = {
    "pruning_schedule": "automatic", "pruning_tolerance": 0.01, "pruning_patience": 2,
    "pruning_min_size": 100,
}  # fmt: skip
INPUTS, CLASSES, TOLD = 32, 4, 6


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def normalised(hidden: int = 64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = nn.Linear(INPUTS, hidden), nn.BatchNorm1d(hidden), nn.ReLU()
        return nn.Sequential(*layers, nn.Linear(hidden, CLASSES))


def counting() -> nn.Module:
    made = normalised()
    made[1] = nn.LayerNorm(64)
    return made


def stacked() -> nn.Module:
    """Of which little is needed: a linear layer would nearly do."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(INPUTS, 24), nn.Unflatten(1, (6, 4)), attentive.Attentive(layers=3)
        )


def examples(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes that follow from six of the 32 inputs alone, so that most weights can go."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(count, INPUTS)).astype(np.float32)
    teacher = np.random.default_rng(0).normal(size=(TOLD, CLASSES))
    return torch.from_numpy(inputs), torch.from_numpy((inputs[:, :TOLD] @ teacher).argmax(1))


def app(store: Path, factory: Callable[[], nn.Module] = network) -> ClientApp:
    def data(context: Context) -> tuple[TensorBatches, TensorBatches]:
        inputs, targets = examples(int(context.node_id), 400)
        held_out = examples(100 + int(context.node_id), 300)
        return (
            TensorBatches(inputs, targets, batch_size=20, shuffle=True),
            TensorBatches(*held_out, batch_size=300),
        )

    settings = LocalTraining(learning_rate=0.05, device="cpu")
    return build_client_app(
        lambda context: factory(), data, settings, mods=[compression_mod(store)]
    )


def accuracy(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    narrow = "1.running_mean" in arrays
    module = normalised(arrays["0.weight"].shape[0]) if narrow else network()
    module.load_state_dict(arrays.to_torch_state_dict())
    found = evaluate(module, TensorBatches(*examples(99, 2000), batch_size=2000), device="cpu")
    return MetricRecord({"loss": found.loss, "accuracy": found.accuracy})


@pytest.fixture
def trained(tmp_path: Path, one_thread: None) -> Callable[..., Any]:
    def start(
        policy: Policy,
        rounds: int,
        *,
        by_server: bool = True,
        start: Any = None,
        name: str = "run",
        factory: Callable[[], nn.Module] = network,
        **options: Any,
    ) -> list[dict[str, Any]]:
        nodes = app(tmp_path / f"{name}-nodes", factory)
        inner = InProcessGrid(nodes, 2, run_id=RUN_ID + len(name))
        run = Run(
            inner,
            FedAvg(fraction_evaluate=0.0 if by_server else 1.0),
            policy=policy,
            folder=tmp_path / name,
            evaluate_fn=accuracy if by_server else None,
            **options,
        )
        run.grid._poll_interval = 0.001
        run.start(start or ArrayRecord(factory().state_dict()), num_rounds=rounds)
        return list(read_events(tmp_path / name / "events.jsonl"))

    return start


def rounds_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "round-finished"]


def test_it_ends_within_its_tolerance_and_most_weights_are_gone(trained: Any) -> None:
    rounds = rounds_of(trained(Policy(**AUTOMATIC), 28))
    dense = [r for r in rounds if not r["masks"]]
    assert 3 <= len(dense) < 20
    found = [change for r in rounds for change in r["pruning"]]
    raised = [c for c in found if c["what"] == "raised"]
    lowered = [c for c in found if c["what"] == "lowered"]
    assert raised
    assert lowered  # it looked for the border
    last = rounds[-1]
    assert last["metrics"]["accuracy"] >= found[-1].get("reference", raised[-1]["reference"]) - 0.01
    assert last["metrics"]["accuracy"] >= max(r["metrics"]["accuracy"] for r in dense) - 0.01
    assert last["sparsity"] > 0.7


def test_nodes_that_evaluate_tell_it_as_well(trained: Any) -> None:
    rounds = rounds_of(trained(Policy(**AUTOMATIC, sparsity=0.5), 20, by_server=False))
    assert max(r["sparsity"] for r in rounds) == pytest.approx(0.5, abs=0.02)  # the most it may
    assert rounds[0]["sparsity"] == 0


def test_the_lattice_is_coarsened_by_the_same_search(trained: Any) -> None:
    policy = Policy(**AUTOMATIC, pruning_knobs=("lattice",), down_step=0.1)
    rounds = rounds_of(trained(policy, 22))
    levels = [c["levels"]["lattice"] for r in rounds for c in r["pruning"]]
    assert levels[0] == 1
    assert set(levels) <= {0, 1, 2, 3}
    assert all(not r["masks"] for r in rounds)
    assert rounds[-1]["metrics"]["accuracy"] >= rounds[5]["metrics"]["accuracy"] - 0.01


CHANNELS = {
    **AUTOMATIC, "pruning_knobs": ("channels", "sparsity"), "pruning_tolerance": 0.03,
}  # fmt: skip


def removals(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "channels-removed"]


def test_channels_are_tried_as_zeros_and_gone_once_the_search_has_settled(
    trained: Any, tmp_path: Path
) -> None:
    chooser = module_chooser(normalised, lambda: torch.ones(2, INPUTS))
    events = trained(Policy(**CHANNELS), 22, factory=normalised, channels=chooser)
    rounds, (gone,) = rounds_of(events), removals(events)
    levels = {r["round"]: c["levels"] for r in rounds for c in r["pruning"] if "levels" in c}
    held = next(level["channels"] for at, level in levels.items() if at >= gone["round"] - 1)
    assert gone["share"] == pytest.approx(2 ** (-held / 2))
    assert 0 < held <= 4
    assert max(level["channels"] for level in levels.values()) >= held
    assert gone["round"] <= 18
    for number, level in levels.items():  # nothing else is turned before they are gone
        assert number >= gone["round"] or level["sparsity"] == 0
        assert number < gone["round"] or level["channels"] == held
    checkpoint = Checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")
    hidden = checkpoint.arrays["0.weight"].shape[0]
    assert hidden == pytest.approx(64 * gone["share"], abs=1)
    assert checkpoint.arrays["1.running_var"].shape == (hidden,)
    assert checkpoint.channels is not None
    assert checkpoint.channels.share == pytest.approx(gone["share"])
    assert checkpoint.tried == ()
    measured = {r["round"]: r["metrics"]["accuracy"] for r in rounds}
    first = min(number for number, level in levels.items() if level["channels"])
    assert measured[gone["round"]] >= max(measured[n] for n in measured if n < first) - 0.03


def test_what_held_is_gone_in_time_where_the_rounds_end_first(trained: Any) -> None:
    chooser = module_chooser(normalised, lambda: torch.ones(2, INPUTS))
    policy = Policy(**{**CHANNELS, "pruning_begin": 1, "pruning_end": 4})
    events = trained(policy, 8, factory=normalised, channels=chooser)
    (gone,) = removals(events)
    assert gone["round"] == 4
    assert gone["share"] < 1


def test_recovery_is_told_at_the_end(trained: Any) -> None:
    policy = Policy(
        sparsity=0.9, pruning_schedule="iterative", pruning_steps=2, pruning_begin=4,
        pruning_end=12, pruning_min_size=100,
    )  # fmt: skip
    events = trained(policy, 14)
    first, second = events[-1]["recoveries"]
    assert (first["begun"], first["ended"], first["last"]) == (4, 4, 7)
    assert (second["begun"], second["ended"], second["last"]) == (8, 8, 14)
    by_round = {r["round"]: r["metrics"] for r in rounds_of(events)}
    for one in (first, second):
        assert one["before"] == by_round[one["begun"] - 1]
        assert one["pruned"] == by_round[one["ended"]]
        assert one["after"] == by_round[one["last"]]
        assert one["recovery_ratio"] == one["before"]["loss"] / one["after"]["loss"]
        assert one["pruned"]["loss"] > one["after"]["loss"]


# -- the publisher's part ------------------------------------------------------------------------


def test_it_waits_for_a_metric_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(**AUTOMATIC, pruning_begin=1, pruning_end=9)
    publisher = Publisher(policy, b"s", policy.pruning())
    rng = np.random.default_rng(0)
    for _ in range(6):
        model = publisher.publish({"w": rng.normal(size=(20, 30)).astype(np.float32)}).model
        assert not model.masks()
    assert caplog.text.count("Nobody measures a metric named *accuracy") == 1


@pytest.mark.parametrize("at", [2, 5, 8, 11])
def test_a_search_goes_on_after_a_resume_as_if_nothing_had_been(
    at: int, federation: Any, tmp_path: Path
) -> None:
    policy = Policy(
        **{**AUTOMATIC, "pruning_begin": 1, "pruning_end": 12},
        pruning_knobs=("sparsity", "lattice"),
        hysteresis=0.5,
    )
    rng = np.random.default_rng(4)
    given = [
        to_record({n: rng.normal(size=a.shape).astype("f4") for n, a in initial_arrays().items()})
        for _ in range(14)
    ]
    values = [0.9, 0.9, 0.9, 0.9, 0.8, 0.8, 0.9, 0.895, 0.7, 0.7, 0.9, 0.9, 0.9, 0.9]

    def publish(grid: Any, records: Any, measured: list[float]) -> list[Any]:
        found = []
        for record, value in itertools.zip_longest(records, measured):
            found.append(grid.published(record))
            if value is not None:
                grid.note_metrics({"accuracy": value})
        return found

    whole, _, _ = federation(policy)
    expected = publish(whole, given, values)
    assert len({round(model.sparsity(), 2) for model in expected}) > 3
    first, _, _ = federation(policy)
    publish(first, given[:at], values[:at])  # the last was measured, too
    first.checkpoint(given[at - 1]).save(tmp_path / "checkpoint.safetensors")
    resumed, _, _ = federation(policy, run_id=77)
    checkpoint = Checkpoint.load(tmp_path / "checkpoint.safetensors")
    master = resumed.resume(checkpoint)
    found = publish(resumed, [master, *given[at:]], [None, *values[at:]])
    for one, other in zip(found, expected[at - 1 :], strict=True):
        assert all((a == other.arrays()[n]).all() for n, a in one.arrays().items())
    other, _, _ = federation(Policy(**AUTOMATIC), run_id=78)
    with pytest.raises(CheckpointError, match="does not fit the policy"):
        other.resume(checkpoint)


SHAPES = {"a.weight": (8, 12), "a.bias": (8,), "bn.running_var": (8,), "b.weight": (40, 8)}


def by_norm(master: Any, share: float, removed: ChannelPlan | None) -> ChannelPlan:
    """A chooser without a module: the largest rows of a matrix, and what hangs together with it."""
    rows = np.linalg.norm(master["a.weight"], axis=1)
    kept = np.isin(np.arange(rows.size), np.argsort(-rows)[: round(share * 8)])
    whole = {"a.weight": (kept, None), "a.bias": (kept,), "bn.running_var": (kept,)}
    return ChannelPlan({**whole, "b.weight": (None, kept)})


def masters(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(4)
    return [
        {name: np.abs(rng.normal(size=shape)).astype("f4") + 1 for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


def test_channels_on_trial_come_back_with_what_the_master_and_the_statistics_had() -> None:
    policy = Policy(**{**CHANNELS, "pruning_begin": 1, "pruning_end": 12}, statistics_bits=0)
    publisher = Publisher(policy, b"s", policy.pruning(20))
    publisher.expect(20)
    publisher.choose = by_norm
    given, models = masters(9), []
    for number, values in enumerate([0.9, 0.9, 0.9, 0.9, 0.5, 0.5, 0.9, 0.9]):
        if models:  # what comes back of zeros where updates travel dense, and of their statistics
            zero = models[-1].model.arrays()["a.bias"] == 0
            given[number]["a.weight"][zero] = 0
            given[number]["bn.running_var"][zero] = 0.001
        models.append(publisher.publish(given[number]))
        publisher.pruner.measured.add(values, held_out=True)
    shares = [round(8 - float((m.model.arrays()["a.bias"] == 0).sum())) for m in models]
    assert shares[0] == 8
    assert len(set(shares)) >= 3
    for version, left, before in zip(models[1:], shares[1:], models, strict=False):
        arrays = version.model.arrays()
        zero = arrays["a.bias"] == 0
        assert (arrays["a.weight"] == 0).all(1).tolist() == zero.tolist()
        assert (arrays["b.weight"] == 0).all(0).tolist() == zero.tolist()
        assert (version.master["a.weight"] > 0.9).all()  # the master keeps all
        assert not version.model.masks()  # nodes hold no masks: no gradient reaches zeros
        was = before.model.arrays()
        dead = was["a.bias"] == 0
        for name in ("a.weight", "bn.running_var"):
            assert (version.master[name][dead] == before.master[name][dead]).all()
        assert (arrays["bn.running_var"][dead] == was["bn.running_var"][dead]).all()
        assert left in (8, 6, 5, 4, 3, 2)


@pytest.mark.parametrize(("least", "left"), [(0.4, 4), (0.9, 8)])
def test_a_level_that_no_plan_can_be_made_for_takes_no_further_channels(
    least: float, left: int
) -> None:
    policy = Policy(**{**CHANNELS, "pruning_begin": 1, "pruning_end": 12})
    publisher = Publisher(policy, b"s", policy.pruning())

    def choose(master: Any, share: float, removed: ChannelPlan | None) -> ChannelPlan:
        if share < least:
            raise PlanError("a layer would vanish")
        return by_norm(master, share, removed)

    publisher.choose = choose
    for master in masters(9):
        model = publisher.publish(master).model
        publisher.pruner.measured.add(0.9, held_out=True)
    assert publisher.pruner.levels["channels"] == 4
    assert np.count_nonzero(model.arrays()["a.bias"]) == left
    settled = publisher.settled
    assert (settled is None) == (left == 8)
    assert settled is None or settled.share == 0.25


@pytest.mark.parametrize("at", [3, 5, 7, 9, 11, 13])
def test_a_search_for_channels_goes_on_after_a_resume_as_if_nothing_had_been(
    at: int, federation: Any, tmp_path: Path
) -> None:
    policy = Policy(
        **{**CHANNELS, "pruning_begin": 1, "pruning_end": 14, "pruning_min_size": 20},
        hysteresis=0.5,
    )
    given = masters(16)
    values = [0.9, 0.9, 0.9, 0.7, 0.7, 0.9, 0.7, 0.7, 0.9, 0.9, 0.9, 0.8, 0.8, 0.9, 0.9, 0.9]

    def publish(grid: Any, arrays: Any, measured: list[float | None]) -> list[Any]:
        grid.try_channels(by_norm)
        grid.expect_rounds(20)
        found = []
        for one, value in zip(arrays, measured, strict=True):
            left = grid.channels()
            goes_on = left is None or value is None  # what is resumed is narrow
            record = to_record(dict(one if goes_on else left.arrays(one)))
            if value is not None and (plan := grid.settled_channels()) is not None:
                record = grid.remove_channels(record, plan)
            found.append((record, grid.published(record)))
            if value is not None:
                grid.note_metrics({"accuracy": value})
        return found

    whole, _, _ = federation(policy)
    expected = publish(whole, given, values)
    shapes = [model.tensors["a.weight"].shape[0] for _, model in expected]
    zeros = [int((model.arrays()["a.bias"] == 0).sum()) for _, model in expected]
    assert shapes[0] == 8 > shapes[-1]
    assert max(zeros) > 0 == zeros[-1]
    assert any(model.masks() for _, model in expected)  # sparsity's turn came
    first, _, _ = federation(policy)
    begun = publish(first, given[:at], values[:at])
    first.checkpoint(begun[-1][0]).save(tmp_path / "checkpoint.safetensors")
    resumed, _, _ = federation(policy, run_id=77)
    checkpoint = Checkpoint.load(tmp_path / "checkpoint.safetensors")
    resumed.resume(checkpoint)
    found = publish(resumed, [checkpoint.arrays], [None])
    found += publish(resumed, given[at:], values[at:])
    for (_, one), (_, other) in zip(found, expected[at - 1 :], strict=True):
        assert one.arrays().keys() == other.arrays().keys()
        assert all(np.array_equal(a, other.arrays()[n]) for n, a in one.arrays().items())


def test_channels_that_cannot_be_tried_are_refused(trained: Any, federation: Any) -> None:
    with pytest.raises(FederationError, match=r"nobody says which.*module_chooser"):
        trained(Policy(**CHANNELS), 20, factory=normalised)
    chooser = module_chooser(normalised, lambda: torch.randn(2, INPUTS))
    with pytest.raises(FederationError, match=r"as late as after round 20 of 20.*pruning-end"):
        trained(Policy(**CHANNELS, pruning_end=20), 20, factory=normalised, channels=chooser)
    chooser = module_chooser(counting, lambda: torch.randn(2, INPUTS))
    with pytest.raises(PlanError, match=r"cannot be tried.*LayerNorm"):
        trained(Policy(**CHANNELS), 20, factory=counting, channels=chooser)
    grid, _, _ = federation(Policy(**CHANNELS))
    with pytest.raises(FederationError, match=r"tries how many channels can go.*nobody says which"):
        grid.published(to_record(initial_arrays()))
    with pytest.raises(FederationError, match=r"of record 'other'.*pruning-records"):
        grid.try_channels(by_norm, key="other")


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"pruning_knobs": ("sparsity", "channels")}, "put channels first"),
        ({"pruning_knobs": ("heads", "lattice", "layers")}, "put heads and layers first"),
        ({"channels": 0.5, "channels_at": (2,)}, "leave out one of the two"),
        ({"widths": {"small": 0.5}}, "leave channels out of prunecast.pruning-knobs"),
        ({"down": "dense", "up": "dense"}, "'lattice'"),
    ],
)
def test_a_policy_that_cannot_try_channels_is_refused(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        Policy(**{**CHANNELS, **knobs})


# -- heads and layers ----------------------------------------------------------------------------

STRUCTURES = {
    **AUTOMATIC, "pruning_knobs": ("layers", "heads", "sparsity"), "pruning_tolerance": 0.03,
    "pruning_min_size": 20,
}  # fmt: skip


def residual(*, norm_first: bool = True) -> nn.Module:
    return attentive.Attentive(norm_first=norm_first, layers=2)


def residual_in_order(
    master: Any, share: float, removed: ChannelPlan | None, **shares: float
) -> Any:
    """A chooser without a module: the last of four layers go, and the last of four heads."""
    there = Shares() if removed is None else removed.shares
    layers, heads = 4, np.arange(4) < round(4 * shares.get("heads", 1.0))
    if heads.sum() < 1:
        raise PlanError("no head would be left")
    plan = ChannelPlan({})
    if shares.get("layers", 1.0) < there.layers:
        before = 0 if removed is None else len(removed.gone)
        left = round(layers * shares["layers"])
        gone = tuple(f"layers.{n}" for n in range(layers) if n >= left)
        plan = ChannelPlan({}, gone=gone[: len(gone) - before])
    if shares.get("heads", 1.0) < there.heads and not heads.all():
        names = [n for n in master if n.endswith("out.weight") and not plan.loses(n)]
        kept = {n: (None, np.repeat(heads, 2)) for n in names}
        plan = ChannelPlan(kept, heads={n[:-11]: heads for n in names})
    return plan


def layered(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    shapes = {
        f"layers.{n}.{name}": shape
        for n in range(4)
        for name, shape in (("out.weight", (6, 8)), ("up.weight", (8, 6)), ("norm.bias", (6,)))
    }
    shapes |= {"layers.0.norm.running_var": (6,), "layers.3.norm.running_var": (6,)}
    return [
        {n: np.abs(rng.normal(size=shape)).astype("f4") + 1 for n, shape in shapes.items()}
        for _ in range(count)
    ]


def test_layers_and_heads_are_tried_one_after_the_other_and_come_back_from_a_trial() -> None:
    policy = Policy(**{**STRUCTURES, "pruning_begin": 1, "pruning_end": 40}, statistics_bits=0)
    publisher = Publisher(policy, b"s", policy.pruning(60))
    publisher.expect(60)
    publisher.choose = residual_in_order
    seen: list[tuple[int, int]] = []
    removed: list[Shares] = []
    last: Any = None
    for master in layered(40):
        given = dict(master if publisher.channels is None else publisher.channels.arrays(master))
        trial, before = publisher._trial, last
        if trial is not None:  # zeros and their statistics come back, where updates travel dense
            zero = [n for n, a in last.model.arrays().items() if not a.any()]
            given |= {n: np.zeros_like(given[n]) for n in zero}
            given |= {n: np.full_like(a, 0.001) for n, a in given.items() if "running" in n}
        settled = publisher.settled
        if settled is not None:
            removed.append(settled.shares)
            publisher.remove(settled)
            given = settled.arrays(given)
        last = publisher.publish(given)
        arrays = last.model.arrays()
        lost = [] if trial is None else [n for n in given if trial[0].loses(n)]
        for name in lost:  # the master keeps a layer on trial, its statistics included
            assert (last.master[name] == before.master[name]).all()
            if "running" in name:
                assert (arrays[name] == before.model.arrays()[name]).all()
        weights = {n: a for n, a in arrays.items() if n.endswith("out.weight")}
        for n, a in arrays.items():  # all of a layer is zero, or nothing is
            if "running" not in n and n not in weights:
                assert a.any() == weights[n.rsplit(".", 2)[0] + ".out.weight"].any()
        layers = sum(bool(a.any()) for a in weights.values())
        heads = max(int(a.any(0).sum()) for a in weights.values()) // 2
        if len(removed) < 2:
            seen.append((layers, heads))
        assert len(removed) == 2 or not last.model.masks()  # weights go last
        bears = layers >= 2 and heads >= 3
        publisher.pruner.measured.add(0.9 if bears else 0.5, held_out=True)
    assert [(s.channels, round(4 * s.layers), round(4 * s.heads)) for s in removed] == [
        (1, 2, 4), (1, 4, 3),
    ]  # fmt: skip
    assert seen[-1] == (2, 3)  # what was settled, the model before it was removed
    assert {layers for layers, _ in seen} >= {4, 3, 2, 1}
    assert min(heads for _, heads in seen) < 3
    assert all(heads == 4 for layers, heads in seen if layers > 2)  # in turn
    assert publisher.channels is not None
    assert publisher.channels.gone == ("layers.2", "layers.3")
    assert publisher.pruner.levels["sparsity"] > 0


@pytest.mark.parametrize("at", [4, 7, 11, 15, 19])
def test_a_search_for_layers_and_heads_goes_on_after_a_resume_as_if_nothing_had_been(
    at: int, federation: Any, tmp_path: Path
) -> None:
    policy = Policy(**{**STRUCTURES, "pruning_begin": 1, "pruning_end": 24}, hysteresis=0.5)
    given = layered(22)

    def publish(grid: Any, masters: Any, resumed: bool = False) -> list[Any]:
        grid.try_channels(residual_in_order)
        grid.expect_rounds(30)
        found = []
        for number, one in enumerate(masters):
            again = resumed and not number  # was measured, and is narrow
            left = grid.channels()
            record = to_record(dict(one if again or left is None else left.arrays(one)))
            if not again and (plan := grid.settled_channels()) is not None:
                record = grid.remove_channels(record, plan)
            model = grid.published(record)
            found.append((record, model))
            outs = [a for n, a in model.arrays().items() if n.endswith("out.weight") and a.any()]
            bears = len(outs) >= 3 and max(int(a.any(0).sum()) for a in outs) >= 6
            if not again:
                grid.note_metrics({"accuracy": 0.9 if bears else 0.5})
        return found

    whole, _, _ = federation(policy)
    expected = publish(whole, given)
    assert whole.channels() is not None
    assert whole.channels().gone == ("layers.3",)
    assert whole.channels().heads
    first, _, _ = federation(policy)
    begun = publish(first, given[:at])
    first.checkpoint(begun[-1][0]).save(tmp_path / "checkpoint.safetensors")
    resumed, _, _ = federation(policy, run_id=77)
    checkpoint = Checkpoint.load(tmp_path / "checkpoint.safetensors")
    resumed.resume(checkpoint)
    found = publish(resumed, [checkpoint.arrays, *given[at:]], resumed=True)
    for (_, one), (_, other) in zip(found, expected[at - 1 :], strict=True):
        assert one.arrays().keys() == other.arrays().keys()
        assert all(np.array_equal(a, other.arrays()[n]) for n, a in one.arrays().items())
    assert resumed.channels().shares == whole.channels().shares


def test_where_no_layer_can_go_the_next_knob_is_turned() -> None:
    policy = Policy(**{**STRUCTURES, "pruning_begin": 1, "pruning_end": 40})
    publisher = Publisher(policy, b"s", policy.pruning(60))
    publisher.expect(60)

    def choose(master: Any, share: float, removed: Any, **shares: float) -> ChannelPlan:
        if shares.get("layers", 1.0) < 1:
            raise PlanError("no layer would be left")
        return residual_in_order(master, share, removed, **shares)  # type: ignore[no-any-return]

    publisher.choose = choose
    found = None
    for master in layered(20):
        publisher.publish(master)
        publisher.pruner.measured.add(0.9, held_out=True)
        found = found or publisher.settled
    assert publisher.pruner.levels["layers"] == 4
    assert found is not None
    assert found.gone == ()
    assert found.shares == Shares(heads=0.25)
    assert publisher.pruner.levels["sparsity"] == 0  # it waits until the heads are gone


def test_layers_and_heads_that_can_go_are_found_and_gone(trained: Any, tmp_path: Path) -> None:
    def inputs() -> torch.Tensor:
        return examples(5, 40)[0]

    chooser = module_chooser(stacked, inputs)
    policy = Policy(**{**STRUCTURES, "pruning_begin": 2, "pruning_end": 16})
    events = trained(policy, 18, by_server=False, factory=stacked, channels=chooser)
    gone = removals(events)
    assert 1 <= len(gone) <= 2
    last = gone[-1]
    assert last["layers"] < 1 or last["heads"] < 1
    checkpoint = Checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")
    assert checkpoint.channels is not None
    assert checkpoint.channels.layers_share == pytest.approx(last["layers"])
    assert checkpoint.channels.heads_share == pytest.approx(last["heads"])
    fit_module(stacked(), checkpoint.channels).load_state_dict(
        {n: torch.from_numpy(a.copy()) for n, a in checkpoint.arrays.items()}
    )
    rounds = rounds_of(events)
    assert all(r["sparsity"] == 0 for r in rounds if r["round"] < last["round"])
    score = [r["client_metrics"]["evaluate"]["eval-accuracy"] for r in rounds[1:]]
    assert score[-1] >= max(score[:3]) - 0.03


def test_layers_behind_whose_addition_there_is_a_norm_are_not_tried(trained: Any) -> None:
    chooser = module_chooser(lambda: residual(norm_first=False), lambda: torch.randn(2, 6, 4))
    master = {n: t.numpy() for n, t in residual(norm_first=False).state_dict().items()}
    with pytest.raises(
        PlanError, match=r"layers of Attentive.*norm behind what it adds.*prunecast"
    ):
        check_channels(ChannelSchedule(), chooser, master, 20, tries=("layers",))
    check_channels(ChannelSchedule(), chooser, master, 20, tries=("heads",))
    chooser = module_chooser(residual, lambda: torch.randn(2, 6, 4))
    master = {n: t.numpy() for n, t in residual().state_dict().items()}
    check_channels(ChannelSchedule(), chooser, master, 20, tries=("layers", "heads"))
    with pytest.raises(PlanError, match=r"channels of Attentive.*LayerNorm"):
        check_channels(ChannelSchedule(), chooser, master, 20, tries=("channels",))
    plain = module_chooser(normalised, lambda: torch.ones(2, INPUTS))
    master = {n: t.numpy() for n, t in normalised().state_dict().items()}
    for kind, said in (("heads", "no attention"), ("layers", "no residual layer")):
        with pytest.raises(PlanError, match=said):
            check_channels(ChannelSchedule(), plain, master, 20, tries=(kind,))
    with pytest.raises(PlanError, match="take module_chooser"):
        check_channels(ChannelSchedule(), by_norm, masters(1)[0], 20, tries=("heads",))
