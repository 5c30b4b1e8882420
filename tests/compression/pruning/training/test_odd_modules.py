"""Modules pruned alone that are not what most are: tied, compiled, parametrised, broken, empty."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from prunecast.client import prune_module
from prunecast.compression.pruning.allocation import ALLOCATIONS
from prunecast.compression.pruning.criteria import CRITERIA
from prunecast.compression.pruning.plan import PlanError, PruningPlan
from prunecast.compression.pruning.schedules import OneShotSchedule, StaticSchedule
from support.networks import Tied


def plan(final: float = 0.9, **how: Any) -> PruningPlan:
    return PruningPlan(**{"schedule": OneShotSchedule(final, 1, 2), "min_size": 64, **how})


def rings() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network of three classes, and batches for it."""
    torch.manual_seed(0)
    layers = (nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 3))
    return nn.Sequential(*layers), [(torch.randn(8, 32), torch.randint(0, 3, (8,)))]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_tied_zeros_are_tied_and_equal_layers_are_not(allocation: str) -> None:
    """A module says itself which of its parameters are one."""
    module, example = Tied(), (torch.arange(4),)
    nn.init.zeros_(module.tokens.weight)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    how = {"schedule": StaticSchedule(0.75), "allocation": ALLOCATIONS[allocation]}
    pruned = prune_module(module, plan(**how), example, optimizer=optimiser)
    assert (pruned.report().weights, pruned.report().removed) == (640, 480)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    module = nn.TransformerEncoder(layer, 2)  # of two copies of the layer
    pruned = prune_module(module, plan(exclude=("layers.0.*",), **how), (torch.rand(1, 3, 16),))
    assert (pruned.report().weights, pruned.report().removed) == (2048, 1536)


def test_a_compiled_module_is_pruned_by_the_names_of_the_plain_one() -> None:
    module, _ = rings()
    compiled, inputs = torch.compile(module, backend="eager"), torch.rand(1, 32)
    optimiser = torch.optim.SGD(compiled.parameters(), lr=0.1)
    pruned = prune_module(compiled, plan(exclude=("0.*",)), (inputs,), optimizer=optimiser)
    for _ in range(2):
        compiled(inputs).sum().backward()
        optimiser.step()
    assert pruned.module is compiled
    assert pruned.masks.keys() == {"2.weight", "4.weight"}
    for name, mask in pruned.masks.items():
        assert not module.state_dict()[name].numpy()[~mask].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_weights_and_gradients_that_are_not_finite_are_refused(
    allocation: str, value: float
) -> None:
    module, loader = rings()
    how = plan(allocation=ALLOCATIONS[allocation])
    with torch.no_grad():
        module[2].weight[0, 0] = value
    with pytest.raises(PlanError, match=r"'2\.weight' holds NaN or an infinity"):
        prune_module(module, how, (torch.rand(1, 32),))
    module, _ = rings()
    broken = [(inputs * value, labels) for inputs, labels in loader]
    taylor = plan(allocation=ALLOCATIONS[allocation], criterion=CRITERIA["taylor"])
    with pytest.raises(PlanError, match=r"gradient of '0\.weight' is NaN or infinite"):
        prune_module(module, taylor, (torch.rand(1, 32),), loader=broken)


def test_what_cannot_be_measured_is_said() -> None:
    module, loader = rings()
    how, example = plan(criterion=CRITERIA["snip"]), (torch.rand(1, 32),)
    with pytest.raises(PlanError, match="give one that can be gone through again"):
        prune_module(module, how, example, loader=iter(()))
    with pytest.raises(PlanError, match="every parameter is frozen"):
        prune_module(module.requires_grad_(False), how, example, loader=loader)


def test_parameters_without_values_are_refused() -> None:
    for module in (nn.Linear(32, 8, device="meta"), nn.LazyLinear(8)):
        with pytest.raises(PlanError, match="'weight' has no values yet"):
            prune_module(module, plan(), (torch.rand(1, 32),))


def test_zeros_come_through_a_parametrisation_or_are_refused() -> None:
    example = (torch.rand(2, 32),)
    for made in (parametrizations.spectral_norm, parametrizations.weight_norm):
        layer = made(nn.Linear(32, 64))
        pruned = prune_module(layer, plan(0.5), example)
        (mask,) = pruned.masks.values()
        assert mask.shape == (64, 32)
        assert not layer.weight.detach().numpy()[~mask].any()
        assert layer(*example).isfinite().all()
    rows = plan(0.5, criterion=CRITERIA["l2"])
    for made, how, why in (
        (parametrizations.weight_norm, rows, "WeightNorm makes NaN of a row"),
        (nn.utils.weight_norm, rows, "weight_norm makes NaN of a row of 'weight_v'"),
        (parametrizations.orthogonal, plan(0.5), "other values of zeros"),
    ):
        layer = made(nn.Linear(32, 64))
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(PlanError, match=why):
            prune_module(layer, how, example)
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "snip"])
def test_embeddings_with_sparse_gradients_are_measured(criterion: str) -> None:
    words = torch.randint(0, 9, (20, 4))
    batches = [(words, torch.randint(0, 3, (20,)))]
    module = nn.Sequential(nn.EmbeddingBag(50, 16, sparse=True), nn.Linear(16, 3))
    how = plan(schedule=StaticSchedule(0.9), criterion=CRITERIA[criterion])
    pruned = prune_module(
        module, how, (words,), loader=batches, loss_fn=nn.functional.cross_entropy
    )
    assert not pruned.masks["0.weight"][9:].any()  # words that no batch has
    assert pruned.masks["0.weight"].sum() == 80
