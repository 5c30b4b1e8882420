"""Whole residual layers: found by what they do, and gone without a trace but their input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunecast.compression.onnx.export import export_graph
from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.pruning.structure.narrowing import (
    choose_channels,
    fit_module,
    narrow_module,
)
from prunecast.compression.pruning.structure.residual import PassThrough, residual_layers
from prunecast.simulations.networks.attention import (
    language_model,
    lora_language_model,
    small_transformer,
)
from prunecast.simulations.networks.residual import small_resnet_batch, small_resnet_group

IMAGE = (torch.rand(2, 1, 28, 28),)
TOKENS = (torch.zeros(2, 8, dtype=torch.int64),)


class Gate(nn.Module):
    """Scales what comes in by what it finds in it; adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(12, 12), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(x * self.one(x))


class Block(nn.Module):
    """Normalises behind the addition, as the first transformers do, and has a gate in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gate, self.norm = nn.Linear(12, 12), Gate(), nn.LayerNorm(12)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return torch.as_tensor(self.norm(x + scale * self.gate(torch.relu(self.linear(x)))))


class Stack(nn.Module):
    """Two such blocks, one that is run twice, and a layer that keeps its shape alone."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.first, self.second = nn.Linear(5, 12), Block(), Block()
        self.twice, self.plain = Block(), nn.Sequential(nn.Linear(12, 12), nn.ReLU())
        self.leave = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.enter(x)), scale=0.5)
        return torch.as_tensor(self.leave(self.plain(self.twice(self.twice(x)))))


def decoder() -> nn.Module:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerDecoderLayer(12, 2, 24, dropout=0.0, batch_first=True)
            self.layers = nn.TransformerDecoder(layer, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.layers(x, 2 * x))

    return Decoder()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


FEATURES = (torch.rand(2, 7, 12),)
FAMILIES: list[tuple[Any, tuple[Tensor, ...], list[str]]] = [
    (Stack, (torch.rand(2, 5),), ["first", "second"]),
    (small_transformer, IMAGE, ["layers.layers.0", "layers.layers.1"]),
    (encoder, FEATURES, ["layers.0", "layers.1"]),
    (decoder, FEATURES, ["layers.layers.0", "layers.layers.1"]),
    (language_model, TOKENS, ["blocks.0", "blocks.1"]),
    (lora_language_model, TOKENS, ["blocks.0", "blocks.1"]),
]


@pytest.mark.parametrize(("make", "example", "names"), FAMILIES)
def test_half_of_them_go_with_all_of_their_tensors(
    make: Any, example: tuple[Tensor, ...], names: list[str]
) -> None:
    torch.manual_seed(1)
    module = make().eval()
    assert residual_layers(module, example) == names
    plan = choose_channels(module, example, 1.0, layers=0.5)
    (gone,) = plan.gone
    assert gone in names
    assert not plan.kept
    narrow = narrow_module(module, example, plan)
    left = {n: t for n, t in module.state_dict().items() if not n.startswith(f"{gone}.")}
    assert narrow.state_dict().keys() == left.keys()
    assert len(left) < len(module.state_dict())
    # what it computes is what the whole module does without the layer
    skipped = copy.deepcopy(module)
    skipped.get_submodule(gone).forward = lambda x, *_, **__: x  # type: ignore[method-assign]
    with torch.no_grad():
        torch.testing.assert_close(narrow(*example), skipped(*example), rtol=1e-4, atol=1e-5)
    fitted = fit_module(make(), ChannelPlan.from_bytes(plan.coded)).eval()
    fitted.load_state_dict(left)
    with torch.no_grad():
        assert torch.equal(fitted(*example), narrow(*example))
    assert isinstance(fitted.get_submodule(gone), PassThrough)
    assert fitted.get_submodule(names[1 - names.index(gone)]).state_dict()


@pytest.mark.parametrize("make", [small_resnet_batch, small_resnet_group])
def test_blocks_that_change_their_shape_stay(make: Any) -> None:
    module = make()
    names = residual_layers(module, IMAGE)
    assert names
    blocks = [n for n, part in module.named_modules() if type(part).__name__ == "_Block"]
    kept = [n for n in blocks if len(module.get_submodule(n).short.state_dict())]
    assert sorted(names + kept) == sorted(blocks)


def test_the_one_without_which_the_outputs_change_least_goes() -> None:
    torch.manual_seed(2)
    module = Stack()
    with torch.no_grad():
        module.second.linear.weight *= 1e-3
        module.second.linear.bias.zero_()
    for block in (module.first, module.second):
        block.norm = nn.Identity()
    plan = choose_channels(module, (torch.rand(2, 5),), 1.0, layers=0.5)
    assert plan.gone == ("second",)


def test_layers_heads_and_channels_go_together_and_one_after_the_other() -> None:
    torch.manual_seed(3)
    module = small_transformer()
    shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    first = choose_channels(module, IMAGE, 0.75, heads=0.5)
    narrow = fit_module(copy.deepcopy(module), first)
    second = choose_channels(narrow, IMAGE, 0.5, first, heads=0.5, layers=0.5)
    both = first.then(second)
    assert both.shares == pytest.approx((0.5, 0.5, 0.5))
    (gone,) = both.gone
    assert not any(name.startswith(f"{gone}.") for name in (*both.kept, *both.heads))
    assert {n.split(".")[2] for n in both.heads} == {"1" if gone.endswith("0") else "0"}
    after = fit_module(narrow, both.since(first)).eval()
    at_once = narrow_module(module, IMAGE, both)
    found = {name: tuple(t.shape) for name, t in after.state_dict().items()}
    assert found == both.shapes(shapes) == second.shapes(first.shapes(shapes))
    assert found == {name: tuple(t.shape) for name, t in at_once.state_dict().items()}
    assert at_once(*IMAGE).shape == (2, 10)
    again = ChannelPlan.from_text(both.to_text())
    assert again.to_text() == both.to_text()
    assert not both.since(both).gone
    # and what cannot be of such plans
    with pytest.raises(PlanError, match=f"the plan keeps layer '{gone}' that is gone"):
        first.since(both)
    with pytest.raises(PlanError, match="of a layer that is gone"):
        both.then(both)
    assert second.misfit(both.shapes(shapes)) == f"{gone}.*"
    with pytest.raises(PlanError, match=rf"Transformer lacks tensor '{gone}\.\*': the plan is of"):
        fit_module(fit_module(copy.deepcopy(module), both), ChannelPlan({}, gone=(gone,)))


def test_a_narrow_encoder_takes_a_padded_batch_and_is_exported() -> None:
    torch.manual_seed(4)
    wide = encoder().eval()
    narrow = narrow_module(wide, FEATURES, choose_channels(wide, FEATURES, 1.0, layers=0.5))
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        assert narrow(*FEATURES, src_key_padding_mask=padding).isfinite()[~padding].all()
    assert len(export_graph(narrow, FEATURES).skeleton) < len(export_graph(wide, FEATURES).skeleton)


def test_what_cannot_be_is_refused_in_a_line() -> None:
    with pytest.raises(PlanError, match=r"a share of 0.2 leaves none of the 2 residual layers of"):
        choose_channels(small_transformer(), IMAGE, 1.0, layers=0.2)
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(PlanError, match="Sequential has no residual layer that could go: set"):
        choose_channels(plain, (torch.rand(1, 4),), 1.0, layers=0.5)
    text = ChannelPlan({}, gone=("a.b", "c"), layers_share=0.5).to_text()
    assert ChannelPlan.from_text(text).gone == ("a.b", "c")
    for gone, said in (
        ('"ab"', "layers that are gone have names"),
        ('["a", 1]', "layers that are gone have names"),
        ('["a", ""]', "layers that are gone have names"),
        ('["a", "a"]', "a layer goes twice"),
        ('["a", "a.b"]', "'a.b' is of a layer that is gone"),
        (f'["a", "{"b." * 70}c"]', "more than 64 parts"),
        ("null", "layers that are gone have names"),
    ):
        with pytest.raises(PlanError, match=f"the plan of channels is damaged: .*{said}"):
            ChannelPlan.from_text(text.replace('["a.b","c"]', gone))
    kept = text.replace('"kept":{}', '"kept":{"c.weight":[0]}').replace(
        '"masks":[]', '"masks":["3:a0"]'
    )
    with pytest.raises(PlanError, match=r"'c.weight' is of a layer that is gone"):
        ChannelPlan.from_text(kept)
