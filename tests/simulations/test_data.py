"""Data sets and partitions: seeded, disjoint, complete."""

from __future__ import annotations

import numpy as np
import pytest

from prunecast.simulations.data import DataError, load_dataset, partition
from prunecast.simulations.scenarios import DataSpec, PartitionSpec


@pytest.fixture(scope="module")
def mnist():
    return load_dataset(DataSpec(), seed=1)


def test_the_digits_are_real_and_split(mnist):
    assert mnist.x.shape == (4000, 1, 28, 28)
    assert mnist.held_out_x.shape == (1000, 1, 28, 28)
    assert mnist.x.dtype == np.float32
    assert mnist.x.min() == 0.0
    assert mnist.x.max() == 1.0
    assert sorted(set(mnist.y.tolist())) == list(range(10))
    together = np.concatenate([mnist.y, mnist.held_out_y])
    assert np.bincount(together).tolist() == [500] * 10


@pytest.mark.parametrize("kind", ["dirichlet", "iid"])
def test_partitions_are_disjoint_complete_and_seeded(mnist, kind):
    spec = PartitionSpec(kind=kind)
    parts = partition(mnist.y, spec, clients=10, seed=7)
    assert sorted(np.concatenate(parts).tolist()) == list(range(4000))
    assert min(map(len, parts)) >= 10
    again = partition(mnist.y, spec, clients=10, seed=7)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    other = partition(mnist.y, spec, clients=10, seed=8)
    assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


def test_a_small_alpha_skews_the_labels(mnist):
    def skew(spec: PartitionSpec) -> float:
        parts = partition(mnist.y, spec, clients=10, seed=7)
        return float(np.mean([np.bincount(mnist.y[p]).max() / len(p) for p in parts]))

    assert skew(PartitionSpec(alpha=0.3)) > 2 * skew(PartitionSpec(kind="iid"))


def test_what_cannot_be_spread_is_said(mnist):
    with pytest.raises(DataError, match=r"lower partition\.min_size"):
        partition(mnist.y[:30], PartitionSpec(min_size=20), clients=10, seed=1)


def test_unusable_files_are_named(tmp_path):
    missing = DataSpec(source="npz", path=str(tmp_path / "none.npz"))
    with pytest.raises(DataError, match="cannot read"):
        load_dataset(missing, seed=1)
    path = tmp_path / "odd.npz"
    np.savez(path, x=np.zeros((4, 2)), y=np.zeros((4, 2)))
    with pytest.raises(DataError, match="one integer label"):
        load_dataset(DataSpec(source="npz", path=str(path)), seed=1)
    np.savez(path, x=np.zeros((4, 2)), y=np.zeros(4, int))
    with pytest.raises(DataError, match="held_out = 4"):
        load_dataset(DataSpec(source="npz", path=str(path), held_out=4), seed=1)
