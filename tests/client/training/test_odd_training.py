"""Local training of modules and with losses that are not what most are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from prunecast.client.training.trainer import TensorBatches, TrainerError, train
from prunecast.compression.pruning.statistics import ACTIVATION, GRADIENT, GROWTH, SENSITIVITY


class Outputs(nn.Module):
    """Of a kind that a loss may be made for."""

    def __init__(self, kind, classes=3):
        super().__init__()
        self.layer, self.kind = nn.Linear(4, classes), kind

    def forward(self, inputs):
        outputs = self.layer(inputs)
        return {"dict": {"logits": outputs}, "tuple": (outputs, inputs)}.get(self.kind, outputs)


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        (Outputs("dict"), Outputs("dict"), "type dict are no classes"),
        (Outputs("tuple"), Outputs("tuple"), "type tuple are no classes"),
        (Outputs(""), Outputs("", classes=5), r"teacher's of shape \[8, 5\]"),
    ],
)
def test_outputs_that_cannot_be_distilled_are_named(student, teacher, said):
    def loss(outputs, targets):
        found = {dict: "logits", tuple: 0}.get(type(outputs), slice(None))
        return nn.functional.cross_entropy(outputs[found], targets)

    loader = TensorBatches(torch.randn(8, 4), torch.zeros(8, dtype=torch.long), batch_size=8)
    with pytest.raises(TrainerError, match=f"{said}.*distillation = 0"):
        train(student, loader, epochs=1, lr=0.1, seed=0, loss_fn=loss, teacher=teacher)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_statistics_of_an_embedding_with_sparse_gradients_are_those_of_a_dense_one(rate):
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        module = nn.Sequential(nn.EmbeddingBag(9, 4, sparse=sparse), nn.Linear(4, 3))
        words = torch.tensor([[1, 2], [2, 5], [5, 5], [1, 1]])
        loader = TensorBatches(words, torch.tensor([0, 1, 2, 0]), batch_size=2)
        wanted = (GRADIENT, GROWTH, SENSITIVITY, ACTIVATION)
        found.append(train(module, loader, epochs=2, lr=rate, seed=0, statistics=wanted).statistics)
    for name, tensors in found[1].items():
        assert tensors.keys() == found[0][name].keys()
        for tensor, values in tensors.items():
            np.testing.assert_allclose(found[0][name][tensor], values, rtol=1e-5, atol=1e-7)
