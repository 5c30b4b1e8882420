"""What every criterion, allocation and schedule owes every family of networks.

And what each criterion needs really arrives from the ready ClientApp, in a federation of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp.strategy import FedAvg
from torch import nn

from prunecast.client.training import compression_mod
from prunecast.client.training.client_app import LocalTraining, build_client_app
from prunecast.client.training.trainer import TensorBatches
from prunecast.compression.pruning.allocation import ALLOCATIONS
from prunecast.compression.pruning.criteria import CRITERIA, Knowledge
from prunecast.compression.pruning.patterns import NOfM
from prunecast.compression.pruning.plan import PruningPlan
from prunecast.compression.pruning.schedules import SCHEDULES, LayerSchedule
from prunecast.compression.pruning.statistics import (
    ACTIVATION,
    GRADIENT,
    SENSITIVITY,
    statistic_shape,
)
from prunecast.server.federation import CompressedGrid, Policy
from prunecast.simulations.networks import (
    attention,
    convolutional,
    factorisation,
    graphs,
    recurrent,
    residual,
)
from prunecast.simulations.runner.inprocess import InProcessGrid

FAMILIES = {
    "cnn": convolutional.lenet,
    "resnet-batch": residual.small_resnet_batch,
    "resnet-group": residual.small_resnet_group,
    "conv1d": convolutional.sensor_cnn,
    "lstm": lambda: recurrent.lstm_language_model(width=48),
    "transformer": lambda: attention.language_model(width=32),
    "lora": lambda: attention.lora_language_model(width=32, rank=4),
    "graph": graphs.gcn,
    "factorisation": factorisation.matrix_factorisation,
}
EXCLUDED = {"lora": "nothing", "factorisation": "user*"}  # else what a network ends with
FINAL, BEGIN, END = 0.75, 1, 5


@cache
def known(family: str, criterion: str) -> Knowledge:
    """A network's weights, and whatever the criterion asks for, of which a part is missing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = FAMILIES[family]().state_dict()
    model = {name: tensor.numpy() for name, tensor in state.items()}
    weights = plan(family).prunable({n: a for n, a in model.items() if np.isfinite(a).all()})
    rng = np.random.default_rng(1)
    drawn = {n: rng.normal(size=w.shape).astype(np.float32) for n, w in list(weights.items())[:-1]}
    statistics = {
        statistic: {
            name: np.abs(rng.normal(size=statistic_shape(statistic, weights[name].shape)))
            for name in drawn
        }
        for statistic in CRITERIA[criterion].statistics
    }
    found = Knowledge(weights, drawn, statistics, {}, model, seed=3)
    accumulates = CRITERIA[criterion].accumulates
    return found if accumulates is None else replace(found, accumulated=accumulates(found))


def plan(family: str, schedule: str = "cubic", **changes: Any) -> PruningPlan:
    exclude = EXCLUDED.get(family, "second*" if family == "graph" else "head*")
    return PruningPlan(
        SCHEDULES[schedule](FINAL, BEGIN, END), min_size=64, exclude=(exclude,), **changes
    )


def removed(masks: Mapping[str, np.ndarray]) -> int:
    return sum(int(np.count_nonzero(~mask)) for mask in masks.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ALLOCATIONS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_masks_are_what_the_plan_says(criterion: str, scope: str, family: str) -> None:
    given = known(family, criterion)
    sizes = {name: weight.size for name, weight in given.weights.items()}
    scores = CRITERIA[criterion].scores(given)
    assert list(scores) == list(given.weights)
    for name, score in scores.items():
        assert score.shape == given.weights[name].shape
        assert (score >= 0).all()
    for schedule in SCHEDULES:
        chosen = plan(
            family, schedule, criterion=CRITERIA[criterion], allocation=ALLOCATIONS[scope]
        )
        version = END - 2 if schedule != "one-shot" else END
        masks = chosen.masks(version, given)
        again = chosen.masks(version, given)
        assert {n: m.tobytes() for n, m in masks.items()} == {
            n: m.tobytes() for n, m in again.items()
        }
        assert all(mask.any() for mask in masks.values()), schedule
        assert all(mask.shape == given.weights[name].shape for name, mask in masks.items())
        layered = isinstance(chosen.schedule, LayerSchedule)
        sparsity = FINAL if layered else chosen.schedule(version)
        assert sparsity > 0
        if layered:
            due = chosen.schedule.due(version, len(sizes))
            assert list(masks) == list(sizes)[:due], schedule
        else:
            assert masks.keys() == sizes.keys(), schedule
        if scope == "layer":
            for name, mask in masks.items():
                assert removed({name: mask}) == int(sparsity * sizes[name]), schedule
        elif not layered:
            assert removed(masks) == int(sparsity * sum(sizes.values())), schedule


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_alone_is_in_no_mask(family: str) -> None:
    given = known(family, "magnitude")
    kinds = {name.rpartition(".")[2] for name in given.weights}
    assert "bias" not in kinds
    assert not any("norm" in name or "running" in name for name in given.weights)
    assert all(weight.ndim >= 2 for weight in given.weights.values())
    left = given.model.keys() - given.weights.keys()
    assert left
    if family == "lora":
        assert list(given.weights) == ["head.weight"]
        asked = plan(family, adapters=True).prunable(given.model)
        assert any("lora_a" in name for name in asked)
        assert any("lora_b" in name for name in asked)
    if family == "lstm":
        assert {
            "tokens.weight",
            "layers.weight_ih_l0",
            "layers.weight_hh_l0",
        } <= given.weights.keys()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_two_of_four_hold_for_every_criterion(criterion: str, family: str) -> None:
    pattern = NOfM(2, 4)
    given = known(family, criterion)
    fitting = {n: w for n, w in given.weights.items() if not pattern.misfit(w.shape)}
    assert fitting
    chosen = replace(
        plan(family, criterion=CRITERIA[criterion]),
        schedule=SCHEDULES["cubic"](0.5, BEGIN, END),
        pattern=pattern,
    )
    chosen.check(fitting)
    for version in (BEGIN + 1, END):
        masks = chosen.masks(version, replace(given, weights=fitting))
        assert masks.keys() == fitting.keys()
        for mask in masks.values():
            groups = np.moveaxis(mask, 1, -1).reshape(-1, 4).sum(1)
            assert groups.min() >= 2
            assert version < END or groups.max() == 2
            assert removed({"": mask}) == int(chosen.schedule(version) * mask.size)


# -- what nodes contribute ------------------------------------------------------------------------


class Layers(nn.Module):
    """A convolution with BatchNorm, and linear layers that are tied to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.wide, self.head = nn.Linear(8 * 16, 24), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x))).flatten(1)
        return torch.as_tensor(self.head(torch.relu(self.wide(x))))


def examples(context: Context) -> tuple[TensorBatches, None]:
    generator = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    labels = torch.randint(0, 3, (48,), generator=generator)
    images = torch.randn(48, 2, 4, 4, generator=generator) + labels[:, None, None, None]
    images[:, 1] *= 0.1  # a channel that hardly says anything
    return TensorBatches(images, labels, batch_size=12, shuffle=True), None


def arrived(criterion: str, given: Knowledge) -> dict[str, Mapping[str, np.ndarray]]:
    """What the criterion ranks by beside the weights."""
    found: dict[str, Mapping[str, np.ndarray]] = {**given.statistics}
    if CRITERIA[criterion].uses_update:
        found["update"] = given.update
    if CRITERIA[criterion].accumulates is not None:
        found["accumulated"] = given.accumulated
    return found


NEEDS = {
    "taylor": {"update"},
    "fisher": {GRADIENT},
    "movement": {"update", "accumulated"},
    "snip": {SENSITIVITY},
    "activation": {ACTIVATION},
}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_a_criterion_needs_arrives_in_a_federation(
    criterion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked: list[Knowledge] = []
    original = CRITERIA[criterion]

    def scores(given: Knowledge) -> Mapping[str, np.ndarray]:
        ranked.append(given)
        return original.scores(given)

    monkeypatch.setitem(CRITERIA, criterion, replace(original, scores=scores))
    settings = LocalTraining(learning_rate=0.05, device="cpu")
    app = build_client_app(
        lambda context: Layers(), examples, settings, mods=[compression_mod(tmp_path)]
    )
    policy = Policy(
        sparsity=0.6, pruning_criterion=criterion, pruning_begin=1, pruning_end=3,
        pruning_min_size=64,
    )  # fmt: skip
    grid = CompressedGrid(InProcessGrid(app, 2), policy, poll_interval=0.01)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        initial = ArrayRecord(Layers().state_dict())
    result = FedAvg(fraction_evaluate=0.0).start(grid=grid, initial_arrays=initial, num_rounds=3)

    assert len(ranked) >= 2  # rounds after pruning began
    prunable = {"conv.weight", "wide.weight", "head.weight"}
    for given in ranked:
        assert given.weights.keys() == prunable
        found = arrived(criterion, given)
        assert found.keys() == NEEDS.get(criterion, set())
        for arrays in found.values():
            assert prunable <= arrays.keys()
            assert all(np.asarray(arrays[name]).any() for name in prunable)
    last = ranked[-1]
    by_size = CRITERIA["magnitude"].scores(last)
    # not what it falls back on: another order of weights
    mine = original.scores(last)
    order = {name: np.argsort(np.ravel(mine[name]), kind="stable") for name in prunable}
    other = {name: np.argsort(np.ravel(by_size[name]), kind="stable") for name in prunable}
    differ = any(not np.array_equal(order[name], other[name]) for name in prunable)
    assert differ == (criterion != "magnitude")
    masks = grid.published(result.arrays).masks()
    assert masks.keys() == prunable
    for name, mask in masks.items():
        zeros = 1 - float(mask.mean())
        assert 0.55 <= zeros <= 0.75, name
    if criterion == "batch-norm":
        assert {"norm.weight", "norm.running_var"} <= last.model.keys()
        scale = np.abs(last.model["norm.weight"])
        np.testing.assert_array_equal(mine["conv.weight"][:, 0, 0, 0], scale)
    if criterion == "activation":
        assert last.statistics[ACTIVATION]["conv.weight"].shape == (1, 2, 1, 1)
        assert not masks["conv.weight"][:, 1].mean() > 0.2  # the channel that says nothing
    if criterion == "snip":
        first, *later = (given.statistics[SENSITIVITY]["wide.weight"] for given in ranked)
        assert all(np.array_equal(first, found) for found in later)
        assert (first < 0).any()


class Tied(nn.Module):
    """A bag of tokens whose embedding is the head's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.wide = nn.Embedding(30, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.head(torch.tanh(self.wide(self.tokens(x).mean(1)))))


def sentences(context: Context) -> tuple[TensorBatches, None]:
    generator = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    tokens = torch.randint(0, 30, (48, 5), generator=generator)
    return TensorBatches(tokens, tokens[:, 0], batch_size=12, shuffle=True), None


@pytest.mark.parametrize("criterion", ["fisher", "random"])
def test_tied_weights_stay_tied_in_a_federation(criterion: str, tmp_path: Path) -> None:
    """Nodes measure them once, under their first name; a draw has another value for each name."""
    settings = LocalTraining(learning_rate=0.5, device="cpu")
    app = build_client_app(
        lambda context: Tied(), sentences, settings, mods=[compression_mod(tmp_path)]
    )
    policy = Policy(
        sparsity=0.5, pruning_criterion=criterion, pruning_begin=1, pruning_end=3,
        pruning_scope="global", pruning_min_size=64,
    )  # fmt: skip
    grid = CompressedGrid(InProcessGrid(app, 2), policy, poll_interval=0.01)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        initial = ArrayRecord(Tied().state_dict())
    assert list(initial) == ["tokens.weight", "wide.weight", "wide.bias", "head.weight"]
    result = FedAvg(fraction_evaluate=0.0).start(grid=grid, initial_arrays=initial, num_rounds=3)
    arrays = {name: array.numpy() for name, array in result.arrays.items()}
    np.testing.assert_array_equal(arrays["tokens.weight"], arrays["head.weight"])
    model = grid.published(result.arrays)
    masks = model.masks()
    np.testing.assert_array_equal(masks["tokens.weight"], masks["head.weight"])
    np.testing.assert_array_equal(model.arrays()["tokens.weight"], model.arrays()["head.weight"])
    once = [masks["tokens.weight"], masks["wide.weight"]]
    zeros = 1 - sum(mask.sum() for mask in once) / sum(mask.size for mask in once)
    assert 0.49 < zeros < 0.6
