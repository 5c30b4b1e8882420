"""Masks held through optimisers: every masked weight stays +0, the others as a loop by hand has it.

Each case trains twice: with `hold_masks`, and by a loop that zeroes gradients before each step and
weights after it. Both must end in the same bits.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunecast.client import hold_masks
from prunecast.compression.pruning.masks import holding
from prunecast.compression.pruning.plan import PlanError
from prunecast.simulations.networks import (
    attention,
    convolutional,
    factorisation,
    graphs,
    recurrent,
    residual,
)

Masks = dict[str, np.ndarray]
Optimiser = Callable[[Any], torch.optim.Optimizer]


def images() -> tuple[Tensor, ...]:
    return (torch.rand(3, 1, 28, 28),)


def tokens() -> tuple[Tensor, ...]:
    return (torch.randint(0, 32, (2, 8)),)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "cnn": (convolutional.narrow_lenet, images),
    "resnet-batch": (residual.small_resnet_batch, images),
    "resnet-group": (residual.small_resnet_group, images),
    "lstm": (recurrent.small_lstm, images),
    "transformer": (attention.small_transformer, images),
    "lora": (attention.lora_language_model, tokens),
    "graph": (graphs.gcn, lambda: (torch.rand(2, 5, 16), torch.rand(2, 5, 5))),
    "factorisation": (
        factorisation.matrix_factorisation,
        lambda: (torch.arange(40), torch.arange(40) + 7),
    ),
    "conv1d": (convolutional.sensor_cnn, lambda: (torch.rand(3, 6, 16),)),
}
OPTIMISERS: dict[str, Optimiser] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "sgd-momentum-decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov-decay": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "adam-decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop-momentum-decay": lambda p: torch.optim.RMSprop(
        p, lr=0.01, momentum=0.9, weight_decay=0.1
    ),
}
VARIANTS: dict[str, Optimiser] = {
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    "sgd-single": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=False),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop-centred": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


def prepared(family: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...], Masks]:
    """A network, inputs of it, and masks of about a third of each matrix."""
    make, draw = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, inputs = make(), draw()
    rng = np.random.default_rng(seed)
    masks = {
        name: rng.random(tuple(parameter.shape)) < 0.3
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
    }
    return model.train(), inputs, masks


def loss_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return model(*inputs).square().mean()


def by_hand(
    model: nn.Module, inputs: tuple[Tensor, ...], masks: Masks, make: Optimiser, steps: int
) -> None:
    """The reference: gradients zeroed before each step, weights after it."""
    optimiser = make(model.parameters())
    kept = {n: torch.from_numpy(mask) for n, mask in masks.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def apply() -> None:
        with torch.no_grad():
            for name, mask in kept.items():
                parameters[name].masked_fill_(~mask, 0)

    apply()
    for _ in range(steps):
        optimiser.zero_grad()
        loss_of(model, inputs).backward()
        for name, mask in kept.items():
            if (gradient := parameters[name].grad) is not None:
                gradient.masked_fill_(~mask, 0)
        optimiser.step()
        apply()


def assert_held(model: nn.Module, masks: Masks, before: dict[str, Tensor] | None = None) -> None:
    """+0 off the masks; and, with the weights of before, something moved in each tensor."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        values = parameters[name].detach().cpu().numpy()
        assert not values[~mask].view(np.uint32).any(), name
        if before is not None:
            assert (values != before[name].numpy())[mask].any(), name


def assert_same(model: nn.Module, other: nn.Module) -> None:
    found, wanted = model.state_dict(), other.state_dict()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def compare(family: str, make: Optimiser, steps: int = 3) -> None:
    model, inputs, masks = prepared(family)
    reference, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    optimiser = make(model.parameters())
    hold_masks(optimiser, masks, model)
    for _ in range(steps):
        optimiser.zero_grad()
        loss_of(model, inputs).backward()
        optimiser.step()
    assert_held(model, masks, before)
    by_hand(reference, inputs, masks, make, steps)
    assert_same(model, reference)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_every_family_trains_as_by_hand(family: str, optimiser: str) -> None:
    compare(family, OPTIMISERS[optimiser])


@pytest.mark.parametrize("optimiser", VARIANTS)
def test_every_optimiser_of_torch_trains_as_by_hand(optimiser: str) -> None:
    compare("cnn", VARIANTS[optimiser], steps=4)


def test_an_optimiser_that_mixes_weights_is_held_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    masks = {n: np.random.default_rng(1).random(p.shape) < 0.5 for n, p in model.named_parameters()}
    before, reference = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    inputs = (torch.rand(5, 8),)

    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Muon(parameters, lr=0.1, weight_decay=0.1)

    optimiser = make(model.parameters())
    hold_masks(optimiser, masks, model)
    for _ in range(4):
        optimiser.zero_grad()
        loss_of(model, inputs).backward()
        optimiser.step()
    assert_held(model, masks, before)
    by_hand(reference, inputs, masks, make, 4)
    assert_same(model, reference)


@pytest.mark.parametrize("family", ["cnn", "lstm", "factorisation"])
def test_lbfgs_learns_its_curvature_from_what_is_kept(family: str) -> None:
    """Its gradients come to be inside step(), where no hook of the step sees them."""
    model, inputs, masks = prepared(family)
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.LBFGS(
        model.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe"
    )
    hold_masks(optimiser, masks, model)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = loss_of(model, inputs)
        loss.backward()
        return loss

    losses = [optimiser.step(closure).item() for _ in range(3)]
    assert losses[-1] < losses[0]
    assert_held(model, masks, before)
    for name, mask in masks.items():
        gradient = dict(model.named_parameters())[name].grad
        assert gradient is not None
        assert not gradient.numpy()[~mask].any()


def test_momentum_of_before_resurrects_nothing() -> None:
    """Masks that come in mid-training meet momentum and moments that pruned weights had."""
    for make in (OPTIMISERS["nesterov-decay"], OPTIMISERS["adamw"]):
        model, inputs, masks = prepared("cnn")
        optimiser = make(model.parameters())
        for step in range(6):
            if step == 3:
                held = hold_masks(optimiser, masks, model)
            optimiser.zero_grad()
            loss_of(model, inputs).backward()
            optimiser.step()
        assert_held(model, masks)
        for name, mask in masks.items():
            for value in optimiser.state[dict(model.named_parameters())[name]].values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    assert not value.numpy()[~mask].any()
        held.release()
        optimiser.zero_grad()
        loss_of(model, inputs).backward()
        optimiser.step()
        assert any(
            dict(model.named_parameters())[n].detach().numpy()[~m].any() for n, m in masks.items()
        )


def test_other_masks_at_a_pruning_event() -> None:
    model, inputs, masks = prepared("conv1d")
    optimiser = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    other = {name: np.roll(mask, 1) for name, mask in masks.items()}
    with hold_masks(optimiser, masks) as held:
        for wanted in (masks, other):
            held.update(wanted)
            assert_held(model, wanted)
            before = copy.deepcopy(model.state_dict())
            for _ in range(2):
                optimiser.zero_grad()
                loss_of(model, inputs).backward()
                optimiser.step()
            assert_held(model, wanted, before)
        with pytest.raises(PlanError):
            held.update({"0.weight": np.ones(3, bool)})
        optimiser.step()
        assert_held(model, other)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_mixed_precision_and_steps_that_the_scaler_skips(kind: torch.dtype) -> None:
    model, inputs, masks = prepared("cnn")
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=kind is torch.float16, init_scale=2.0**16)
    hold_masks(optimiser, masks, model)
    skipped = 0
    for step in range(6):
        optimiser.zero_grad()
        with torch.autocast("cpu", kind):
            loss = loss_of(model, inputs) * (torch.inf if step == 1 else 1.0)
        scaler.scale(loss).backward()
        weights = copy.deepcopy(model.state_dict())
        scaler.step(optimiser)
        scaler.update()
        if kind is torch.float16 and all(
            torch.equal(weights[n], t) for n, t in model.state_dict().items()
        ):
            skipped += 1
        if kind is torch.bfloat16 and step == 1:
            break  # without a scaler an infinite loss is the end of kept weights
        assert_held(model, masks)
    assert_held(model, masks)
    if kind is torch.float16:
        assert 1 <= skipped < 6
        assert_held(model, masks, before)


def test_accumulated_and_clipped_gradients() -> None:
    """What is clipped is the norm of what is kept."""
    model, inputs, masks = prepared("transformer")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hold_masks(optimiser, masks, model)
    for _ in range(2):
        optimiser.zero_grad()
        for part in inputs[0].split(1):
            (loss_of(model, (part,)) / 3).backward()
        parameters = dict(model.named_parameters())
        kept = torch.stack([
            (p.grad * torch.from_numpy(masks[n]) if n in masks else p.grad).norm()
            for n, p in parameters.items()
            if p.grad is not None
        ]).norm()  # fmt: skip
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        torch.testing.assert_close(norm, kept)
        optimiser.step()
        assert_held(model, masks)


def test_dense_gradients_are_there_until_the_step() -> None:
    model, inputs, masks = prepared("graph")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hold_masks(optimiser, masks, model, dense_gradients=True)
    loss_of(model, inputs).backward()
    first = dict(model.named_parameters())["first.weight"]
    assert first.grad is not None
    assert first.grad.numpy()[~masks["first.weight"]].any()
    optimiser.step()
    assert not first.grad.numpy()[~masks["first.weight"]].any()
    assert_held(model, masks)


def test_groups_schedules_and_what_no_group_holds() -> None:
    model, inputs, masks = prepared("cnn")
    named = list(model.named_parameters())
    optimiser = torch.optim.AdamW([
        {"params": [p for n, p in named if n.startswith("0.")], "lr": 0.1},
        {"params": [p for n, p in named if not n.startswith("0.")][:4], "weight_decay": 0.5},
    ])  # fmt: skip
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, 1, 0.5)
    hold_masks(optimiser, masks, model)
    for _ in range(3):
        optimiser.zero_grad()
        loss_of(model, inputs).backward()
        optimiser.step()
        schedule.step()
    assert_held(model, masks)


class Tied(nn.Module):
    """One table, read as tokens and as the layer that scores them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 6)
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x))


def test_tied_weights_have_one_mask() -> None:
    torch.manual_seed(0)
    model, mask = Tied(), np.random.default_rng(0).random((20, 6)) < 0.4
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    hold_masks(optimiser, {"tokens.weight": mask, "head.weight": mask.copy()}, model)
    for _ in range(3):
        optimiser.zero_grad()
        loss_of(model, (torch.arange(20),)).backward()
        optimiser.step()
    assert_held(model, {"tokens.weight": mask, "head.weight": mask})
    apart = {"tokens.weight": mask, "head.weight": ~mask}
    with pytest.raises(PlanError, match=r"'tokens.weight' and 'head.weight' are one parameter"):
        hold_masks(optimiser, apart, model)


def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(12, 5, sparse=True)
    mask = np.random.default_rng(0).random((12, 5)) < 0.5
    optimiser = torch.optim.SparseAdam(list(table.parameters()), lr=0.1)
    hold_masks(optimiser, {"weight": mask}, table)
    before = copy.deepcopy(table.state_dict())
    for _ in range(3):
        optimiser.zero_grad()
        loss_of(table, (torch.tensor([1, 5, 5, 7]),)).backward()
        optimiser.step()
    assert_held(table, {"weight": mask}, before)


def test_masks_follow_a_model_that_moves() -> None:
    """As by `.to("cuda")` after `hold_masks`; "meta" is a device that every machine has."""
    layer, mask = nn.Linear(6, 4), np.random.default_rng(0).random((4, 6)) < 0.5
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    hold_masks(optimiser, {"weight": mask}, layer)
    layer.to("meta")
    loss_of(layer, (torch.rand(2, 6, device="meta"),)).backward()
    optimiser.step()
    assert layer.weight.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_on_cuda_with_masks_from_the_cpu(later: bool, fused: bool) -> None:
    model, inputs, masks = prepared("cnn")
    if not later:
        model.cuda()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    hold_masks(optimiser, {n: torch.from_numpy(m) for n, m in masks.items()}, model)
    model.cuda()
    for _ in range(3):
        optimiser.zero_grad()
        loss_of(model, tuple(x.cuda() for x in inputs)).backward()
        optimiser.step()
    assert_held(model, masks)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.engine,
                pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
            ],
        ),
    ],
)
def test_compiled_models_and_steps(backend: str) -> None:
    model, inputs, masks = prepared("graph")
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    optimiser = OPTIMISERS["sgd-momentum-decay"](compiled.parameters())
    hold_masks(optimiser, masks, compiled)  # names without the compiler's prefix
    step = torch.compile(optimiser.step, backend=backend)
    for _ in range(3):
        optimiser.zero_grad()
        loss_of(compiled, inputs).backward()
        step()
        assert_held(model, masks)
    by_hand(reference, inputs, masks, OPTIMISERS["sgd-momentum-decay"], 3)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_in_a_client_app_without_a_word_of_masks() -> None:
    """The optimiser was given names, the masks are those of the message being handled."""
    model, inputs, masks = prepared("conv1d")
    with holding(masks):
        optimiser = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
        hold_masks(optimiser)
        loss_of(model, inputs).backward()
        optimiser.step()
    assert_held(model, masks)


def test_masks_that_fit_nothing_are_refused_by_name() -> None:
    layer = nn.BatchNorm1d(4)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    hold_masks(optimiser, {"running_mean": np.zeros(4, bool)}, layer)
    assert layer.weight.detach().all()
    with pytest.raises(PlanError, match=r"mask of 'weight' is \[3\], the parameter \[4\]"):
        hold_masks(optimiser, {"weight": np.zeros(3, bool)}, layer)
    with pytest.raises(PlanError, match="mask for 'nope', which the model does not have"):
        hold_masks(optimiser, {"nope": np.zeros(3, bool)}, layer)
    with pytest.raises(PlanError, match=r"give the module too, hold_masks\(optimizer, masks"):
        hold_masks(optimiser, {"weight": np.zeros(4, bool)})
