"""The trees, as bytes, and the data; knows nothing of Flower."""

from __future__ import annotations

import numpy as np
import xgboost
from sklearn.datasets import load_breast_cancer

PARAMS = {
    "objective": "binary:logistic",
    "eval_metric": "auc",
    "eta": 0.3,
    "max_depth": 4,
    "tree_method": "hist",
    "nthread": 1,
}


def boosted(trees: bytes, data: xgboost.DMatrix, rounds: int) -> bytes:
    """New trees alone, fitted to what the given ones get wrong; all there are, if none is given."""
    if not trees:
        return bytes(xgboost.train(PARAMS, data, num_boost_round=rounds).save_raw("json"))
    booster = load(trees)
    before = booster.num_boosted_rounds()
    for number in range(before, before + rounds):
        booster.update(data, number)
    return bytes(booster[before:].save_raw("json"))


def test(trees: bytes, data: xgboost.DMatrix) -> float:
    """Area under the curve."""
    return float(load(trees).eval(data).rsplit(":", 1)[1])


def load(trees: bytes) -> xgboost.Booster:
    booster = xgboost.Booster(PARAMS)
    booster.load_model(bytearray(trees))
    return booster


def load_data(partition: int, num_partitions: int) -> tuple[xgboost.DMatrix, xgboost.DMatrix]:
    """One node's share of the 569 tumours that come with scikit-learn: 80 % to train."""
    features, labels = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))[partition::num_partitions]
    train, held_out = np.split(order, [len(order) * 4 // 5])
    return (
        xgboost.DMatrix(features[train], label=labels[train]),
        xgboost.DMatrix(features[held_out], label=labels[held_out]),
    )
