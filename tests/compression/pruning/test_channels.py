"""Channels: a plan is made once, and narrows every later version."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from prunecast.compression.pruning.channels import ChannelPlan
from prunecast.compression.pruning.narrowing import choose_channels, narrow_module
from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor


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
    with pytest.raises(PlanError, match="cannot be removed"):
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
