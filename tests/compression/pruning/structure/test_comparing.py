"""What remains of a module computes what it did, or the plan is refused before anything goes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.pruning.structure.comparing import outputs_of, zero_what_goes
from prunecast.compression.pruning.structure.narrowing import (
    choose_channels,
    fit_module,
    narrow_module,
)
from prunecast.compression.pruning.training.modules import prune_module

FEATURES, IMAGE = (torch.randn(2, 5, 6),), (torch.randn(2, 3, 8, 8),)


class Made(nn.Module):
    """A module of parts and a function of them."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def _conv(inner: int, outer: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, padding=1, **options)


def _encoder(**parts: Any) -> dict[str, Any]:
    return {"enter": nn.Linear(6, 16), **parts, "leave": nn.Linear(16, 4)}


def _heads(its: Any, x: Tensor) -> Any:
    q, k, v = (
        part(x).view(*x.shape[:2], its.num_heads, -1).transpose(1, 2)
        for part in (its.q, its.k, its.v)
    )
    made = functional.scaled_dot_product_attention(q, k, v, scale=1.0)
    return its.o(made.transpose(1, 2).flatten(2))


EXACT: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "a group for each input, more outputs": lambda: (
        nn.Sequential(_conv(3, 12, groups=3), nn.ReLU(), _conv(12, 12), nn.ReLU(), _conv(12, 4)),
        IMAGE,
    ),
    "all frozen": lambda: (
        nn.Sequential(_conv(3, 8), nn.ReLU(), _conv(8, 4)).requires_grad_(False),
        IMAGE,
    ),
    "outputs by name, one of them None": lambda: (
        Made(
            lambda its, x: {"y": its.leave(its.enter(x)), "z": (None, its.leave(its.enter(x)))},
            **_encoder(),
        ),
        FEATURES,
    ),
    "heads of one's own": lambda: (
        nn.Sequential(
            nn.Linear(6, 16),
            Made(_heads, num_heads=4, **{name: nn.Linear(16, 16) for name in "qkvo"}),
            nn.Linear(16, 4),
        ),
        FEATURES,
    ),
}


@pytest.mark.parametrize("kind", EXACT)
def test_what_remains_computes_what_it_did(kind: str) -> None:
    torch.manual_seed(1)
    module, example = EXACT[kind]()
    plan = choose_channels(module, example, 0.5)
    narrow = fit_module(copy.deepcopy(module), ChannelPlan.from_bytes(plan.coded)).eval()
    zeroed = copy.deepcopy(module).eval()
    zero_what_goes(zeroed, plan)
    for wanted, found in zip(
        outputs_of(zeroed(*example)), outputs_of(narrow(*example)), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    again = narrow_module(module, example, plan)
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    frozen = {name: p.requires_grad for name, p in module.named_parameters()}
    assert {name: p.requires_grad for name, p in again.named_parameters()} == frozen


@pytest.mark.parametrize("norm", [nn.RMSNorm(16), nn.LayerNorm(16, bias=False)])
def test_norms_are_told_how_many_are_left(norm: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(6, 16), norm, nn.Linear(16, 4))
    narrow = narrow_module(module, FEATURES, choose_channels(module, FEATURES, 0.5))
    assert narrow(*FEATURES).shape == (2, 5, 4)


def test_an_encoder_with_a_decoder_goes_on_with_fewer_channels() -> None:
    module = Made(
        lambda its, x, y: its.leave(its.both(its.enter(x), its.other(y))),
        both=nn.Transformer(16, 4, 1, 1, 24, batch_first=True, norm_first=True),
        **_encoder(other=nn.Linear(5, 16)),
    )
    example = (*FEATURES, torch.randn(2, 4, 5))
    narrow = narrow_module(module, example, choose_channels(module, example, 0.5))
    assert narrow(*example).shape == (2, 4, 4)


def test_tied_weights_stay_tied() -> None:
    table, out = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
    out.weight = table.weight
    module = Made(
        lambda its, x: its.out((y := its.table(x)) + its.part(y)),
        table=table,
        part=nn.Linear(16, 16),
        out=out,
    )
    example = (torch.zeros(1, 3).long(),)
    narrow: Any = narrow_module(module, example, choose_channels(module, example, 0.5))
    assert narrow.table.weight is narrow.out.weight
    assert narrow.out.weight.shape == (20, 8)


def test_a_second_choice_counts_transposed_kernels_of_one_channel_from_what_there_were() -> None:
    layers = _conv(3, 8), nn.ConvTranspose2d(8, 8, 2, groups=8), _conv(8, 4)
    module = nn.Sequential(*layers)
    first = choose_channels(module, IMAGE, 0.75)
    narrow = fit_module(module, first)
    second = choose_channels(narrow, IMAGE, 0.5, first)
    assert fit_module(narrow, second)[0].weight.shape[0] == 4  # type: ignore[index]


class _Helped(nn.Module):
    """Has outputs beside, of layers that run in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.beside = (
            *(nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(16, 3)),
        )

    def forward(self, x: Tensor) -> Any:
        x = self.enter(x)
        return (self.leave(x), self.beside(x)) if self.training else self.leave(x)


def _tied() -> nn.Module:
    one, other = nn.Linear(16, 16), nn.Linear(16, 16)
    other.weight = one.weight
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), one, nn.ReLU(), other, nn.Linear(16, 4))


def _with_buffer() -> nn.Module:
    module = Made(lambda its, x: its.leave(its.enter(x) * its.scale), **_encoder())
    module.register_buffer("scale", torch.ones(16))
    return module


def _normed(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:])


def _permuted() -> nn.Module:
    return Made(
        lambda its, x: its.out(torch.relu(its.stem(x)).permute(0, 2, 3, 1).flatten(1)),
        stem=_conv(3, 8),
        out=nn.Linear(512, 4),
    )


REFUSED: list[tuple[Callable[[], nn.Module], tuple[Tensor, ...], str]] = [
    (
        lambda: nn.Sequential(_conv(3, 8), nn.ChannelShuffle(2), _conv(8, 4)),
        IMAGE,
        "layer '2' of Sequential would not put out",
    ),
    (_permuted, IMAGE, "layer 'out' of Made would not put out"),
    (
        lambda: Made(
            lambda its, x: its.out(its.stem(x).roll(1, 1)), stem=_conv(3, 8), out=_conv(8, 4)
        ),
        IMAGE,
        "layer 'out' of Made would not put out",
    ),
    (
        lambda: nn.Sequential(_conv(3, 8), nn.LayerNorm(8), _conv(8, 4)),
        IMAGE,
        "does not run with fewer channels: layer '1': Given normalized_shape",
    ),
    (_with_buffer, FEATURES, "does not run with fewer channels: The size of tensor"),
    (_Helped, FEATURES, "does not run with fewer channels: layer 'beside'"),
    (
        lambda: Made(lambda its, x: (its.leave(its.enter(x)), its.enter(x)), **_encoder()),
        FEATURES,
        r"without these channels the outputs are \[\[2, 5, 4\], \[2, 5, 8\]\], not",
    ),
    (_tied, FEATURES, "'2.weight' and '4.weight' are one tensor"),
    (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(6, 16)), nn.Linear(16, 4)
        ),
        FEATURES,
        "layer '0' makes its weight of other tensors",
    ),
    (
        lambda: Made(
            lambda its, x: its.leave(its.cell(its.enter(x[:, 0]))),
            **_encoder(cell=nn.GRUCell(16, 16)),
        ),
        FEATURES,
        r"channels before layer 'cell' \(GRUCell\) cannot be followed",
    ),
    (
        lambda: Made(
            lambda its, x: its.leave(its.cell(its.enter(x))[0]),
            **_encoder(cell=nn.GRU(16, 16)),
        ),
        FEATURES,
        r"channels before layer 'cell' \(GRU\) cannot be followed.*nn.LSTM",
    ),
    (
        lambda: Made(
            lambda its, x: its.leave(its.cell(y := its.enter(x), y, y)[0]),
            **_encoder(cell=nn.MultiheadAttention(16, 4, add_zero_attn=True)),
        ),
        FEATURES,
        r"channels before layer 'cell' \(MultiheadAttention\) cannot be followed.*add_zero_attn",
    ),
    (
        lambda: nn.Sequential(_conv(3, 8), nn.PixelShuffle(2), _conv(2, 4)),
        IMAGE,
        "cannot be removed at layer '2'",
    ),
]


@pytest.mark.parametrize(("make", "example", "said"), REFUSED)
def test_what_would_not_is_refused_before_anything_goes(
    make: Callable[[], nn.Module], example: tuple[Tensor, ...], said: str
) -> None:
    torch.manual_seed(1)
    module = make()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(PlanError, match=said):
        choose_channels(module, example, 0.5)
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(6, 16), nn.Sigmoid(), nn.LayerNorm(16), nn.Linear(16, 4)),
        nn.Sequential(nn.Linear(6, 16), nn.Softmax(-1), nn.Linear(16, 4)),
        Made(lambda its, x: its.leave(functional.dropout(its.enter(x))), **_encoder()),
        Made(lambda its, x: its.leave(_normed(its.enter(x))), **_encoder()),
        nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).bfloat16(),
    ],
)
def test_what_counts_channels_or_draws_is_not_refused(module: nn.Module) -> None:
    example = (FEATURES[0].to(next(module.parameters()).dtype),)
    assert choose_channels(module, example, 0.5).kept


def _attended(weigh: Callable[[Tensor], Tensor]) -> nn.Module:
    def forward(its: Any, x: Tensor) -> Tensor:
        x = its.enter(x)
        q, k, v = its.q(x), its.k(x), its.v(x)
        found: Tensor = its.leave(weigh(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5) @ v)
        return found

    return Made(forward, **_encoder(**{name: nn.Linear(16, 16) for name in "qkv"}))


def _softmax(x: Tensor) -> Tensor:
    x = torch.exp(x - x.amax(-1, keepdim=True))
    return x / x.sum(-1, keepdim=True)


def _of(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return Made(lambda its, x: its.leave(function(its.enter(x))), **_encoder())


@pytest.mark.parametrize(
    "module",
    [
        _attended(_softmax),
        _attended(torch.sigmoid),
        _of(lambda x: x * x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)),
        _of(lambda x: x - x.sum(-1, keepdim=True) / x.size(-1)),
        _of(lambda x: x * torch.sigmoid(functional.adaptive_avg_pool1d(x, 1))),
        _of(lambda x: functional.softmin(x, dim=-1)),
        Made(lambda its, x: (its.leave(its.enter(x)), x[:0]), **_encoder()),
    ],
)
def test_numbers_of_channels_in_a_forward_are_not_taken_for_another_order(
    module: nn.Module,
) -> None:
    assert choose_channels(module, FEATURES, 0.5).kept


def test_another_order_is_seen_beside_numbers_of_channels() -> None:
    module = _of(lambda x: x.roll(1, -1) / x.shape[-1] ** 0.5)
    with pytest.raises(PlanError, match="layer 'leave' of Made would not put out"):
        choose_channels(module, FEATURES, 0.5)


def test_what_is_drawn_in_training_may_decide_shapes() -> None:
    def forward(its: Any, x: Tensor) -> Tensor:
        x = its.leave(its.enter(x))
        return x[:, : int(torch.randint(1, 6, ()))] if its.training else x

    for _ in range(4):
        assert choose_channels(Made(forward, **_encoder()), FEATURES, 0.5).kept


def _outside_of_the_state() -> nn.Module:
    layer = nn.Linear(6, 12)
    for name, tensor in dict(layer.named_parameters()).items():
        delattr(layer, name)
        layer.register_buffer(name, tensor.detach(), persistent=False)
    return layer


@pytest.mark.parametrize(
    "first",
    [
        _outside_of_the_state(),
        nn.GRUCell(6, 12),
        Made(lambda its, x: its.layer(x)[0], layer=nn.GRU(6, 12)),
        Made(lambda its, x: its.layer(x)[0], layer=nn.LSTM(6, 14, proj_size=12)),
    ],
)
def test_channels_behind_what_cannot_be_followed_go(first: nn.Module) -> None:
    module = nn.Sequential(first, nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    example = (torch.randn(5, 6),)
    assert set(choose_channels(module, example, 0.5).kept) == {"1.weight", "1.bias", "3.weight"}


def test_heads_go_beside_a_layer_that_makes_its_weight_of_others() -> None:
    attention = Made(_heads, num_heads=4, **{name: nn.Linear(16, 16) for name in "qkvo"})
    module = nn.Sequential(
        nn.Linear(6, 16), attention, nn.utils.parametrizations.weight_norm(nn.Linear(16, 4))
    )
    assert set(choose_channels(module, FEATURES, 1.0, heads=0.5).heads) == {"1"}
    nn.utils.parametrizations.weight_norm(attention.q)
    with pytest.raises(PlanError, match=r"layer '1\.q' makes its weight of other tensors"):
        choose_channels(module, FEATURES, 1.0, heads=0.5)


def test_a_plan_of_heads_without_their_tensors_is_refused() -> None:
    plan = ChannelPlan({}, heads={"0": np.array([True, False])})
    with pytest.raises(PlanError, match="heads of layer '0' and nothing of its tensors"):
        fit_module(nn.Sequential(nn.MultiheadAttention(16, 2)), plan)


def test_gradients_of_what_went_do_not_stay() -> None:
    module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(*FEATURES).sum().backward()
    fit_module(module, choose_channels(module, FEATURES, 0.5))
    optimizer.step()
    module(*FEATURES).sum().backward()
    optimizer.step()


def test_parts_in_evaluation_mode_stay_in_it() -> None:
    module = nn.Sequential(nn.Linear(6, 16), nn.Dropout(), nn.ReLU(), nn.Linear(16, 4))
    module[1].eval()
    pruned = prune_module(module, choose_channels(module, FEATURES, 0.5), FEATURES)
    assert [p.training for p in pruned.module.children()] == [True, False, True, True]


def test_an_example_that_the_module_does_not_take_is_said() -> None:
    module = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 4))
    plan = choose_channels(module, FEATURES, 0.5)
    with pytest.raises(PlanError, match="does not take the example: layer '0'"):
        narrow_module(module, (torch.ones(2, 7),), plan)


def test_a_variance_that_noise_made_negative_is_no_other_order() -> None:
    """As noise for privacy does on a server: what BatchNorm makes of it is NaN, in any order."""
    torch.manual_seed(0)
    module = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)),
    )
    least = module[0].weight.detach().abs().sum((1, 2, 3)).argmin()  # goes
    with torch.no_grad():
        module[1].running_var[least] = -0.7
    assert choose_channels(module, (torch.randn(2, 1, 8, 8),), 0.5).kept
