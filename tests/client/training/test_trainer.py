"""Local training: masks hold, runs repeat, the caller's state stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunecast.client.training import trainer
from prunecast.client.training.trainer import TensorBatches, TrainerError, evaluate, train
from prunecast.compression.pruning.statistics import ACTIVATION, GRADIENT, GROWTH, SENSITIVITY
from prunecast.compression.pruning.training.measuring import StatisticsMeter


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def seeded_network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return network()


def examples(count: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return torch.randn(count, 12, generator=generator) + labels[:, None].float(), labels


def batches(shuffle: bool = True) -> TensorBatches:
    return TensorBatches(*examples(), batch_size=8, shuffle=shuffle)


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    density=st.floats(0.0, 1.0),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
)
def test_weights_off_the_mask_stay_exactly_zero(seed, density, momentum, weight_decay):
    rng = np.random.default_rng(seed)
    masks = {
        "0.weight": rng.random((16, 12)) < density,
        "3.weight": rng.random((3, 16)) < density,
    }
    model = seeded_network(seed % 100)
    train(
        model,
        batches(),
        epochs=2,
        lr=0.1,
        momentum=momentum,
        weight_decay=weight_decay,
        masks=masks,
        device="cpu",
        seed=1,
    )
    for name, mask in masks.items():
        values = model.state_dict()[name].numpy()
        dropped = values[~mask]
        assert not dropped.any()
        assert not np.signbit(dropped).any()
    if masks["0.weight"].any():
        assert model.state_dict()["0.weight"].numpy()[masks["0.weight"]].any()


def test_gradients_are_of_all_weights_and_change_nothing():
    inputs, targets = examples(8)
    loader = TensorBatches(inputs, targets, batch_size=8)
    mask = np.zeros((16, 12), bool)
    mask[::2] = True
    given = {"lr": 0.1, "masks": {"weight": mask}, "device": "cpu", "seed": 1}
    plain, measured = nn.Linear(12, 16), nn.Linear(12, 16)
    plain.load_state_dict(measured.state_dict())
    assert train(plain, loader, epochs=1, **given).statistics == {}
    start = nn.Linear(12, 16)
    start.load_state_dict(measured.state_dict())
    found = train(measured, loader, epochs=1, statistics=[GRADIENT], **given).statistics[GRADIENT]
    assert state(plain) == state(measured)
    with torch.no_grad():
        start.weight *= torch.from_numpy(mask)
    nn.functional.cross_entropy(start(inputs), targets).backward()
    for name, parameter in start.named_parameters():
        np.testing.assert_allclose(found[name], np.abs(parameter.grad.numpy()), rtol=1e-4)
    assert found["weight"][~mask].all()


def test_sensitivities_are_of_the_first_mini_batch_at_the_weights_that_came():
    inputs, targets = examples(8)
    loader = TensorBatches(inputs, targets, batch_size=4)  # two steps, of which one counts
    model = nn.Linear(12, 16)
    start = nn.Linear(12, 16)
    start.load_state_dict(model.state_dict())
    model.bias.requires_grad_(False)
    given = {"epochs": 2, "lr": 0.1, "device": "cpu", "seed": 1}
    found = train(model, loader, statistics=[SENSITIVITY, "unheard-of"], **given).statistics
    nn.functional.cross_entropy(start(inputs[:4]), targets[:4]).backward()
    assert list(found) == [SENSITIVITY]
    assert list(found[SENSITIVITY]) == ["weight"]  # what is frozen has none
    expected = (start.weight.detach() * start.weight.grad).numpy()
    np.testing.assert_allclose(found[SENSITIVITY]["weight"], expected, rtol=1e-4, atol=1e-9)
    assert (found[SENSITIVITY]["weight"] < 0).any()  # the sign is for the mean over nodes


def test_a_step_that_overflows_measures_no_sensitivity():
    """A gradient scaler leaves the weights as they are then, and the next step is of these."""
    model = nn.Linear(2, 1, bias=False)
    with StatisticsMeter(model, [SENSITIVITY, GRADIENT]) as meter:
        for gradient in ([torch.inf, 1.0], [3.0, -1.0], [9.0, 9.0]):
            model.weight.grad = torch.tensor([gradient])
            meter.step()
    expected = model.weight.detach() * torch.tensor([[3.0, -1.0]])
    assert torch.equal(torch.from_numpy(meter.found()[SENSITIVITY]["weight"]), expected)
    assert np.isfinite(meter.found()[GRADIENT]["weight"]).all()


def test_activations_are_the_mean_sizes_of_the_inputs_of_layers():
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.grouped = nn.Conv2d(2, 4, 3), nn.Conv1d(4, 6, 3, groups=2)
            self.head = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.inputs = [x, self.conv(x).flatten(2)]
            self.inputs.append(self.grouped(self.inputs[1]).mean(2))
            return self.head(self.inputs[2])

    model, images = Layers(), torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    loader = TensorBatches(images, torch.arange(6) % 3, batch_size=4)  # of 4 and of 2
    given = {"epochs": 1, "lr": 0.0, "device": "cpu", "seed": 1}
    found = train(model, loader, statistics=[ACTIVATION], **given).statistics[ACTIVATION]
    model(images)
    conv, grouped, head = (x.detach().abs().numpy() for x in model.inputs)
    np.testing.assert_allclose(found["conv.weight"], conv.mean((0, 2, 3))[None, :, None, None])
    groups = grouped.mean((0, 2)).reshape(2, 2).mean(0)
    np.testing.assert_allclose(found["grouped.weight"], groups[None, :, None], rtol=1e-5)
    np.testing.assert_allclose(found["head.weight"], head.mean(0)[None], rtol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_momentum_and_gradients_off_the_mask_stay_zero(monkeypatch):
    made: list[torch.optim.SGD] = []
    original = torch.optim.SGD

    def remember(*args, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(torch.optim, "SGD", remember)
    model, mask = seeded_network(), np.zeros((16, 12), bool)
    mask[::2] = True
    train(
        model,
        batches(),
        epochs=1,
        lr=0.1,
        momentum=0.9,
        weight_decay=0.01,
        masks={"0.weight": mask},
        device="cpu",
        seed=1,
    )
    weight = model[0].weight
    momentum = made[0].state[weight]["momentum_buffer"].numpy()
    assert not momentum[~mask].any()
    assert momentum[mask].any()
    assert not weight.grad.numpy()[~mask].any()


class TwoInputs(nn.Module):
    """A number from a vector and an index."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 12)
        self.last = nn.Linear(12, 1)

    def forward(self, place, index):
        return self.last(place * self.table(index))


def test_inputs_may_be_several_of_any_dtype_and_targets_numbers():
    rng = torch.Generator().manual_seed(1)
    place, index = torch.randn(40, 12, generator=rng), torch.arange(40) % 4
    targets = place.sum(1, keepdim=True) * (index + 1)[:, None]
    in_order = TensorBatches([place, index], targets, batch_size=8)
    by_name = [({"index": i, "place": p}, t) for (p, i), t in in_order]
    losses = []
    for loader in (in_order, by_name):
        torch.manual_seed(2)
        model = TwoInputs()
        keys = {"device": "cpu", "loss_fn": nn.functional.mse_loss}
        before = evaluate(model, loader, **keys)
        train(model, loader, epochs=5, lr=0.05, seed=1, **keys)
        after = evaluate(model, loader, **keys)
        assert after.loss < 0.5 * before.loss
        assert after.accuracy is None
        losses.append(after.loss)
    assert losses[0] == losses[1]
    with pytest.raises(TrainerError, match="39 inputs but 40 targets"):
        TensorBatches([place, index[:39]], targets, batch_size=8)


def test_training_is_a_function_of_its_seed():
    outcomes = []
    for seed in (3, 3, 4):
        model = seeded_network()
        result = train(model, batches(), epochs=2, lr=0.05, momentum=0.9, device="cpu", seed=seed)
        outcomes.append((result, state(model)))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1] != outcomes[2][1]


def test_the_callers_random_state_is_kept():
    before = torch.random.get_rng_state()
    train(seeded_network(), batches(), epochs=1, lr=0.05, device="cpu", seed=3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_training_learns_and_evaluation_measures_it():
    model = seeded_network()
    before = evaluate(model, batches(shuffle=False), device="cpu")
    result = train(model, batches(), epochs=20, lr=0.05, momentum=0.9, device="cpu", seed=1)
    after = evaluate(model, batches(shuffle=False), device="cpu")
    assert result.examples == after.examples == 64
    assert result.steps == 20 * 8
    assert result.precision == "float32"
    assert after.accuracy > max(before.accuracy, 0.7)
    assert after.loss < before.loss
    assert model.training


def test_mixed_precision_on_the_cpu_keeps_float32_weights_and_masks():
    model, mask = seeded_network(), np.zeros((16, 12), bool)
    mask[:8] = True
    result = train(
        model,
        batches(),
        epochs=2,
        lr=0.05,
        masks={"0.weight": mask},
        device="cpu",
        mixed_precision=True,
        seed=1,
    )
    assert result.precision == "bfloat16"
    assert model[0].weight.dtype == torch.float32
    assert not model[0].weight.detach().numpy()[~mask].any()


def test_float16_with_a_gradient_scaler_holds_the_mask(monkeypatch):
    monkeypatch.setattr(trainer, "_precision", lambda device, wanted: torch.float16)
    model, mask = seeded_network(), np.zeros((16, 12), bool)
    mask[:8] = True
    before = model[0].weight.detach().numpy().copy()
    result = train(
        model,
        batches(),
        epochs=3,
        lr=0.05,
        momentum=0.9,
        weight_decay=0.01,
        masks={"0.weight": mask},
        device="cpu",
        seed=1,
    )
    after = model[0].weight.detach().numpy()
    assert result.precision == "float16"
    assert not after[~mask].any()
    assert (after[mask] != before[mask]).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("supports_bfloat16", [True, False])
def test_mixed_precision_on_cuda(monkeypatch, supports_bfloat16):
    if not supports_bfloat16:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    model, mask = seeded_network(), np.zeros((16, 12), bool)
    mask[:8] = True
    result = train(
        model,
        batches(),
        epochs=20,
        lr=0.05,
        momentum=0.9,
        weight_decay=0.01,
        masks={"0.weight": mask},
        seed=1,
    )
    assert result.precision == ("bfloat16" if supports_bfloat16 else "float16")
    assert model[0].weight.device.type == "cuda"
    assert not model[0].weight.detach().cpu().numpy()[~mask].any()
    assert evaluate(model, batches(shuffle=False)).accuracy > 0.6


def test_buffers_with_a_mask_are_left_alone():
    model = seeded_network()
    masks = {"1.running_mean": np.zeros(16, bool)}
    train(model, batches(), epochs=1, lr=0.05, masks=masks, device="cpu", seed=1)
    assert model[1].running_mean.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"masks": {"nope": np.ones(3, bool)}}, "there is a mask for 'nope'"),
        ({"masks": {"0.weight": np.ones((2, 2), bool)}}, r"mask of '0.weight' is \[2, 2\]"),
        ({"loader": []}, "the loader is empty"),
        ({"lr": 1e30}, "lower the learning rate"),
    ],
)
def test_what_cannot_be_trained_is_said(change, message):
    settings = {"loader": batches(), "epochs": 3, "lr": 0.05, "device": "cpu", "seed": 1, **change}
    with pytest.raises(TrainerError, match=message):
        train(seeded_network(), settings.pop("loader"), **settings)


def test_batches_check_their_arguments():
    inputs, targets = examples(10)
    with pytest.raises(TrainerError, match="10 inputs but 9 targets"):
        TensorBatches(inputs, targets[:9], batch_size=2)
    with pytest.raises(TrainerError, match="batch_size"):
        TensorBatches(inputs, targets, batch_size=0)
    loader = TensorBatches(inputs, targets, batch_size=4)
    assert len(loader) == 3
    assert [len(y) for _, y in loader] == [4, 4, 2]


def test_growth_is_the_mean_gradient_with_its_sign():
    model = seeded_network()
    gradients = []
    for inputs, targets in batches(shuffle=False):
        fresh = seeded_network()  # as nothing is learnt at a rate of 0
        nn.functional.cross_entropy(fresh(inputs), targets).backward()
        gradients.append(fresh[0].weight.grad.numpy())
    found = train(model, batches(shuffle=False), epochs=1, lr=0.0, seed=0, statistics=(GROWTH,))
    np.testing.assert_allclose(
        found.statistics[GROWTH]["0.weight"], np.mean(gradients, axis=0), rtol=1e-4, atol=1e-6
    )


# -- distillation --------------------------------------------------------------------------------


def sharp_teacher() -> nn.Module:
    teacher = seeded_network(9)
    train(teacher, batches(), epochs=20, lr=0.05, seed=1)
    return teacher


def disagreement(model: nn.Module, teacher: nn.Module) -> float:
    inputs, _ = examples(200, seed=5)
    with torch.no_grad():
        model.eval(), teacher.eval()
        return float((model(inputs).softmax(1) - teacher(inputs).softmax(1)).abs().mean())


def test_a_student_comes_nearer_to_its_teacher_by_distillation():
    teacher = sharp_teacher()
    before = state(teacher)
    found = {}
    for share in (0.0, 1.0):
        student = seeded_network()
        outcome = train(
            student, batches(), epochs=3, lr=0.05, seed=2, teacher=teacher, distillation=share
        )
        assert outcome.loss > 0  # of the targets, whatever the teacher says
        found[share] = disagreement(student, teacher)
    assert found[1.0] < 0.8 * found[0.0]
    assert state(teacher) == before
    alone = seeded_network()
    train(alone, batches(), epochs=3, lr=0.05, seed=2)
    taught = seeded_network()
    train(taught, batches(), epochs=3, lr=0.05, seed=2, teacher=teacher, distillation=0.0)
    np.testing.assert_allclose(*(m[0].weight.detach().numpy() for m in (alone, taught)), rtol=1e-5)


def test_what_the_teacher_says_is_weighted_as_in_the_paper():
    outputs, known = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[0.0, 3.0, 1.0]])
    p, q = (known / 2).softmax(1), (outputs / 2).softmax(1)
    expected = float((p * (p / q).log()).sum()) * 4
    assert float(trainer._divergence(outputs, known, 2.0)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(TrainerError, match="no classes to distil"):
        trainer._divergence(torch.ones(4), torch.ones(4), 2.0)
