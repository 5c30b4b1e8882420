"""What a model computes, layer by layer, and the ratios that are told of pruning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunecast.compression.pruning.counting import count_operations
from prunecast.compression.pruning.operations import FLOAT32, INT8, Kept, Operations
from prunecast.compression.pruning.structure.narrowing import choose_channels, narrow_module
from prunecast.simulations.networks.attention import (
    language_model,
    lora_language_model,
    small_transformer,
)
from prunecast.simulations.networks.convolutional import digits_cnn, sensor_cnn
from prunecast.simulations.networks.recurrent import small_lstm
from prunecast.simulations.networks.residual import ResNet

IMAGE = (torch.rand(2, 1, 28, 28),)
TOKENS = (torch.zeros(2, 32, dtype=torch.int64),)


def test_a_cnn_is_counted_layer_by_layer() -> None:
    found = count_operations(digits_cnn(), IMAGE)
    # a kernel is used at every place of its output, a matrix once
    assert found.uses == {"0.weight": 784, "3.weight": 196, "7.weight": 1, "9.weight": 1}
    assert found.sizes == {"0.weight": 144, "3.weight": 4608, "7.weight": 401408, "9.weight": 2560}
    assert found.macs == 784 * 144 + 196 * 4608 + 401408 + 2560
    assert found.others == 0
    # zeros of a kernel save more than those of a matrix
    assert found.effective({"3.weight": 608}) == found.macs - 196 * 4000
    assert found.effective({"7.weight": 1408}) == found.macs - 400000
    moved = (784 + 16 * 784) + (16 * 196 + 32 * 196) + (1568 + 256) + (256 + 10)
    assert found.activations == moved


@pytest.mark.parametrize(
    ("module", "example"),
    [
        (digits_cnn(), IMAGE),
        (ResNet(), IMAGE),
        (sensor_cnn(), (torch.rand(2, 6, 100),)),
        (language_model(), TOKENS),
        (lora_language_model(), TOKENS),
    ],
    ids=["cnn", "resnet", "sensors", "attention", "lora"],
)
def test_the_sum_is_what_torch_counts(module: nn.Module, example: tuple[Tensor, ...]) -> None:
    module.eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(*(x[:1] for x in example))
    assert count_operations(module, example).macs == counter.get_total_flops() / 2


def test_products_of_activations_belong_to_no_weights() -> None:
    found = count_operations(language_model(steps=32, width=64, layers=2), TOKENS)
    assert found.others == 2 * 2 * 32 * 32 * 64  # two layers, scores and sums
    assert "tokens.weight" not in found.uses  # an embedding multiplies nothing
    # adapters have their own weights, the frozen matrices are constants
    lora = count_operations(lora_language_model(), TOKENS)
    assert all("lora" in name or name.startswith("head") for name in lora.uses)
    assert lora.uses["blocks.0.enter.lora_a"] == 32


def test_recurrent_weights_are_used_at_every_step() -> None:
    found = count_operations(small_lstm(), IMAGE)
    assert found.uses["layers.weight_ih_l0"] == found.uses["layers.weight_hh_l0"] == 28
    assert found.macs == 28 * 4 * 128 * (28 + 128) + 1280


def test_attention_of_torch_is_counted_with_its_projections() -> None:
    found = count_operations(small_transformer(), IMAGE)
    layer = 28 * (3 * 64 * 64 + 64 * 64 + 2 * 64 * 256)
    scores = 2 * 28 * 28 * 64
    assert found.others == 2 * scores
    assert found.macs == 28 * 28 * 64 + 2 * (layer + scores) + 640


@pytest.mark.parametrize("keys", [1, 3])
def test_attention_with_fewer_heads_is_counted_as_torchs_is(keys: int) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.MultiheadAttention(8, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            given = x if keys == 1 else torch.cat([x] * keys, 1)
            return torch.as_tensor(self.heads(x, given, given, need_weights=False)[0])

    example, wide = (torch.rand(1, 5, 8),), Cross()
    torchs = count_operations(wide, example)
    plan = choose_channels(wide, example, 1.0, heads=0.5)
    narrow = count_operations(narrow_module(wide, example, plan), example)
    assert narrow.uses == torchs.uses
    assert {name: 2 * size for name, size in narrow.sizes.items()} == torchs.sizes
    assert (2 * narrow.macs, 2 * narrow.others) == (torchs.macs, torchs.others)


class _Cells(nn.Module):
    """What is not among the families: cells, transposed kernels, groups, an einsum, ties."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2)
        self.apart = nn.Conv2d(6, 6, 3, groups=6)
        self.cell = nn.GRUCell(6, 8)
        self.left = nn.Linear(8, 8, bias=False)
        self.right = nn.Linear(8, 8, bias=False)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.apart(self.up(x)).mean((2, 3))
        x = self.right(self.left(self.cell(x)))
        x = torch.einsum("bi,ji->bj", x, self.left.weight)
        return nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])


def test_other_layers_and_functions_count_and_tied_weights_are_one() -> None:
    found = count_operations(_Cells(), (torch.rand(1, 4, 5, 5),))
    assert found.uses["up.weight"] == 25  # places of the input
    assert found.uses["apart.weight"] == 81  # places of the output: 11 less 2, squared
    assert found.uses["cell.weight_ih"] == found.uses["cell.weight_hh"] == 1
    assert found.uses["left.weight"] == 3
    assert "right.weight" not in found.uses
    assert found.others == 16  # one pair of eight numbers each way


class _Named(nn.Module):
    """Functions whose arguments are given by name, by position, or by both."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(8, 8))
        self.heads = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.matmul(input=x, other=self.w)
        x = x[0].mm(mat2=self.w) + torch.mm(x[0], mat2=self.w) + x[0].matmul(other=self.w)
        x = torch.addmm(x, mat1=x, mat2=self.w) + x.addmm(x, self.w)
        x = nn.functional.linear(weight=self.w, input=x)
        x = nn.functional.conv1d(x.T[None], weight=self.w[..., None])[0].T
        x = torch.baddbmm(input=x[None], batch1=x[None], batch2=self.w[None])
        x = torch.bmm(x, mat2=self.w[None])
        x = nn.functional.scaled_dot_product_attention(query=x, value=x, key=x)
        x = x + torch.mv(x[0], vec=self.w[0]).sum() + torch.dot(x[0, 0], tensor=self.w[0])
        return self.heads(key=x, value=x, query=x)[0]


def test_arguments_count_by_whatever_way_they_are_given() -> None:
    rows, matrix = 3, 8 * 8
    found = count_operations(_Named(), (torch.rand(1, rows, 8),))
    whole = 10  # products with all of the matrix, its views among them
    assert found.uses["heads.in_proj_weight"] == found.uses["heads.out_proj.weight"] == rows
    pairs = rows * rows * 2 * 8  # of attention, scores and sums; twice
    vectors = rows * 8 + 8  # with a row of the matrix, which is no tensor of its own
    assert found.uses["w"] == whole * rows
    assert found.others == 2 * pairs + vectors
    assert found.macs == whole * rows * matrix + rows * 4 * matrix + 2 * pairs + vectors


def test_the_module_stays_as_it_was() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5))
    module[2].eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    count_operations(module, IMAGE)
    assert [part.training for part in module] == [True, True, False]
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


def test_energy_is_counted_from_products_and_bytes() -> None:
    # one million products of float32, and a weight read from DRAM for 640 pJ
    assert FLOAT32.joules(1_000_000, 0, 0) == pytest.approx(4.6e-6)
    assert FLOAT32.joules(0, 1, 0) == pytest.approx(640e-12)
    assert FLOAT32.joules(0, 0, 2) == pytest.approx(20e-12)  # two of them are 64 bits
    assert INT8.joules(1_000_000, 0, 0) == pytest.approx(0.3e-6)
    assert INT8.joules(0, 1, 0) == pytest.approx(160e-12)


def test_ratios_of_pruning() -> None:
    assert (Kept(100, 50, 10).compression_ratio, Kept(100, 50, 10).efficiency) == (10, 0.9)
    assert Kept(100, 100, 100).efficiency == 0
    assert Kept(100, 0, 0).compression_ratio is None
    assert Kept(0, 0, 0).efficiency == 0
    assert Operations().macs == 0
