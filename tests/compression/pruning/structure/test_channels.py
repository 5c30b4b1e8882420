"""Channels: a plan is made once, and narrows every later version."""

from __future__ import annotations

import copy
import json
import math
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.structure.channels import (
    ChannelPlan,
    current_channels,
    holding_channels,
)
from prunecast.compression.pruning.structure.narrowing import (
    check_zeroed,
    choose_channels,
    fit_module,
    narrow_module,
)
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor
from prunecast.simulations.networks.attention import small_transformer
from prunecast.simulations.networks.residual import small_resnet_batch, small_resnet_group


class Residual(nn.Module):
    """Coupled layers: an addition, a norm, a flattening, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 4 * 4, 10)
        self.a, self.b = nn.Linear(10, 3), nn.Linear(10, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.fc((x + self.conv(x)).flatten(1)))
        return self.a(x), self.b(x)


EXAMPLE = (torch.ones(2, 1, 4, 4),)


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(3)
    made = Residual().eval()
    with torch.no_grad():  # the channels that are worth least, in both layers of the group
        for layer in (made.stem.weight, made.conv.weight, made.norm.weight):
            layer[[1, 2, 5, 6]] *= 1e-4
    return made


@pytest.fixture(scope="module")
def plan(module: nn.Module) -> ChannelPlan:
    return choose_channels(module, EXAMPLE, 0.5)


def _published(module: nn.Module, step: float = 0.01) -> PublishedModel:
    return PublishedModel(
        {
            name: LatticeTensor(np.rint(t.numpy() / step).astype(np.int32), step)
            if t.dim() > 1
            else RawTensor(t.numpy())
            for name, t in module.state_dict().items()
        }
    )


def test_half_of_the_channels_remain_and_the_outputs_keep_their_shapes(
    module: nn.Module, plan: ChannelPlan
) -> None:
    narrow = narrow_module(module, EXAMPLE, plan)
    kept = plan.kept["stem.weight"][0]
    assert kept is not None
    assert np.flatnonzero(kept).tolist() == [0, 3, 4, 7]
    shapes = {n: tuple(p.shape) for n, p in narrow.named_parameters()}
    assert shapes["conv.weight"] == (4, 4, 3, 3)
    assert shapes["fc.weight"] == (5, 4 * 4 * 4)
    assert (shapes["a.weight"], shapes["b.weight"]) == ((3, 5), (2, 5))
    assert [tuple(o.shape) for o in narrow(*EXAMPLE)] == [(2, 3), (2, 2)]
    assert module.stem.weight.shape == (8, 1, 3, 3)  # left as it was


def test_a_model_is_narrowed_to_what_the_module_holds(module: nn.Module, plan: ChannelPlan) -> None:
    wide, narrow = _published(module), narrow_module(module, EXAMPLE, plan)
    found = plan.narrow(wide)
    assert found["conv.weight"].step == wide["conv.weight"].step  # type: ignore[union-attr]
    for name, tensor in narrow.state_dict().items():
        step = 0.005 if tensor.dim() > 1 else 0
        assert found[name].shape == tuple(tensor.shape)
        assert np.abs(found[name].dense() - tensor.numpy()).max(initial=0) <= step * 1.001
    again = ChannelPlan.from_text(plan.to_text())
    assert again.narrow(wide).digest == found.digest
    assert (again.steps, again.share) == (plan.steps, 0.5)


def test_channels_without_weights_are_removed_without_a_trace() -> None:
    torch.manual_seed(4)
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        for tensor in (module[0].weight, module[0].bias):
            tensor[[0, 2, 4, 6]] = 0
        x = torch.randn(5, 6)
        plan = choose_channels(module, (x,), 0.5)
        assert torch.allclose(narrow_module(module, (x,), plan)(x), module(x), atol=1e-6)


def test_what_does_not_fit_is_refused(module: nn.Module, plan: ChannelPlan) -> None:
    with pytest.raises(PlanError, match="between 0 and 1"):
        choose_channels(module, EXAMPLE, 1.0)
    with pytest.raises(PlanError, match="no channels"):
        choose_channels(nn.Sequential(nn.Linear(4, 2)), (torch.ones(1, 4),), 0.5)
    with pytest.raises(PlanError, match=r"lacks tensor '.*'"):
        plan.narrow(PublishedModel({"other": RawTensor(np.zeros(3))}))
    wide = dict(_published(module).tensors)
    with pytest.raises(PlanError, match="made for another shape"):
        plan.narrow(PublishedModel({**wide, "fc.bias": RawTensor(np.zeros(7))}))
    huge = '{"schema":1,"share":0.5,"kept":{},"steps":[],"masks":["9000000000000:ff"]}'
    for text in (
        "",
        "{}",
        '{"schema":2}',
        huge,
        "[" * 10**5,
        plan.to_text().replace('"masks":["', '"masks":["x'),
    ):
        with pytest.raises(PlanError):
            ChannelPlan.from_text(text)
    with pytest.raises(PlanError, match=r"Sequential lacks tensor '.*': the plan is of another"):
        narrow_module(nn.Sequential(nn.Linear(4, 2)), (torch.ones(1, 4),), plan)


def test_a_module_that_names_its_channels_is_explained() -> None:
    class Fixed(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[1](self[0](x).view(-1, 2, 4).reshape(-1, 8))

    module = Fixed(nn.Linear(6, 8), nn.Linear(8, 3))
    with pytest.raises(PlanError, match=r"names a number of channels|cannot be removed"):
        narrow_module(
            module, (torch.ones(2, 6),), choose_channels(module, (torch.ones(2, 6),), 0.5)
        )


def _sizes(module: nn.Module) -> dict[str, dict[str, object]]:
    """What layers say of their sizes, by layer."""
    names = ("in_features", "out_features", "in_channels", "out_channels", "groups")
    names += ("num_features", "num_channels", "normalized_shape", "embed_dim", "head_dim")
    names += ("embedding_dim", "num_embeddings", "num_parameters")
    return {
        layer: {name: getattr(part, name) for name in names if hasattr(part, name)}
        for layer, part in module.named_modules()
    }


class Depthwise(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.InstanceNorm2d(8, affine=True)),
            *(nn.PReLU(8), nn.ConvTranspose2d(8, 6, 2), nn.Conv2d(6, 3, 1)),
        )


@pytest.mark.parametrize(
    ("factory", "example"),
    [
        (Residual, EXAMPLE[0]),
        (Depthwise, torch.ones(1, 1, 9, 9)),
        (small_resnet_group, torch.ones(2, 1, 28, 28)),
        (small_resnet_batch, torch.ones(2, 1, 28, 28)),
        (small_transformer, torch.ones(2, 1, 28, 28)),
    ],
)
def test_a_module_of_ones_own_is_fitted_without_the_graph(
    factory: Callable[[], nn.Module], example: torch.Tensor
) -> None:
    torch.manual_seed(6)
    module = factory().eval()
    plan = choose_channels(module, (example,), 0.5)
    narrow = narrow_module(module, (example,), plan)
    fresh = fit_module(factory(), ChannelPlan.from_bytes(plan.coded)).eval()
    fresh.load_state_dict(narrow.state_dict())  # the same names and shapes
    assert _sizes(fresh) == _sizes(narrow)
    with torch.no_grad():
        assert torch.equal(fresh(example), narrow(example)) if factory is not Residual else True
    fitted = fit_module(factory(), plan)
    torch.manual_seed(6)
    same = fit_module(factory(), plan)  # keeps the part of its own weights that remains
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor)
        assert fitted.state_dict()[name].shape == tensor.shape


def test_plans_compose_and_a_later_one_is_told_apart_from_an_earlier(
    module: nn.Module, plan: ChannelPlan
) -> None:
    narrow = narrow_module(module, EXAMPLE, plan)
    second = choose_channels(narrow, EXAMPLE, 0.5)
    both = plan.then(second)
    wide = _published(module)
    assert both.share == 0.25
    assert both.narrow(wide).digest == second.narrow(plan.narrow(wide)).digest
    # replayed on the whole module, and on one that was narrowed before
    twice = narrow_module(module, EXAMPLE, both)
    assert {n: t.shape for n, t in twice.state_dict().items()} == {
        n: torch.Size(t.shape) for n, t in both.narrow(wide).tensors.items()
    }
    assert both.since(plan).narrow(plan.narrow(wide)).digest == both.narrow(wide).digest
    assert not both.since(both).kept
    assert both.since(None) is both
    # a channel that is gone does not come back, and a plan of something else does not compose
    with pytest.raises(PlanError, match="that are gone"):
        plan.since(both)
    with pytest.raises(PlanError, match="another number of channels"):
        plan.then(plan)
    shapes = {name: tensor.shape for name, tensor in wide.tensors.items()}
    assert plan.fits(shapes)
    assert not second.fits(shapes)
    assert not plan.fits({"other": (3,)})
    # the one check, and what it says: what is missing before what is of another shape
    plan.check(shapes)
    assert plan.misfit(shapes) is None
    with pytest.raises(PlanError, match=r"^tensor 'fc.bias' is \[7\], the plan was made for anot"):
        plan.check({**shapes, "fc.bias": (7,)})
    less = {n: (7,) if n == "fc.bias" else s for n, s in shapes.items() if n != "norm.weight"}
    assert plan.misfit(less) == "norm.weight"
    with pytest.raises(PlanError, match=r"^Net lacks tensor 'norm.weight': the plan is of another"):
        plan.check(less, "Net")
    with pytest.raises(PlanError, match="both plans have another number of axes"):
        plan.then(ChannelPlan({"fc.bias": (None, None)}))
    with pytest.raises(PlanError, match="both plans have another number of axes"):
        plan.since(ChannelPlan({"fc.bias": (None, None)}))


def test_arrays_are_narrowed_by_name(module: nn.Module, plan: ChannelPlan) -> None:
    momentum = {"fc.weight": np.arange(10 * 128.0).reshape(10, 128), "step": np.ones(2)}
    found = plan.arrays(momentum)
    rows, columns = plan.kept["fc.weight"]
    assert np.array_equal(found["fc.weight"], momentum["fc.weight"][rows][:, columns])
    assert found["step"] is momentum["step"]
    with pytest.raises(PlanError, match="another shape"):
        plan.arrays({"fc.weight": np.ones((3, 128))})


def test_a_plan_of_another_architecture_is_refused_by_name(plan: ChannelPlan) -> None:
    with pytest.raises(PlanError, match=r"Linear lacks tensor '.*': the plan is of another module"):
        fit_module(nn.Linear(3, 2), plan)
    other = Residual()
    other.fc = nn.Linear(8 * 4 * 4, 12)
    with pytest.raises(PlanError, match=r"'fc\..*' is \[12"):
        fit_module(other, plan)
    assert other.stem.weight.shape == (8, 1, 3, 3)  # nothing was changed
    with pytest.raises(PlanError, match=r"layer '0': 5 channels are no 2 groups"):
        fit_module(
            nn.Sequential(nn.GroupNorm(2, 8)),
            ChannelPlan(dict.fromkeys(("0.weight", "0.bias"), (np.arange(8) < 5,))),
        )


@pytest.mark.parametrize("data", [b"", b"x", zlib.compress(b"\xff"), zlib.compress(b"{}")])
def test_bytes_that_are_no_plan_are_refused(data: bytes) -> None:
    with pytest.raises(PlanError):
        ChannelPlan.from_bytes(data)


def _text(**changed: object) -> str:
    """Of a plan that keeps two of three rows, but for what is changed."""
    document = {"schema": 1, "share": 0.5, "kept": {"w": [0, None]}, "masks": ["3:a0"], "steps": []}
    return json.dumps({**document, **changed})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (_text().replace("0.5", "1" + "0" * 400), "too large"),
        *((_text(share=share), r"lies in \(0, 1\]") for share in (-2, 0, 1.5, math.inf, math.nan)),
        *((_text(steps=[["w", True, [gone]]]), "counts nothing") for gone in (math.inf, -1, 1.5)),
        *((_text(kept={"w": [place]}), "counts nothing") for place in (-1, True, "0", 0.0)),
        (_text(kept={"w": [1]}), "out of range"),
        (_text(masks=["3:00"]), "a layer would vanish: a mask keeps none of 3 places"),
        (_text(masks=["3:1f"]), "a layer would vanish"),  # what is kept is behind the end
        (_text(masks=["0:"]), "a mask of 0 places in 0 bytes"),
        (_text(masks=["-3:"]), "a mask of -3 places in 0 bytes"),
        (_text(masks=["9:a0"]), "a mask of 9 places in 1 bytes"),
        (_text(masks=["9:a0  "]), "a mask of 9 places in 1 bytes"),
        (_text(masks=["3:a0", "3:c0"]), "no tensor has 1 of its masks"),
        (_text(masks=["3:a0", "3:a0"], kept={"w": [0, 1]}), "written twice"),
    ],
)
def test_a_text_that_no_plan_is_written_as_is_refused(text: str, said: str) -> None:
    assert ChannelPlan.from_text(_text()).kept["w"][0].tolist() == [True, False, True]  # type: ignore[union-attr]
    with pytest.raises(PlanError, match=f"the plan of channels is damaged: .*{said}"):
        ChannelPlan.from_text(text)
    with pytest.raises(PlanError, match=said):
        ChannelPlan.from_bytes(zlib.compress(text.encode()))


def test_a_plan_that_travels_is_of_no_larger_model_than_may_come() -> None:
    mask = np.arange(4000) < 7
    coded = ChannelPlan({"w": (mask, None), "b": (mask,)}, share=0.5).coded
    assert np.array_equal(ChannelPlan.from_bytes(coded, 4000).kept["b"][0], mask)
    with pytest.raises(PlanError, match="masks of 4000 places are of no model of at most 3999 b"):
        ChannelPlan.from_bytes(coded, 3999)
    # 15 kB that came to 60 MiB of mask
    bomb = zlib.compress(_text(masks=[f"{60 << 20}:80" + "00" * ((60 << 17) - 1)]).encode(), 9)
    many = zlib.compress(_text(masks=["0:"] * 10_000).encode(), 9)  # masks of nothing
    assert len(bomb) < 20_000
    tracemalloc.start()
    try:
        with pytest.raises(PlanError, match="was deflated comes to more than 1065536"):
            ChannelPlan.from_bytes(bomb, 1_000_000)
        with pytest.raises(PlanError, match="written twice"):
            ChannelPlan.from_bytes(many, 1000)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    steps = ChannelPlan({"w": (mask,)}, (("layer", True, (9,)),)).to_text()
    with pytest.raises(PlanError, match="it travels without steps"):
        ChannelPlan.from_bytes(zlib.compress(steps.encode()))


def test_the_plan_of_a_message_is_the_current_one_while_it_is_handled(plan: ChannelPlan) -> None:
    assert current_channels() is None
    with holding_channels(plan):
        assert current_channels() is plan
    assert current_channels() is None


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.lstm = nn.Linear(3, 8), nn.LSTM(8, 12, batch_first=True)
        self.hidden, self.head = nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lstm(self.enter(x))[0][:, -1]
        return torch.as_tensor(self.head(torch.relu(self.hidden(y))))


def test_recurrent_layers_keep_their_outputs() -> None:
    x = torch.ones(2, 5, 3)
    torch.manual_seed(2)
    module = Recurrent().eval()
    plan = choose_channels(module, (x,), 0.5)
    narrow = narrow_module(module, (x,), plan)
    shapes = {name: tuple(tensor.shape) for name, tensor in narrow.state_dict().items()}
    assert shapes["lstm.weight_ih_l0"] == (48, 4)
    assert (shapes["lstm.weight_hh_l0"], shapes["head.weight"]) == ((48, 12), (4, 5))
    with torch.no_grad():
        assert torch.equal(fit_module(module, plan)(x), narrow(x))


def test_a_second_choice_counts_from_the_channels_there_were() -> None:
    torch.manual_seed(1)
    example = (torch.ones(2, 1, 28, 28),)
    whole = small_resnet_group()
    first = choose_channels(whole, example, 0.75)
    narrow = narrow_module(whole, example, first)
    second = choose_channels(narrow, example, 0.5, first)
    assert first.then(second).share == pytest.approx(0.5)
    found = narrow_module(narrow, example, second).state_dict()
    at_once = narrow_module(whole, example, choose_channels(whole, example, 0.5)).state_dict()
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in at_once.items()}


def test_large_kernels_of_one_pixel_are_narrowed_with_the_depthwise_ones_behind() -> None:
    torch.manual_seed(1)
    made = nn.Sequential(  # 128 x 96 weights: more than NumPy looks at in one go
        *(nn.Conv2d(1, 96, 3), nn.Conv2d(96, 128, 1), nn.BatchNorm2d(128), nn.ReLU()),
        *(nn.Conv2d(128, 128, 3, groups=128), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(128, 10),
    ).eval()
    example = (torch.rand(2, 1, 12, 12),)
    plan = choose_channels(made, example, 0.75)
    narrow = narrow_module(made, example, plan)
    state = {name: tuple(tensor.shape) for name, tensor in narrow.state_dict().items()}
    assert state["1.weight"] == (96, 72, 1, 1)
    assert state["4.weight"] == (96, 1, 3, 3)
    outputs, inputs, *_ = plan.kept["1.weight"]
    assert outputs is not None
    assert inputs is not None
    kept = made[1].weight.detach().numpy()[np.ix_(outputs, inputs)]
    assert np.array_equal(kept, narrow[1].weight.detach().numpy())


def test_heads_of_attention_stay_as_many_and_give_the_same_dimensions() -> None:
    torch.manual_seed(0)
    example = (torch.ones(2, 1, 28, 28),)
    first = choose_channels(small_transformer(), example, 0.75)
    narrow = fit_module(small_transformer(), first)
    plan = first.then(choose_channels(narrow, example, 0.5, first))
    for found, each in ((first, 12), (plan, 8)):
        rows, columns = found.kept["layers.layers.0.self_attn.in_proj_weight"]
        assert rows is not None
        assert columns is not None
        by_head = columns.reshape(4, 16)
        assert by_head.sum(1).tolist() == [each] * 4
        assert (by_head == by_head[0]).all()
        assert (rows.reshape(3, 64) == columns).all()


def test_channels_that_are_zero_put_out_what_removed_ones_do(
    module: nn.Module, plan: ChannelPlan
) -> None:
    with torch.no_grad():
        wide = copy.deepcopy(module)
        wide.norm.running_mean.uniform_(-1, 1)
        wide.norm.bias.uniform_(-1, 1)  # what a zero channel would put out, were it left
    arrays = {name: tensor.numpy() for name, tensor in wide.state_dict().items()}
    zeroed = copy.deepcopy(wide)
    for name, tensor in zeroed.state_dict().items():
        tensor.copy_(torch.from_numpy(plan.zeroed_array(name, arrays[name])))
    assert not zeroed.norm.bias[~torch.from_numpy(plan.kept["norm.bias"][0])].any()  # type: ignore[arg-type]
    narrow, images = fit_module(copy.deepcopy(wide), plan), torch.randn(3, 1, 4, 4)
    for one, other in zip(zeroed(images), narrow(images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    check_zeroed(wide, EXAMPLE, plan)

    model = PublishedModel(
        {
            name: LatticeTensor(np.rint(array * 50).astype(np.int32), 0.02)
            if array.ndim and "running" not in name
            else RawTensor(array)
            for name, array in arrays.items()
        }
    )
    tried = plan.zeroed(model)
    assert plan.narrow(tried).digest == plan.narrow(model).digest
    statistics = tried.tensors["norm.running_var"], model.tensors["norm.running_var"]
    assert np.array_equal(*(tensor.values for tensor in statistics))  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [small_resnet_group, small_transformer])
def test_channels_that_a_layer_counts_cannot_be_tried(make: Callable[[], nn.Module]) -> None:
    wide, inputs = make(), (torch.randn(2, 1, 28, 28),)
    with pytest.raises(PlanError, match=r"cannot be tried: a layer computes over all of them"):
        check_zeroed(wide, inputs, choose_channels(wide, inputs, 0.5))


def test_channels_behind_batch_normalisation_can_be_tried() -> None:
    wide, inputs = small_resnet_batch(), (torch.randn(2, 1, 28, 28),)
    check_zeroed(wide, inputs, choose_channels(wide, inputs, 0.5))
