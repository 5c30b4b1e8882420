"""Data sets and partitions: seeded, disjoint, complete."""

from __future__ import annotations

import dataclasses
import gzip

import numpy as np
import pytest

from prunecast.simulations.data import DATA, DataError, Examples, load_examples
from prunecast.simulations.kinds import ScenarioError
from prunecast.simulations.partitions import PARTITIONS
from prunecast.simulations.runner.run import new_run_folder, run_scenario
from prunecast.simulations.scenarios import scenario_from_mapping
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


def test_niid_bench_draws_its_partition_whatever_the_seed_of_the_scenario(labels):
    made = PARTITIONS.make("niid-bench")
    parts = made.split(labels, clients=10, seed=7)
    assert all(map(np.array_equal, parts, made.split(labels, clients=10, seed=8)))
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    # the first class is dealt before anybody has the average: after the shuffle of its members, the
    # next draw of a generator seeded with 42
    rng = np.random.default_rng(42)
    first = np.flatnonzero(labels == 0)
    rng.shuffle(first)
    shares = np.diff(np.floor(np.cumsum(rng.dirichlet(np.full(10, 0.5))) * len(first)), prepend=0)
    zeros = [np.count_nonzero(labels[part] == 0) for part in parts]
    assert zeros[:-1] == shares[:-1].tolist()
    # nobody is given more once having the average, but the last one what rounding leaves of a class
    for part in parts:
        sizes = np.cumsum(np.bincount(labels[part], minlength=10))
        full = np.flatnonzero(sizes >= len(labels) / 10)
        assert not full.size or len(part) - sizes[full[0]] <= 10 * (part is parts[-1])
    with pytest.raises(DataError, match=r"in 1000 draws: lower partition\.min_size"):
        PARTITIONS.make("niid-bench", min_size=20).split(labels[:30], clients=10, seed=1)


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


@pytest.mark.parametrize("held_out", [4, "test"])
def test_a_part_of_the_examples_may_be_trained_on(tmp_path, held_out):
    for part, count in (("train", 20), ("test", 4)):
        np.savez(
            tmp_path / f"{part}.npz",
            x=np.arange(2 * count).reshape(count, 2),
            y=[0, 1] * (count // 2),
        )

    def load(**keys):
        source = DATA.make("npz", path=str(tmp_path), held_out=held_out, **keys)
        return load_examples(source, CLASSES, seed=1)

    whole, some = load(), load(examples=7)
    assert np.array_equal(some[0].inputs["x"], whole[0].inputs["x"][:7])  # the same draw, cut
    assert np.array_equal(some[0].targets, whole[0].targets[:7])
    assert np.array_equal(some[1].inputs["x"], whole[1].inputs["x"])
    count = len(whole[0])
    assert len(load(examples=count)[0]) == count
    with pytest.raises(DataError, match=rf"data\.examples = 21, but there are {count} to train on"):
        load(examples=21)


def test_folders_of_idx_files_are_read(tmp_path):
    rng = np.random.default_rng(2)
    stored = {}
    for part, count in (("train", 12), ("t10k", 5)):
        stored[part] = rng.integers(0, 256, (count, 4, 6), dtype=np.uint8)
        head = b"\0\0\x08\x03" + np.array([count, 4, 6], ">u4").tobytes()
        (tmp_path / f"{part}-images.idx3-ubyte").write_bytes(head + stored[part].tobytes())
        head = b"\0\0\x0b\x01" + np.array([count], ">u4").tobytes()  # of 16 bits
        labels = gzip.compress(head + np.arange(count).astype(">i2").tobytes())
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(labels)
    source = DATA.read({"source": "idx", "path": tmp_path.name}, "data").located(tmp_path.parent)
    training, measured = source.read(), source.read_test()
    assert training.targets.tolist() == list(range(12))
    for part, found in (("train", training), ("t10k", measured)):
        expected = stored[part][:, None].astype(np.float32) / np.float32(255)
        assert np.array_equal(found.inputs["x"], expected)
    assert len(load_examples(dataclasses.replace(source, held_out="test"), CLASSES, seed=1)[1]) == 5
    with pytest.raises(DataError, match=r"raise data\.max_bytes"):
        dataclasses.replace(source, max_bytes=100).read()
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="holds no train-labels-idx1-ubyte"):
        source.read()
    with pytest.raises(ScenarioError, match=r"data\.path: is missing; source = 'idx'"):
        DATA.make("idx").check("data")


def test_a_run_counts_what_it_measured_on(tiny, digits, tmp_path):
    with np.load(digits) as held:
        for name, part in (("train", slice(0, 90)), ("test", slice(90, 107))):
            np.savez(tmp_path / f"{name}.npz", x=held["x"][part], y=held["y"][part])
    data = {"source": "npz", "path": str(tmp_path), "held_out": "test"}
    arms = {"dense": {"kind": "dense"}}
    scenario = scenario_from_mapping({**tiny, "data": data, "rounds": 1, "arms": arms})
    assert scenario_from_mapping(scenario.to_mapping()) == scenario
    result = run_scenario(scenario, new_run_folder(tmp_path, "tiny"))
    assert (result["data"]["training"], result["data"]["held_out"]) == (90, 17)


def test_natural_clients_are_identities():
    whose = np.array([30, 10, 20, 10, 30, 30, 20])
    inputs = {"x": np.zeros((7, 1), np.float32)}
    training = Examples(inputs, np.arange(7), whose)
    natural = PARTITIONS.make("natural")
    groups = natural.groups(training, CLASSES)
    assert [p.tolist() for p in natural.split(groups, clients=3, seed=1)] == [
        *([1, 3], [2, 6], [0, 4, 5])
    ]
    two = natural.split(groups, clients=2, seed=1)
    assert sorted(np.concatenate(two).tolist()) == list(range(7))
    held = [set(whose[part].tolist()) for part in two]
    assert not held[0] & held[1]
    assert sorted(map(len, held)) == [1, 2]
    assert all(map(np.array_equal, two, natural.split(groups, clients=2, seed=1)))
    with pytest.raises(DataError, match="3 identities cannot be spread over 4 clients"):
        natural.split(groups, clients=4, seed=1)
    with pytest.raises(DataError, match="do not say whose an example is"):
        natural.groups(Examples(inputs, np.arange(7)), CLASSES)
    assert training.take(slice(2)).identities.tolist() == [30, 10]


def test_folders_of_npz_files_say_what_is_set_apart_and_whose_an_example_is(tmp_path):
    for name, count in (("train", 6), ("test", 2)):
        arrays = {"x": np.ones((count, 3)), "y": np.arange(count), "user": np.arange(count) % 2}
        np.savez(tmp_path / f"{name}.npz", **arrays)
    keys = {"source": "npz", "path": str(tmp_path), "held_out": "test"}
    source = DATA.read({**keys, "identity": "user"}, "data")
    training, measured = load_examples(source, CLASSES, seed=1)
    assert (len(training), len(measured)) == (6, 2)
    assert np.array_equal(training.identities, training.targets % 2)
    training.save(tmp_path / "saved.npz")
    assert np.array_equal(Examples.load(tmp_path / "saved.npz").identities, training.identities)
    with pytest.raises(DataError, match=r"'x' is float64.*an identity is a whole number"):
        dataclasses.replace(source, identity="x").read()
    with pytest.raises(DataError, match=r"data\.targets and data\.identity"):
        dataclasses.replace(source, identity="age").read()
    file = dataclasses.replace(source, path=str(tmp_path / "train.npz"))
    with pytest.raises(DataError, match="'test', but the data set apart no examples"):
        load_examples(file, CLASSES, seed=1)
    (tmp_path / "test.npz").unlink()
    with pytest.raises(DataError, match=r"test\.npz"):
        load_examples(source, CLASSES, seed=1)
