"""The product's networks: their sizes, what travels of them, and what they may look at."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from prunecast.common.references import load_callable
from prunecast.compression.pruning.plan import PruningPlan
from prunecast.simulations.networks import attention, convolutional
from prunecast.simulations.scenarios import ScenarioError, scenario_from_mapping

NETWORKS = "prunecast.simulations.networks"
SIZES = {
    "convolutional:digits_cnn": 409_034,
    "convolutional:lenet": 44_426,
    "convolutional:narrow_lenet": 44_246,
    "convolutional:cnn": 1_663_370,
    "convolutional:conv4": 1_933_258,
    "convolutional:normalised_cnn4": 390_880,
    "convolutional:sensor_cnn": 35_270,
    "mobile:mobile_net": 23_955_018,
    "residual:small_resnet_group": 151_738,
    "residual:small_resnet_batch": 151_738,
    "residual:ResNet": 2_797_034,
    "recurrent:small_lstm": 82_186,
    "recurrent:lstm_language_model": 47_392,
    "attention:small_transformer": 108_362,
    "attention:language_model": 106_272,
    "attention:lora_language_model": 18_464,
    "graphs:gcn": 1_348,
    "factorisation:matrix_factorisation": 4_501,
    "tabular:logistic_regression": 63,
    "tabular:mlp": 5_699,
    "autoencoder:autoencoder": 205_856,
}


@pytest.mark.parametrize("name", SIZES)
def test_a_network_has_as_many_parameters_as_it_says(name):
    factory = load_callable(f"{NETWORKS}.{name}")
    module = factory()
    assert sum(parameter.numel() for parameter in module.parameters()) == SIZES[name]
    stated = re.search(r"([\d,]+) parameters", factory.__doc__ or "")
    if stated and "," in stated[1]:
        assert stated[1] == f"{SIZES[name]:,}"


def test_lenet_has_the_layers_of_niid_bench():
    shapes = [tuple(p.shape) for p in convolutional.lenet().parameters() if p.ndim > 1]
    assert shapes == [(6, 1, 5, 5), (16, 6, 5, 5), (120, 256), (84, 120), (10, 84)]


def test_benchmarks_train_the_products_networks():
    from benchmarks.harness.federation import KINDS

    factories = {name: load_callable(kind["factory"]) for name, kind in KINDS.items()}
    assert {factory.__module__.rpartition(".")[0] for factory in factories.values()} == {NETWORKS}
    assert factories["lenet"] is convolutional.narrow_lenet
    assert factories["cnn"] is convolutional.digits_cnn


@pytest.mark.parametrize("name", ["language_model", "lora_language_model"])
def test_a_language_model_does_not_look_ahead(name):
    torch.manual_seed(0)
    model = getattr(attention, name)().eval()
    tokens = torch.randint(0, 32, (2, 32))
    other = tokens.clone()
    other[:, 20:] = (other[:, 20:] + 1) % 32
    with torch.inference_mode():
        here, there = model(tokens), model(other)
        short = model(tokens[:, :9])
    assert torch.equal(here[:, :20], there[:, :20])
    assert not torch.allclose(here[:, 20], there[:, 20])
    torch.testing.assert_close(short, here[:, :9])


def test_a_causal_mask_is_a_buffer_among_the_weights():
    state = attention.language_model(steps=48).state_dict()
    masks = {name: tensor for name, tensor in state.items() if name.endswith(".mask")}
    assert len(masks) == 2
    for mask in masks.values():
        assert torch.isinf(mask).sum() == 48 * 47 // 2


def test_of_a_model_with_adapters_only_these_and_the_head_travel():
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(attention.lora_language_model())
    for model in models:
        names = list(model.state_dict())
        assert all(".lora_" in name or name.startswith("head.") for name in names)
        assert names == [name for name, _ in model.named_parameters()]
    one, two = models
    bases = [dict(model.named_buffers()) for model in models]
    assert sum(buffer.numel() for buffer in bases[0].values()) > 100_000
    assert all(torch.equal(bases[0][name], bases[1][name]) for name in bases[0])
    assert not torch.equal(one.head.weight, two.head.weight)
    # adapters begin as nothing, and are told by their names: they are not pruned
    assert not any(t.any() for n, t in one.state_dict().items() if n.endswith("lora_b"))
    arrays = {name: np.asarray(tensor) for name, tensor in one.state_dict().items()}
    assert list(PruningPlan().prunable(arrays)) == ["head.weight"]


def test_options_of_a_factory_are_keys_of_a_scenario(tiny):
    factory = f"{NETWORKS}.tabular:mlp"
    model = {"factory": factory, "options": {"features": 4, "hidden": 8, "layers": 1}}
    scenario = scenario_from_mapping({**tiny, "model": model})
    module = scenario.model.network()()
    assert [tuple(p.shape) for p in module.parameters()] == [(8, 4), (8,), (3, 8), (3,)]
    assert scenario_from_mapping(scenario.to_mapping()) == scenario
    wrong = scenario_from_mapping({**tiny, "model": {**model, "options": {"wide": 8}}})
    with pytest.raises(ScenarioError, match=r"means nothing to .*mlp; options: features, classes"):
        wrong.model.network()
    none = {"factory": f"{NETWORKS}.convolutional:narrow_lenet", "options": {"classes": 3}}
    with pytest.raises(ScenarioError, match=r"model\.options\.classes: .*it takes none"):
        scenario_from_mapping({**tiny, "model": none}).model.network()
