"""Data sets and partitions: seeded, disjoint, complete."""

from __future__ import annotations

import numpy as np
import pytest

from prunecast.simulations.data import DATA, DataError, load_examples
from prunecast.simulations.partitions import PARTITIONS
from prunecast.simulations.tasks import TASKS

CLASSES = TASKS.make("classification")


@pytest.fixture(scope="module")
def mnist():
    return load_examples(DATA.make("mnist-5k"), CLASSES, seed=1)


@pytest.fixture(scope="module")
def labels(mnist):
    return mnist[0].targets


def test_the_digits_are_real_and_split(mnist):
    training, held_out = mnist
    images = training.inputs["x"]
    assert images.shape == (4000, 1, 28, 28)
    assert held_out.inputs["x"].shape == (1000, 1, 28, 28)
    assert images.dtype == np.float32
    assert images.min() == 0.0
    assert images.max() == 1.0
    assert sorted(set(training.targets.tolist())) == list(range(10))
    together = np.concatenate([training.targets, held_out.targets])
    assert np.bincount(together).tolist() == [500] * 10


@pytest.mark.parametrize("kind", ["dirichlet", "iid"])
def test_partitions_are_disjoint_complete_and_seeded(labels, kind):
    spec = PARTITIONS.make(kind)
    parts = spec.split(labels, clients=10, seed=7)
    assert sorted(np.concatenate(parts).tolist()) == list(range(4000))
    assert min(map(len, parts)) >= 10
    again = spec.split(labels, clients=10, seed=7)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    other = spec.split(labels, clients=10, seed=8)
    assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


def test_a_small_alpha_skews_the_labels(labels):
    def skew(kind: str, **keys: float) -> float:
        parts = PARTITIONS.make(kind, **keys).split(labels, clients=10, seed=7)
        return float(np.mean([np.bincount(labels[p]).max() / len(p) for p in parts]))

    assert skew("dirichlet", alpha=0.3) > 2 * skew("iid")


def test_what_cannot_be_spread_is_said(labels):
    with pytest.raises(DataError, match=r"lower partition\.min_size"):
        PARTITIONS.make("dirichlet", min_size=20).split(labels[:30], clients=10, seed=1)


def test_unusable_files_are_named(tmp_path):
    def load(path, **keys):
        return load_examples(DATA.make("npz", path=str(path), **keys), CLASSES, seed=1)

    with pytest.raises(DataError, match="cannot read"):
        load(tmp_path / "none.npz")
    path = tmp_path / "odd.npz"
    np.savez(path, x=np.zeros((4, 2)), y=np.zeros((4, 2)))
    with pytest.raises(DataError, match="one integer label"):
        load(path)
    np.savez(path, x=np.zeros((4, 2)), y=np.zeros(4, int))
    with pytest.raises(DataError, match="held_out = 4"):
        load(path, held_out=4)
    np.savez(path, x=np.zeros((4, 2)), y=np.zeros(5, int))
    with pytest.raises(DataError, match="4 of input 'x', but 5 targets"):
        load(path, held_out=1)
