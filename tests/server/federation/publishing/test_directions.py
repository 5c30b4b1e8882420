"""What weight_norm divides by its norm is never published as zeros."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from prunecast.server.federation import Policy
from prunecast.server.federation.publishing.publisher import Publisher


@pytest.mark.parametrize("masks", ["dpf", "held"])
@pytest.mark.parametrize("criterion", ["magnitude", "l2", "random"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("made", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_no_direction_of_weight_norm_vanishes(made, criterion, masks):
    """Divided by its norm it would be NaN on every node."""
    kinds = {"dim": 0}, {"dim": 1}, {"dim": None}
    layers = [made(nn.Linear(20, 64), **kind) for kind in kinds]
    layers += [made(nn.LSTM(6, 20), name="weight_hh_l0"), made(nn.Linear(1, 64))]
    module = nn.Sequential(*layers)
    with torch.no_grad():
        module[0].weight.mul_(torch.linspace(1e-3, 1, 64)[:, None])
    policy = Policy(
        sparsity=0.97, pruning_scope="global", pruning_criterion=criterion, pruning_masks=masks,
        pruning_begin=1, pruning_end=3, pruning_min_size=64,
    )  # fmt: skip
    publisher = Publisher(policy, b"s", policy.pruning())
    master = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    for _ in range(4):
        model = publisher.publish(master).model
        module.load_state_dict({n: torch.from_numpy(a.copy()) for n, a in model.arrays().items()})
        for layer in module:
            recurrent = isinstance(layer, nn.LSTM)
            outputs = layer(torch.ones(2, layer.input_size if recurrent else layer.in_features))
            assert (outputs[0] if recurrent else outputs).isfinite().all()
        assert model.sparsity() > 0.8 or model.counter < 3


def test_what_is_called_like_a_direction_and_is_none_is_pruned_as_ever():
    rng = np.random.default_rng(0)
    master = {n: rng.normal(size=(40, 50)).astype(np.float32) for n in ("w_g", "w_v")}
    policy = Policy(sparsity=0.9, pruning_schedule="static", pruning_min_size=1)
    masks = Publisher(policy, b"s", policy.pruning()).publish(master).model.masks()
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"w_g": 200, "w_v": 200}
