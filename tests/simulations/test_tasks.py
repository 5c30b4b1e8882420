"""Tasks beside classification and regression: losses, measures, what is refused, what differs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prunecast.simulations.data import DataError
from prunecast.simulations.tasks import TASKS

SKIPPED = -100


def logits(*rows):
    """(1, positions, classes), float32."""
    return np.array([rows], dtype=np.float32)


def test_positions_are_measured_where_they_have_a_label():
    task = TASKS.make("positions")
    outputs = logits([2, 0, 1], [0, 3, 1], [0, 0, 1])
    targets = task.targets(np.array([[0, 2, SKIPPED]], dtype=np.int32))
    assert (targets.dtype, task.score(outputs, targets)) == (np.int64, 0.5)
    loss = task.training_loss(torch.from_numpy(outputs), torch.from_numpy(targets))
    rows = [(outputs[0, at], targets[0, at]) for at in (0, 1)]
    expected = np.mean([np.log(np.exp(row).sum()) - row[label] for row, label in rows])
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    groups = task.groups(np.array([[3, 1, 3], [2, 0, SKIPPED], [SKIPPED, SKIPPED, 5]]))
    assert groups.tolist() == [3, 0, 5]


def test_a_device_may_choose_another_class_only_where_two_are_as_good():
    task = TASKS.make("positions", tolerance=0.01)
    server = logits([10.0, 9.95, 0.0], [5.0, 1.0, 0.0])
    near, far, broken = server.copy(), server.copy(), server.copy()
    near[0, 0, 1] = 10.01
    far[0, 1, 1] = 5.5
    broken[0, 1, 2] = np.nan
    device = np.concatenate([near, far, broken])
    assert task.different(np.concatenate([server] * 3), device).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (np.zeros(4, int), r"int64 of shape \[4\]: choose task\.kind = 'classification'"),
        (np.zeros((4, 3)), "not float64 of shape"),
        (np.array([[0, 1], [-1, 0]]), "count from 0, these from -1: add 1"),
        (np.array([[0, 1], [SKIPPED, SKIPPED]]), "example 1 has no label at any position"),
    ],
)
def test_labels_of_positions_that_cannot_be_meant_are_refused(raw, said):
    with pytest.raises(DataError, match=said):
        TASKS.make("positions").targets(raw)


def test_positions_and_classes_must_fit_the_network():
    task = TASKS.make("positions")
    outputs = np.zeros((2, 3, 4), np.float32)
    task.check(outputs, np.array([[0, 1, 3]]))
    with pytest.raises(DataError, match=r"labels reach from 1 to 4.*subtract 1 from labels that"):
        task.check(outputs, np.array([[1, 4, 2]]))
    with pytest.raises(DataError, match=r"labels reach from 0 to 9.*give it 10"):
        task.check(outputs, np.array([[0, 9, SKIPPED]]))
    for wrong in (outputs[:, :2], outputs[:, 0]):
        with pytest.raises(DataError, match=r"targets of 3 positions: return logits"):
            task.check(wrong, np.array([[0, 1, 2]]))


def test_a_reconstruction_has_its_first_input_as_target():
    task = TASKS.make("reconstruction")
    x = np.arange(24, dtype=np.float64).reshape(4, 2, 3)
    targets = task.targets(task.targets_of({"x": x, "y": x + 1}, np.arange(4)))
    assert (targets.dtype, targets.shape) == (np.float32, (4, 2, 3))
    assert task.score(targets + 2, targets) == 4.0
    assert task.groups(targets).tolist() == sorted(task.groups(targets).tolist())
    assert len(set(task.groups(targets).tolist())) == 4
    assert task.different(targets, targets).tolist() == []
    assert task.different(targets, targets + 1).tolist() == [0, 1, 2, 3]
    task.check(targets, targets)
    with pytest.raises(DataError, match=r"returns \[6\] for an input of \[2, 3\]: return the sh"):
        task.check(targets.reshape(4, 6), targets)
    with pytest.raises(DataError, match=r"is int64: convert it to float32"):
        task.targets(np.zeros((4, 3), np.int64))
    with pytest.raises(DataError, match="is one number for each example"):
        task.targets(np.zeros(4))


def test_ratings_are_measured_on_their_scale():
    task = TASKS.make("rating")
    targets = task.targets(np.array([1, 5, 3], dtype=np.int64))
    assert targets.shape == (3, 1)
    answers = np.array([[-3.0], [9.0], [4.0]], dtype=np.float32)
    assert task.score(answers, targets) == pytest.approx((1 / 3) ** 0.5)
    with pytest.raises(DataError, match=r"from 0 to 5, and the scale from 1 to 5: set task\.least"):
        task.targets(np.array([0, 5]))
    assert TASKS.make("rating", least=0.0).targets(np.array([0, 5])).shape == (2, 1)
    with pytest.raises(DataError, match="one rating for each example"):
        task.targets(np.ones((4, 2)))
