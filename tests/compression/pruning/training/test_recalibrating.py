"""BatchNorm's running statistics of the weights as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prunecast.client import recalibrate


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5), nn.ReLU()
    )


def batches(sizes: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 1, 8, 8, generator=generator), torch.zeros(n)) for n in sizes]


def test_statistics_are_those_of_the_weights_now_and_nothing_else_moves() -> None:
    module = network().train()
    module(batches((16,))[0][0])  # of the weights before
    with torch.no_grad():
        module[0].weight[:2] = 0  # pruned
    before = {n: t.clone() for n, t in module.state_dict().items()}
    given = batches((16, 16, 1))
    assert recalibrate(module, given) == 32  # one example has no variance
    outputs = [module[0](inputs) for inputs, _ in given[:2]]
    norm = module[1]
    means = torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0)
    variances = torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0)
    assert torch.allclose(norm.running_mean, means, atol=1e-6)
    assert torch.allclose(norm.running_var, variances, atol=1e-6)
    for name, tensor in module.state_dict().items():
        assert ("running" in name or "batches" in name) or torch.equal(tensor, before[name])
    assert norm.momentum == 0.3
    assert all(part.training for part in module.modules())
    assert all(p.grad is None for p in module.parameters())


def test_a_batch_that_fails_leaves_the_statistics() -> None:
    module = nn.Sequential(nn.BatchNorm1d(4))
    module(torch.rand(8, 4))
    before = copy.deepcopy(module.state_dict())
    for wrong in ([(torch.rand(8, 5), torch.zeros(8))], [(torch.rand(8, 4), torch.zeros(8)), None]):
        with pytest.raises((RuntimeError, TypeError)):
            recalibrate(module, wrong)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[name])


def test_what_has_nothing_to_estimate_is_left_alone() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2))
    assert recalibrate(module, batches((4,))) == 0  # not even drawn
    normed = network().eval()
    before = {n: t.clone() for n, t in normed.state_dict().items()}
    assert recalibrate(normed, batches((1, 1))) == 0
    assert all(torch.equal(t, before[n]) for n, t in normed.state_dict().items())
    assert not normed.training


class Auxiliary(nn.Module):
    """Which has a second head while it trains, as Inception and GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.aside = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        aside = self.aside(inputs) if self.training else 0
        return self.main(inputs) + aside


def test_a_layer_that_runs_in_training_alone_keeps_its_statistics() -> None:
    module = Auxiliary()
    module(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert recalibrate(module, [(torch.tensor([[5.0, 6.0], [7.0, 8.0]]), torch.zeros(2))]) == 2
    assert module.main.running_mean.tolist() == [6.0, 7.0]
    for name, tensor in module.aside.state_dict().items():
        assert tensor.tolist() == before[f"aside.{name}"].tolist()
