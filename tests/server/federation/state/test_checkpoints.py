import random
import resource

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

from prunecast.common.files import StorageError
from prunecast.server.federation import Checkpoint, CheckpointError, Policy
from prunecast.server.federation.state.checkpoints import save_newest
from support.federation import initial_arrays, to_record

SMALL = Policy.preset("small", pruning_begin=1, pruning_end=8)


def train(grid, arrays, rounds):
    random.seed(0)
    strategy = FedAvg(fraction_evaluate=0.0)
    return strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds).arrays


def test_a_resumed_run_goes_on_with_the_same_schedule_and_lattice(federation, tmp_path):
    grid, _, _ = federation(SMALL)
    arrays = train(grid, to_record(initial_arrays()), 4)
    before = grid.published(arrays)
    grid.checkpoint(arrays).save(tmp_path / "checkpoint.safetensors")

    resumed, _, _ = federation(SMALL, run_id=77)
    master = resumed.resume(Checkpoint.load(tmp_path / "checkpoint.safetensors"))
    for name, array in master.items():
        assert array.numpy().tobytes() == arrays[name].numpy().tobytes()
    after = resumed.published(master)
    assert after.counter == before.counter + 1
    assert after.sparsity() == before.sparsity()
    assert after.sparsity() == pytest.approx(SMALL.pruning().schedule(5), abs=0.01)
    assert {n: t.step for n, t in after.tensors.items() if hasattr(t, "step")} == {
        n: t.step for n, t in before.tensors.items() if hasattr(t, "step")
    }
    went_on = resumed.published(train(resumed, master, 2))
    assert went_on.sparsity() == pytest.approx(SMALL.pruning().schedule(7), abs=0.01)


def test_scalars_integers_and_empty_arrays_survive(tmp_path):
    arrays = {"n": np.array(3, np.int64), "e": np.zeros((0, 2), np.float32), "b": np.array([True])}
    Checkpoint(arrays, 5, {}).save(tmp_path / "c.safetensors")
    loaded = Checkpoint.load(tmp_path / "c.safetensors")
    assert list(loaded.arrays) == list(arrays)
    for name, array in arrays.items():
        assert (loaded.arrays[name].dtype, loaded.arrays[name].shape) == (array.dtype, array.shape)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64])
def test_files_that_are_no_checkpoint_are_named(tmp_path, content):
    path = tmp_path / "c.safetensors"
    with pytest.raises(CheckpointError, match=r"c\.safetensors"):
        Checkpoint.load(path)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"c\.safetensors"):
        Checkpoint.load(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match=r"Checkpoint\.save"):
        Checkpoint.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    "meta", ["[" * 10**5, "[]", '{"order": [], "counter": Infinity, "steps": {}}']
)
def test_metadata_that_makes_no_sense_is_refused(tmp_path, meta):
    from safetensors.numpy import save_file

    path = tmp_path / "c.safetensors"
    save_file({"w": np.zeros(3, np.float32)}, path, metadata={"prunecast": meta})
    with pytest.raises(CheckpointError, match=r"Checkpoint\.save"):
        Checkpoint.load(path)


@pytest.mark.parametrize(
    "progress",
    [(0.5,), (0.5, 0.3, 0.0, 0.0), (0.5, 0.3, -1.0, 0.0), (1.5, 0.3, 1.0, 0.0),
     (0.5, -0.3, 1.0, 0.0), (0.5, float("nan"), 1.0, 0.0), (0.5, 0.3, 1.0, 0.0, 0.1)],
)  # fmt: skip
def test_progress_that_none_can_have_made_is_refused(tmp_path, progress):
    path = tmp_path / "c.safetensors"
    Checkpoint({"w": np.zeros(4)}, 1, {}, 1, (0.5, 0.3, 0.25, 1.0)).save(path)
    assert Checkpoint.load(path).progress == (0.5, 0.3, 0.25, 1.0)
    Checkpoint({"w": np.zeros(4)}, 1, {}, 1, progress).save(path)
    with pytest.raises(CheckpointError, match="progress of learning"):
        Checkpoint.load(path)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        Checkpoint({}, 0, {}).save(tmp_path / "file" / "c.safetensors")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "c.safetensors"
    Checkpoint({"w": np.zeros(4)}, 1, {}).save(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*c\.safetensors"):
            Checkpoint({"w": np.zeros(40_000)}, 2, {}).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Checkpoint.load(path).counter == 1
    assert list(tmp_path.iterdir()) == [path]


def test_however_often_a_disk_is_full_one_earlier_checkpoint_makes_room(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    for number in (1, 2, 3):
        save_newest(Checkpoint({"w": np.ones(4, np.float32)}, number, {"w": 0.1}), path, 3)

    def refuse(checkpoint, path):
        raise StorageError("the disk is full")

    with monkeypatch.context() as full:
        full.setattr(Checkpoint, "save", refuse)
        for number in (4, 5, 6):
            with pytest.raises(StorageError, match="full"):
                save_newest(Checkpoint({"w": np.ones(4, np.float32)}, number, {"w": 0.1}), path, 3)
    names = ["checkpoint-1.safetensors", "checkpoint-2.safetensors", "checkpoint.safetensors"]
    assert sorted(found.name for found in tmp_path.iterdir()) == names
    assert [Checkpoint.load(tmp_path / name).counter for name in names] == [3, 2, 3]
    save_newest(Checkpoint({"w": np.ones(4, np.float32)}, 7, {"w": 0.1}), path, 3)
    assert [Checkpoint.load(tmp_path / name).counter for name in names] == [3, 2, 7]
