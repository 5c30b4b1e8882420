"""Masks held on: through thawing, loading, and whatever arrays they are."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from prunecast.client import hold_masks


def prepared() -> tuple[nn.Module, Tensor, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    rng = np.random.default_rng(0)
    masks = {n: rng.random(p.shape) < 0.3 for n, p in model.named_parameters() if p.dim() > 1}
    return model, torch.rand(3, 8), masks


def test_parameters_that_thaw_later_train_as_by_hand() -> None:
    """Their gradients count in no norm, and in no curvature, off their mask."""
    model, inputs, masks = prepared()
    model.requires_grad_(False)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    hold_masks(optimiser, masks, model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)
    model(inputs).sum().backward()
    for name, mask in masks.items():
        gradient = dict(model.named_parameters())[name].grad
        assert gradient is not None
        assert gradient.any()
        assert not gradient.numpy()[~mask].any()


def test_what_is_loaded_meets_the_masks() -> None:
    """Dense weights and moments of before: zero off the mask at once, and so when it widens."""
    model, inputs, masks = prepared()
    optimiser = torch.optim.AdamW(model.parameters())
    model(inputs).sum().backward()
    optimiser.step()
    before = copy.deepcopy((model.state_dict(), optimiser.state_dict()))
    hold_masks(optimiser, masks, model)
    model.load_state_dict(before[0])
    optimiser.load_state_dict(before[1])
    assert not any(model.state_dict()[n].numpy()[~mask].any() for n, mask in masks.items())
    for name, mask in masks.items():
        state = optimiser.state[dict(model.named_parameters())[name]]
        assert not state["exp_avg"].numpy()[~mask].any()


def test_masks_are_any_arrays_and_named_as_compiled_models_name_them() -> None:
    layer = nn.Linear(4, 4)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    mask = np.arange(16).reshape(4, 4) < 5
    for given in (mask[::-1], np.broadcast_to(mask[:1], (4, 4)), mask.T, mask.astype(np.uint8)):
        nn.init.ones_(layer.weight)
        with hold_masks(optimiser, {"_orig_mod.weight": given}, layer):
            assert np.array_equal(layer.weight.detach().numpy() != 0, given)
