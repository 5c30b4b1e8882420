"""Modules pruned alone: at once and along a schedule, by every criterion, with channels."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunecast.client import prune_module
from prunecast.client.training.trainer import TensorBatches, evaluate
from prunecast.compression.pruning.allocation import ALLOCATIONS
from prunecast.compression.pruning.criteria import CRITERIA
from prunecast.compression.pruning.patterns import parse_pattern
from prunecast.compression.pruning.plan import ChannelSchedule, PlanError, PruningPlan
from prunecast.compression.pruning.schedules import (
    SCHEDULES,
    CubicSchedule,
    OneShotSchedule,
    StaticSchedule,
)
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.pruning.structure.narrowing import choose_channels, fit_module
from prunecast.compression.pruning.training import modules
from prunecast.simulations.networks import (
    attention,
    convolutional,
    factorisation,
    graphs,
    recurrent,
    residual,
)
from support.networks import Tied

IMAGE = (torch.rand(2, 1, 28, 28),)
FAMILIES: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "cnn": (convolutional.narrow_lenet, IMAGE),
    "resnet-batch": (residual.small_resnet_batch, IMAGE),
    "resnet-group": (residual.small_resnet_group, IMAGE),
    "lstm": (recurrent.small_lstm, IMAGE),
    "transformer": (attention.small_transformer, IMAGE),
    "lora": (attention.lora_language_model, (torch.randint(0, 32, (2, 8)),)),
    "graph": (graphs.gcn, (torch.rand(2, 5, 16), torch.rand(2, 5, 5))),
    "factorisation": (factorisation.matrix_factorisation, (torch.arange(9), torch.arange(9))),
    "conv1d": (convolutional.sensor_cnn, (torch.rand(2, 6, 16),)),
}


def seeded(make: Any, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def rings() -> tuple[nn.Module, TensorBatches]:
    """A network of three classes, and data that it learns."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (256,), generator=generator)
    inputs = torch.randn(256, 32, generator=generator) + labels[:, None]
    loader = TensorBatches(inputs, labels, batch_size=32)
    make = lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 3))  # noqa: E731, E501  # fmt: skip
    return seeded(make), loader


def plan(final: float = 0.9, **how: Any) -> PruningPlan:
    return PruningPlan(**{"schedule": OneShotSchedule(final, 1, 2), "min_size": 64, **how})


def zeros(module: nn.Module, masks: dict[str, np.ndarray]) -> None:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        values = parameters[name].detach().numpy()
        assert not values[~mask].view(np.uint32).any(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("allocation", ["layer", "global"])
def test_at_once_in_place_for_every_family(family: str, allocation: str) -> None:
    make, example = FAMILIES[family]
    module = seeded(make)
    before = copy.deepcopy(module.state_dict())
    pruned = prune_module(
        module, plan(0.8, allocation=ALLOCATIONS[allocation], adapters=True), example
    )
    assert pruned.module is module
    zeros(module, pruned.masks)
    report = pruned.report()
    assert report.removed == sum(int((~m).sum()) for m in pruned.masks.values())
    assert 0.79 < report.removed / report.weights <= 0.8
    assert set(report.sparsity) == set(pruned.masks)
    assert report.parameters[0] == report.parameters[1]
    assert report.macs[0] == report.macs[1] >= report.effective_macs
    for name, tensor in module.state_dict().items():
        if name not in pruned.masks:
            assert torch.equal(tensor, before[name])
        else:
            kept = torch.from_numpy(pruned.masks[name])
            assert torch.equal(tensor[kept], before[name][kept])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_measures_what_it_needs_itself(criterion: str) -> None:
    module, loader = rings()
    before = copy.deepcopy(module.state_dict())
    example = (torch.rand(1, 32),)
    pruned = prune_module(
        module, plan(0.5, criterion=CRITERIA[criterion]), example, loader=loader, batches=2
    )
    assert {n: m.mean() for n, m in pruned.masks.items()} == {
        "0.weight": 0.5, "2.weight": 0.5, "4.weight": 0.5
    }  # fmt: skip
    other = prune_module(seeded(lambda: rings()[0]), plan(0.5), example).masks
    differs = any((other[n] != mask).any() for n, mask in pruned.masks.items())
    assert differs == (criterion not in ("magnitude", "batch-norm")) or criterion == "batch-norm"
    for name, parameter in module.named_parameters():
        assert parameter.grad is None
        if name.endswith("bias"):
            assert torch.equal(parameter, before[name])


def test_taylor_ranks_by_weight_times_mean_gradient() -> None:
    module, loader = rings()
    work = copy.deepcopy(module)
    for inputs, targets in loader:
        nn.functional.cross_entropy(work(inputs), targets).backward()
    scores = (work[0].weight * work[0].weight.grad).abs().detach().numpy().ravel()
    pruned = prune_module(
        module,
        plan(0.5, criterion=CRITERIA["taylor"], exclude=("2.*", "4.*")),
        (torch.rand(1, 32),),
        loader=loader,
        batches=8,
    )
    removed = ~pruned.masks["0.weight"].ravel()
    assert scores[removed].max() <= scores[~removed].min() * (1 + 1e-4)


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "snip", "activation", "movement"])
def test_without_a_loader_they_say_so(criterion: str) -> None:
    module, _ = rings()
    with pytest.raises(PlanError, match="give prune_module a loader"):
        prune_module(module, plan(0.5, criterion=CRITERIA[criterion]), (torch.rand(1, 32),))
    with pytest.raises(PlanError, match="the loader is empty"):
        prune_module(
            module, plan(0.5, criterion=CRITERIA[criterion]), (torch.rand(1, 32),), loader=[]
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_along_a_schedule_in_a_loop_of_three_lines(schedule: str) -> None:
    module, loader = rings()
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.01)
    chosen = PruningPlan(schedule=SCHEDULES[schedule](0.9, 1, 5), min_size=64)
    pruned = prune_module(module, chosen, (torch.rand(1, 32),), optimizer=optimiser, every=8)
    reached = []
    for _ in range(6):
        for inputs, targets in loader:
            optimiser.zero_grad()
            nn.functional.cross_entropy(module(inputs), targets).backward()
            optimiser.step()
        zeros(module, pruned.masks)
        reached.append(pruned.report().removed)
    assert reached == sorted(reached)
    assert reached[-1] == int(0.9 * 2048) + int(0.9 * 3072) + int(0.9 * 144)
    assert (reached[0] == reached[-1]) == (schedule in ("one-shot", "static"))
    assert evaluate(module, loader, device="cpu").accuracy > 0.5  # chance is a third
    pruned.release()
    nn.functional.cross_entropy(module(loader._inputs), loader._targets).backward()
    optimiser.step()
    assert module[0].weight.detach().numpy()[~pruned.masks["0.weight"]].any()


@pytest.mark.parametrize("criterion", ["taylor", "movement", "fisher", "snip"])
def test_gradual_by_criteria_that_follow_training(criterion: str) -> None:
    module, loader = rings()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    chosen = plan(criterion=CRITERIA[criterion], schedule=CubicSchedule(0.8, 1, 4))
    pruned = prune_module(
        module, chosen, (torch.rand(1, 32),), optimizer=optimiser, every=4, loader=loader
    )
    seen: dict[str, np.ndarray] = {}
    for _ in range(3):
        for inputs, targets in loader:
            optimiser.zero_grad()
            nn.functional.cross_entropy(module(inputs), targets).backward()
            optimiser.step()
            for name, mask in pruned.masks.items():  # what is gone stays gone
                assert not (mask & ~seen.get(name, mask)).any()
            seen = dict(pruned.masks)
    zeros(module, pruned.masks)
    assert pruned.report().removed == int(0.8 * 2048) + int(0.8 * 3072) + int(0.8 * 144)


def test_gradual_ends_above_at_once() -> None:
    """The same sparsity and steps: recovering on the way is worth more than none at all."""
    losses = []
    for schedule in (CubicSchedule(0.97, 1, 15), StaticSchedule(0.97, 1, 15)):
        module, loader = rings()
        optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
        prune_module(
            module, plan(schedule=schedule), (torch.rand(1, 32),), optimizer=optimiser, every=8
        )
        for _ in range(20):
            for inputs, targets in loader:
                optimiser.zero_grad()
                nn.functional.cross_entropy(module(inputs), targets).backward()
                optimiser.step()
        losses.append(evaluate(module, loader, device="cpu").loss)
    assert losses[0] < losses[1]


def test_channels_then_weights() -> None:
    module, example = seeded(residual.small_resnet_batch), IMAGE
    chosen = plan(0.5, channels=ChannelSchedule(0.5, (1,)))
    pruned = prune_module(module, chosen, example)
    assert pruned.module is not module
    assert pruned.module.training
    assert pruned.channels is not None
    report = pruned.report()
    assert report.parameters[1] < 0.35 * report.parameters[0]
    assert report.macs[1] < 0.35 * report.macs[0]
    assert report.effective_macs < 0.75 * report.macs[1]
    zeros(pruned.module, pruned.masks)
    assert pruned.module(*example).shape == module(*example).shape
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(PlanError, match="remove channels first"):
        prune_module(module, chosen, example, optimizer=optimiser)


@pytest.mark.parametrize(
    ("criterion", "fetched"),
    [
        ("magnitude", [0, 5, 0, 0, 0]),  # one event, at the second step
        ("batch-norm", [0, 5 + 6, 0, 0, 0]),  # all of the model, too, buffers included
        # what looks at updates fetches at every version, but no longer than anything can go
        ("movement", [5, 5, 0, 0, 0]),
    ],
)
def test_no_parameter_is_fetched_where_nothing_happens(
    criterion: str, fetched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 48, bias=False), nn.Linear(48, 3))
    module.register_buffer("free", torch.ones(3))
    count = [0]

    def counting(tensor: Tensor) -> np.ndarray[Any, Any]:
        count[0] += 1
        return array(tensor)

    array = modules._array
    monkeypatch.setattr(modules, "_array", counting)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    how = plan(0.5, schedule=OneShotSchedule(0.5, 2, 4), criterion=CRITERIA[criterion])
    pruned = prune_module(module, how, (torch.rand(1, 32),), optimizer=sgd)
    found = []
    for _ in fetched:
        before = count[0]
        module(torch.rand(4, 32)).square().sum().backward()
        sgd.step()
        found.append(count[0] - before)
    assert found == fetched
    assert {n: float(m.mean()) for n, m in pruned.masks.items()} == dict.fromkeys(
        ("0.weight", "1.weight", "2.weight"), 0.5
    )


def test_a_plan_of_channels_alone_and_one_of_another_architecture() -> None:
    module, example = seeded(residual.small_resnet_batch), IMAGE
    channels = choose_channels(module, example, 0.5)
    pruned = prune_module(module, channels, example)
    assert (pruned.masks, pruned.channels) == ({}, channels)
    with pytest.raises(PlanError, match="of another architecture: Sequential has no tensor"):
        prune_module(seeded(convolutional.narrow_lenet), channels, example)
    wide = ChannelPlan({"weight": (np.array([True, False, True]), None)})
    with pytest.raises(PlanError, match=r"Linear has 'weight' of shape \[4, 4\]"):
        prune_module(nn.Linear(4, 4), wide, (torch.rand(1, 4),))


def test_whole_heads_go_beside_channels_and_weights() -> None:
    module, example = seeded(attention.small_transformer), IMAGE
    plan = PruningPlan(
        schedule=StaticSchedule(0.5),
        channels=ChannelSchedule(0.5, (1,), heads=0.5),
    )
    pruned = prune_module(module, plan, example)
    assert pruned.channels is not None
    assert pruned.channels.shares == (0.5, 0.5, 1)
    state = pruned.module.state_dict()
    # two heads of 16 dimensions, of an input of half the width
    assert state["layers.layers.0.self_attn.in_proj_weight"].shape == (3 * 32, 32)
    assert pruned.masks["layers.layers.0.self_attn.in_proj_weight"].shape == (3 * 32, 32)
    again = fit_module(seeded(attention.small_transformer), pruned.channels)
    again.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(again.eval()(*example), pruned.module.eval()(*example))
    # one that came from elsewhere, without the steps of its choice
    told = ChannelPlan.from_bytes(pruned.channels.coded)
    assert prune_module(module, told, example).module.state_dict().keys() == state.keys()


def test_tied_weights_are_pruned_once_or_not_at_all() -> None:
    module, example = seeded(Tied), (torch.arange(4),)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    pruned = prune_module(module, plan(0.75), example, optimizer=optimiser)
    module(*example).sum().backward()
    optimiser.step()
    zeros(module, pruned.masks)
    assert (pruned.report().weights, pruned.report().removed) == (640, 480)
    with pytest.raises(PlanError, match="tied weights would be pruned apart"):
        prune_module(module, plan(0.75, exclude=("head.*",)), example)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"exclude": ("*",)}, "no tensor that may be pruned"),
        ({"min_size": 10**6}, "no tensor that may be pruned"),
        ({"pattern": parse_pattern("2:4"), "schedule": StaticSchedule(0.9)}, "comes to a sparsity"),
        ({"pattern": parse_pattern("3:5"), "schedule": StaticSchedule(0.4)}, "does not divide"),
        (
            {"schedule": StaticSchedule(0.9999), "allocation": ALLOCATIONS["global"]},
            "would vanish",
        ),
    ],
)
def test_what_cannot_be_pruned_is_said(how: dict[str, Any], message: str) -> None:
    module, _ = rings()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(PlanError, match=message):
        prune_module(module, plan(**how), (torch.rand(1, 32),))
    with pytest.raises(PlanError, match="at least one step"):
        prune_module(module, plan(), (torch.rand(1, 32),), every=0)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(ValueError, match="sparsity must be in"):
        StaticSchedule(1.0)
