"""Whole heads: attention with fewer of them computes what the others did, and torch's does."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunecast.compression.onnx.export import export_graph
from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.structure.attention import attentions
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.pruning.structure.narrow_attention import NarrowAttention, become
from prunecast.compression.pruning.structure.narrowing import (
    choose_channels,
    fit_module,
    narrow_module,
)
from prunecast.simulations.networks.attention import language_model, small_transformer


def _masks(queries: int, keys: int, count: int, heads: int) -> list[dict[str, Any]]:
    causal = torch.full((queries, keys), -torch.inf).triu(1)
    padding = torch.zeros(count, keys, dtype=torch.bool)
    padding[0, -1] = True
    by_head = torch.randn(count * heads, queries, keys)
    return [
        {},
        {"attn_mask": causal},
        {"attn_mask": causal.isinf()},
        {"attn_mask": causal, "is_causal": True},
        {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding},
        {"key_padding_mask": padding},
        {"attn_mask": by_head, "key_padding_mask": padding.float()},
    ]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": 6, "vdim": 10},
        {"add_bias_kv": True},
        {"add_zero_attn": True, "add_bias_kv": True},
    ],
    ids=str,
)
def test_it_computes_what_torch_does(options: dict[str, Any], batch_first: bool) -> None:
    torch.manual_seed(1)
    torchs = nn.MultiheadAttention(12, 3, batch_first=batch_first, **options).eval()
    for parameter in torchs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = copy.deepcopy(torchs)
    become(ours, NarrowAttention)
    assert type(ours) is NarrowAttention
    count, queries, keys = 2, 5, 4
    x, k = torch.randn(count, queries, 12), torch.randn(count, keys, options.get("kdim", 12))
    v = torch.randn(count, keys, options.get("vdim", 12))
    cross = tuple(t if batch_first else t.transpose(0, 1) for t in (x, k, v))
    same = (cross[0],) * 3
    for inputs in (cross, same) if "kdim" not in options else (cross,):
        there = keys if inputs is cross else queries
        for given, weights, mean in itertools.product(
            _masks(queries, there, count, 3), (True, False), (True, False)
        ):
            given = {**given, "need_weights": weights, "average_attn_weights": mean}
            if options.get("add_zero_attn") and given.get("is_causal"):
                continue  # torch lets the hint hide what was added
            for wanted, found in zip(torchs(*inputs, **given), ours(*inputs, **given), strict=True):
                assert (wanted is None) == (found is None)
                if wanted is not None:
                    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    one = [t[0] if batch_first else t[:, 0] for t in cross]
    for wanted, found in zip(torchs(*one), ours(*one), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="is_causal is a hint"):
        ours(*cross, is_causal=True)


class Attention(nn.Module):
    """As many people write it."""

    def __init__(self, width: int = 24, heads: int = 4, head_dim: int = 6) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_proj, self.k_proj = (nn.Linear(width, heads * head_dim) for _ in range(2))
        self.v_proj, self.out_proj = nn.Linear(width, heads * head_dim), nn.Linear(24, width)

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(part(x)) for part in (self.q_proj, self.k_proj, self.v_proj))
        made = nn.functional.scaled_dot_product_attention(q, k, v)
        return torch.as_tensor(self.out_proj(made.transpose(1, 2).flatten(2)))


class Fused(nn.Module):
    """As in image models: one layer for queries, keys and values."""

    def __init__(self, width: int = 24, heads: int = 4, head_dim: int = 6) -> None:
        super().__init__()
        self.n_heads, self.head_dim = heads, head_dim
        self.qkv = nn.Linear(width, 3 * heads * head_dim, bias=False)
        self.proj = nn.Sequential(nn.Linear(heads * head_dim, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.n_heads, self.head_dim).unbind(2)
        weights = torch.einsum("bihd,bjhd->bhij", q, k).div(self.head_dim**0.5).softmax(-1)
        return torch.as_tensor(self.proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)))


class ByWidth(Attention):
    """Splits by a width of its own, so that fewer heads would become others."""

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], 4, -1).transpose(1, 2)


class Interleaved(Fused):
    """Heads first, then queries, keys and values."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], self.n_heads, 3, self.head_dim).unbind(3)
        weights = torch.einsum("bihd,bjhd->bhij", q, k).div(self.head_dim**0.5).softmax(-1)
        return torch.as_tensor(self.proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)))


class Reader(nn.Module):
    def __init__(self, layer: nn.Module, width: int = 24) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(5, width), nn.LayerNorm(width)
        self.attention, self.leave = layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        found = self.attention(self.norm(x))
        return torch.as_tensor(self.leave((x + found).mean(1)))


EXAMPLE = (torch.ones(2, 7, 5),)


def torchs_reader() -> nn.Module:
    layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True)
    return Reader(nn.TransformerEncoder(layer, 2))


FAMILIES = [torchs_reader, lambda: Reader(Attention()), lambda: Reader(Fused())]


def _heads_that_put_out_nothing(module: nn.Module, plan: ChannelPlan) -> nn.Module:
    silent = copy.deepcopy(module)
    for one in attentions(silent):
        name = one.parts[-1][0]
        gone = torch.from_numpy(~one.axis_mask(plan.heads[one.name], name))
        one.tensors()[name].data[:, gone] = 0
    return silent


@pytest.mark.parametrize("make", FAMILIES)
def test_what_remains_computes_what_it_did(make: Any) -> None:
    torch.manual_seed(2)
    module = make().eval()
    plan = choose_channels(module, EXAMPLE, 1.0, heads=0.5)
    assert (plan.share, plan.heads_share) == (1, 0.5)
    narrow = narrow_module(module, EXAMPLE, plan)
    fitted = fit_module(make(), ChannelPlan.from_bytes(plan.coded)).eval()
    fitted.load_state_dict(narrow.state_dict())
    silent, x = _heads_that_put_out_nothing(module, plan), torch.randn(3, 7, 5)
    for grad in (True, False):  # without, torch has a fast path
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(narrow(x), silent(x), rtol=1e-4, atol=1e-5)
            assert torch.equal(fitted(x), narrow(x))
    for one in attentions(narrow):
        assert one.heads == 2
    loss = fitted.train()(x).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fitted.parameters())


@pytest.mark.parametrize("make", FAMILIES)
def test_it_is_exported(make: Any) -> None:
    torch.manual_seed(7)
    module, example = make().eval(), (torch.randn(2, 7, 5),)
    narrow = narrow_module(module, example, choose_channels(module, example, 0.5, heads=0.5))
    graph = export_graph(narrow, example)  # which runs both, with other weights, too
    wide = export_graph(module, example)
    assert len(graph.skeleton) < 1.2 * len(wide.skeleton)


def test_those_of_the_least_norm_go() -> None:
    torch.manual_seed(3)
    module = Reader(Attention())
    with torch.no_grad():
        module.attention.v_proj.weight[6:12] *= 0.1  # type: ignore[union-attr, operator, index]
        module.attention.out_proj.weight[:, 18:] *= 0.1  # type: ignore[union-attr, operator, index]
    plan = choose_channels(module, EXAMPLE, 1.0, heads=0.5)
    assert plan.heads["attention"].tolist() == [True, False, True, False]
    rows, columns = plan.kept["attention.q_proj.weight"]
    assert rows is not None
    assert rows.reshape(4, 6).all(1).tolist() == [True, False, True, False]
    assert columns is None
    assert plan.kept["attention.q_proj.bias"][0] is not None
    assert "attention.out_proj.bias" not in plan.kept


@pytest.mark.parametrize("make", [*FAMILIES, small_transformer])
def test_heads_go_beside_channels_and_keep_their_width(make: Any) -> None:
    example = EXAMPLE if make is not small_transformer else (torch.rand(2, 1, 28, 28),)
    torch.manual_seed(4)
    module = make()
    both = choose_channels(module, example, 0.5, heads=0.5)
    first = choose_channels(module, example, 0.75, heads=0.75)
    narrow = fit_module(copy.deepcopy(module), first)
    second = choose_channels(narrow, example, 0.5, first, heads=0.5)
    stepwise = first.then(second)
    assert stepwise.shares == pytest.approx(both.shares)
    shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    assert stepwise.shapes(shapes) == both.shapes(shapes)
    at_once = narrow_module(module, example, stepwise)
    assert at_once(*example).shape == module(*example).shape
    for one, was in zip(attentions(at_once), attentions(module), strict=True):
        name = one.parts[0][0]
        width = one.tensors()[name].shape[0] // (one.parts[0][2] * one.heads)
        assert one.heads == 2
        assert width == was.tensors()[name].shape[0] // (one.parts[0][2] * was.heads)
    again = ChannelPlan.from_text(stepwise.to_text())
    assert again.to_text() == stepwise.to_text()
    assert {n: m.tolist() for n, m in again.heads.items()} == {
        n: m.tolist() for n, m in stepwise.heads.items()
    }


def test_a_padded_batch_goes_through_a_narrow_encoder_as_through_a_wide_one() -> None:
    torch.manual_seed(5)
    layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True)
    wide = nn.TransformerEncoder(layer, 2).eval()
    plan = choose_channels(wide, (torch.randn(2, 7, 24),), 1.0, heads=0.5)
    narrow, silent = (
        narrow_module(wide, (torch.randn(2, 7, 24),), plan),
        _heads_that_put_out_nothing(wide, plan),
    )
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    x = torch.randn(2, 7, 24)
    with torch.no_grad():
        wanted, found = (part(x, src_key_padding_mask=padding) for part in (silent, narrow))
    torch.testing.assert_close(found[~padding], wanted[~padding], rtol=1e-4, atol=1e-5)


class Grouped(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.k_proj = nn.Linear(24, 12)


class Unnamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.one, self.two = 4, nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.two(self.one(x)))


class OwnForward(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x, x, x)[0]


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (Grouped, "'attention' (Grouped) cannot be told: its keys or values have other heads"),
        (Unnamed, "'attention' (Unnamed) cannot be told: its queries, keys and values are no"),
        (lambda: OwnForward(24, 4, batch_first=True), "it has a forward of its own"),
        (ByWidth, "'attention' (ByWidth) does not go on with fewer heads"),
        (Interleaved, "does not go on with fewer heads: what it puts out is not what the heads"),
        (lambda: nn.Linear(24, 24), "Reader has no attention whose heads go"),
    ],
)
def test_attention_that_cannot_be_told_is_refused_by_name(layer: Any, said: str) -> None:
    with pytest.raises(PlanError) as refused:
        choose_channels(Reader(layer()), EXAMPLE, 1.0, heads=0.5)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_cannot_be_is_refused_in_a_line() -> None:
    module = Reader(Attention())
    with pytest.raises(
        PlanError, match=r"a share of 0.1 leaves none of the 4 heads of 'attention'"
    ):
        choose_channels(module, EXAMPLE, 1.0, heads=0.1)
    with pytest.raises(PlanError, match="between 0 and 1"):
        choose_channels(module, EXAMPLE, 1.0, heads=1.0)
    with pytest.raises(PlanError, match="between 0 and 1"):
        choose_channels(module, EXAMPLE, 0.5, heads=1.5)
    plan = choose_channels(module, EXAMPLE, 1.0, heads=0.5)
    other = Reader(Attention(heads=8, head_dim=3))
    with pytest.raises(PlanError, match="layer 'attention' has 8 heads, the plan was made for 4"):
        fit_module(other, plan)
    text = plan.to_text()
    assert '"schema":2' in text
    assert '"schema":1' in choose_channels(module, EXAMPLE, 0.5).to_text()
    for damaged in (
        text.replace('"attention":', '"attention.q_proj":').replace(
            '"heads":{', '"heads":{"x":true,'
        ),
        text.replace('"shares":[0.5,', '"shares":[1.5,'),
        text.replace('"shares":[0.5,1.0]', '"shares":[0.5]'),
        text.replace('"shares":[0.5,1.0]', '"shares":0.5'),
        text.replace('"schema":2', '"schema":3'),
        text.replace('"heads":{', '"other":{'),
    ):
        with pytest.raises(PlanError, match=r"damaged|schema 3, not 1 or 2"):
            ChannelPlan.from_text(damaged)


def test_a_language_model_of_ones_own_loses_heads() -> None:
    module = language_model().eval()
    example = (torch.zeros(1, 8, dtype=torch.int64),)
    with pytest.raises(PlanError, match=r"'blocks.0' \(_Block\) cannot be told"):
        choose_channels(module, example, 1.0, heads=0.5)
    assert np.prod(module(*example).shape) == 8 * 32
