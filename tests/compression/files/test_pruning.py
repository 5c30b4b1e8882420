"""Checkpoints pruned in pieces: as in memory, every other byte kept, refusals in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from prunecast.common.files import StorageError
from prunecast.compression.files import (
    CannotPrune,
    FilesError,
    UnknownFormat,
    UnreadableFile,
    UnsafePath,
    UnsupportedTensor,
    pruning,
    selection,
    shares,
    zeroing,
)
from prunecast.compression.files.checkpoints import open_checkpoint
from prunecast.compression.files.formats import open_tensors, write_tensors
from prunecast.compression.files.mask_files import read_masks
from prunecast.compression.files.pruning import (
    Pruning,
    PruningResult,
    default_targets,
    prune_checkpoint,
)
from prunecast.compression.files.tensors import FileTensor
from prunecast.compression.pruning.allocation import ALLOCATIONS
from prunecast.compression.pruning.criteria import CRITERIA, Knowledge
from prunecast.compression.pruning.patterns import parse_pattern
from prunecast.compression.pruning.plan import PruningPlan
from support.checkpoints import every_kind

Tensors = dict[str, FileTensor]


def prune(path: Path, output: Path | None = None, **chosen: Any) -> PruningResult:
    checkpoint = open_checkpoint(path)
    given = {"sparsity": 0.5, "min_size": 1, **chosen}
    return prune_checkpoint(checkpoint, default_targets(checkpoint, output), Pruning(**given))


def in_memory(tensors: Tensors, **chosen: Any) -> dict[str, np.ndarray]:
    """Masks as a publisher makes them of the same weights."""
    known = {n: t.real() for n, t in tensors.items() if t.spec.floating}
    plan = PruningPlan(
        schedule=lambda _: chosen.get("sparsity", 0.5),
        criterion=CRITERIA[chosen.get("criterion", "magnitude")],
        allocation=ALLOCATIONS[chosen.get("allocation", "layer")],
        min_size=chosen.get("min_size", 1),
        pattern=parse_pattern(chosen.get("pattern", "")),
    )
    return plan.masks(1, Knowledge(plan.prunable(known)))


def weights(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, kind: str) -> FileTensor:
    """Values with many ties, few, or none, in a dtype."""
    values = rng.normal(size=shape)
    if kind == "ties":
        values = np.round(values * 2) / 2
    elif kind == "tiny":
        values *= 1e-30 if dtype != "float16" else 1e-5
    real = values.astype(np.float32 if dtype == "bfloat16" else dtype)
    return FileTensor.rounded(real, dtype)


def assert_masked(path: Path, before: Tensors, masks: dict[str, np.ndarray]) -> None:
    """Every bit as before but for +0 where a mask says so."""
    after = open_tensors(path)
    assert list(after) == list(open_tensors(path))
    for name, tensor in before.items():
        wanted = tensor.values.copy()
        if name in masks:
            wanted[~masks[name]] = 0
        assert after[name].dtype == tensor.dtype
        assert after[name].values.tobytes() == wanted.tobytes(), name


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sparsity=st.sampled_from([0.01, 0.3, 0.5, 0.75, 0.9]),
    dtypes=st.lists(
        st.sampled_from(["float32", "float16", "bfloat16", "float64"]), min_size=1, max_size=4
    ),
    kind=st.sampled_from(["none", "ties", "tiny"]),
    allocation=st.sampled_from(pruning.SPREADS),
    criterion=st.sampled_from(selection.SCORED),
    chunk=st.sampled_from([8, 64, 1 << 20]),
    gathered=st.sampled_from([0, 20, 1 << 20]),
)
def test_pieces_choose_as_memory_does(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    sparsity: float,
    dtypes: list[str],
    kind: str,
    allocation: str,
    criterion: str,
    chunk: int,
    gathered: int,
) -> None:
    folder = tmp_path_factory.mktemp("pruned")
    rng = np.random.default_rng(seed)
    tensors = {
        f"w{i}": weights(rng, (int(rng.integers(2, 9)), int(rng.integers(5, 30))), dtype, kind)
        for i, dtype in enumerate(dtypes)
    }
    write_tensors(folder / "m.safetensors", tensors)
    chosen = {"sparsity": sparsity, "allocation": allocation, "criterion": criterion}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "CHUNK", chunk)
        patch.setattr(shares, "MOST_GATHERED", gathered)
        patch.setattr(pruning, "_SMALLEST_PART", max(chunk, 16))
        patch.setattr(pruning, "_MOST_PARTS", 1 << 30)
        result = prune(folder / "m.safetensors", **chosen)
    ordered = {name: tensors[name] for name in open_tensors(folder / "m.safetensors")}
    expected = in_memory(ordered, **chosen)
    found = read_masks(folder / "m.pruned.masks.safetensors")
    assert found.keys() == expected.keys()
    for name, mask in expected.items():
        assert np.array_equal(found[name], mask), name
        assert result.tensors[name].removed == mask.size - np.count_nonzero(mask)
    assert_masked(folder / "m.pruned.safetensors", tensors, expected)


@pytest.mark.parametrize("allocation", pruning.SPREADS)
@pytest.mark.parametrize("gathered", [0, 1 << 20])
@pytest.mark.parametrize("sparsity", [0.001, 0.5])
@pytest.mark.parametrize("dtypes", [["float32"], ["bfloat16"], ["float64", "float16"]])
def test_passes_and_progress_are_those_that_were_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    allocation: str,
    gathered: int,
    sparsity: float,
    dtypes: list[str],
) -> None:
    monkeypatch.setattr(shares, "MOST_GATHERED", gathered)
    rng = np.random.default_rng(2)
    tensors = {f"w{i}": weights(rng, (20, 20), d, "ties") for i, d in enumerate(dtypes)}
    write_tensors(tmp_path / "m.safetensors", tensors)
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    passes: dict[str, int] = {}
    told: list[tuple[int, int]] = []

    def run(function: Callable[[Any], Any], jobs: Any) -> Any:
        for name in {job.part.name for job in jobs}:
            passes[name] = passes.get(name, 0) + 1
        return map(function, jobs)

    result = prune_checkpoint(
        checkpoint,
        default_targets(checkpoint),
        Pruning(sparsity, allocation=allocation, min_size=1),
        run=run,
        on_progress=lambda done, total, what: told.append((done, total)),
    )
    assert all(done <= total for done, total in told)
    assert told[-1][0] == told[-1][1]
    assert result.passes == max(passes.values())
    if allocation in shares.SHARED and gathered and sparsity == 0.5:
        digits = {"float32": 2, "bfloat16": 1, "float64": 4}[dtypes[0]]
        assert result.passes == digits + 2 + 2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:8", 0.875)])
@pytest.mark.parametrize("criterion", selection.SCORED)
def test_patterns_are_those_of_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    pattern: str,
    sparsity: float,
    criterion: str,
) -> None:
    rng = np.random.default_rng(2)
    shapes = {"linear": (37, 16), "conv": (21, 8, 3, 3), "conv1d": (9, 24, 5)}
    tensors = {n: weights(rng, s, dtype, "ties") for n, s in shapes.items()}
    write_tensors(tmp_path / "m.safetensors", tensors)
    monkeypatch.setattr(selection, "CHUNK", 256)
    monkeypatch.setattr(pruning, "_SMALLEST_PART", 512)
    chosen = {"pattern": pattern, "sparsity": sparsity, "criterion": criterion}
    result = prune(tmp_path / "m.safetensors", **chosen)
    expected = in_memory(tensors, **chosen)
    assert_masked(tmp_path / "m.pruned.safetensors", tensors, expected)
    assert result.removed == sparsity * result.prunable
    for name, mask in read_masks(tmp_path / "m.pruned.masks.safetensors").items():
        assert np.array_equal(mask, expected[name])


@pytest.mark.parametrize("criterion", selection.SCORED)
def test_in_onnx_groups_run_along_what_is_multiplied(tmp_path: Path, criterion: str) -> None:
    """MatMul and Gemm without transB have input channels in rows, Conv and Gemm with it do not."""
    rng = np.random.default_rng(2)
    shapes = {"mat": (8, 6), "gemm": (8, 6), "turned": (6, 8), "conv": (5, 4, 3, 3)}
    arrays = {n: rng.normal(size=s).astype("f4") for n, s in shapes.items()}
    nodes = [
        helper.make_node("MatMul", ["x", "mat"], ["a"]),
        helper.make_node("Gemm", ["x", "gemm"], ["b"]),
        helper.make_node("Gemm", ["x", "turned"], ["c"], transB=1),
        helper.make_node("Conv", ["i", "conv"], ["d"]),
    ]
    tensors = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], tensors))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    prune(tmp_path / "m.onnx", pattern="2:4", criterion=criterion)
    after = arrays_of(tmp_path / "m.pruned.onnx")
    along = {"mat": 0, "gemm": 0, "turned": 1, "conv": 1}
    for name, axis in along.items():
        groups = np.moveaxis(after[name] != 0, axis, -1).reshape(-1, 4)
        assert (groups.sum(1) == 2).all(), name
        if criterion == "l2" and axis == 0:  # of four rows the two with the larger norms stay
            norms = np.square(arrays[name]).sum(1).reshape(-1, 4)
            stays = np.sort(norms.argsort(1)[:, 2:], axis=1) + 4 * np.arange(len(norms))[:, None]
            assert after[name].any(1).nonzero()[0].tolist() == stays.ravel().tolist()


def test_every_other_byte_stays_and_so_does_the_metadata(tmp_path: Path) -> None:
    kinds = every_kind()
    finite = {n: t for n, t in kinds.items() if n not in ("bfloat16", "specials")}
    path = tmp_path / "m.safetensors"
    write_tensors(path, finite, {"format": "pt"})
    result = prune(path)
    assert {n for n, t in result.tensors.items() if t.prunable} == {"weight", "half", "double"}
    assert open_tensors(tmp_path / "m.pruned.safetensors").metadata == {"format": "pt"}
    assert_masked(tmp_path / "m.pruned.safetensors", finite, in_memory(finite))
    assert result.parameters == sum(t.spec.size for t in finite.values())
    assert result.removed == 1000 + 600 + 90
    assert {p.name for p in tmp_path.iterdir()} == {
        "m.safetensors", "m.pruned.safetensors", "m.pruned.masks.safetensors"
    }  # fmt: skip


def test_norms_biases_small_tensors_and_adapters_are_left(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {
        "layer.weight": (64, 64), "layer.bias": (64,), "norm.weight": (2000,), "small": (4, 4),
        "q.lora_A.weight": (8, 256), "q.lora_B.weight": (256, 8), "head.weight": (64, 32),
    }  # fmt: skip
    tensors = {n: weights(rng, shape, "float32", "none") for n, shape in shapes.items()}
    write_tensors(tmp_path / "m.safetensors", tensors)
    result = prune(tmp_path / "m.safetensors", min_size=1024, exclude=("head.*",))
    assert [n for n, t in result.tensors.items() if t.removed] == ["layer.weight"]
    result = prune(tmp_path / "m.safetensors", min_size=1024, adapters=True)
    assert [n for n, t in result.tensors.items() if t.removed] == [
        "head.weight", "layer.weight", "q.lora_A.weight", "q.lora_B.weight",
    ]  # fmt: skip


def test_shards_are_pruned_under_one_threshold_and_their_index_goes_along(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {f"w{i}": weights(rng, (20, 30 + i), "float32", "none") for i in range(5)}
    tensors["w4"].values[:] *= 10
    homes = {n: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, n in enumerate(tensors)}
    for home in set(homes.values()):
        write_tensors(tmp_path / home, {n: tensors[n] for n in tensors if homes[n] == home})
    index = {"metadata": {"total_size": 1}, "weight_map": homes}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for start in (tmp_path, tmp_path / "model.safetensors.index.json"):
        out = tmp_path / f"out-{start.stem}"
        result = prune(start, out, sparsity=0.8, allocation="global")
        assert json.loads((out / "model.safetensors.index.json").read_text()) == index
        joined: dict[str, FileTensor] = {}
        for home in sorted(set(homes.values())):
            joined |= {n: tensors[n] for n in open_tensors(tmp_path / home)}
        expected = in_memory(joined, sparsity=0.8, allocation="global")
        for home in set(homes.values()):
            mine = {n: t for n, t in tensors.items() if homes[n] == home}
            assert_masked(out / home, mine, expected)
        assert result.tensors["w4"].sparsity < 0.3 < 0.9 < result.tensors["w0"].sparsity
        assert read_masks(out / "pruning.masks.safetensors").keys() == tensors.keys()


def test_an_index_that_names_other_places_or_lost_tensors_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"w": FileTensor(np.ones((4, 4), "f4"), "float32")})
    path = tmp_path / "m.safetensors.index.json"
    for name in ("../a.safetensors", "/etc/passwd", "..\\a.safetensors", ""):
        path.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(UnsafePath, match="shards lie beside the index"):
            open_checkpoint(path)
    for name in (f"{'a' * 5000}.safetensors", "a\0.safetensors", "\ud800.safetensors"):
        path.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(UnreadableFile, match="cannot read"):
            open_checkpoint(path)
    path.write_text(json.dumps({"weight_map": {"v": "a.safetensors"}}))
    with pytest.raises(UnreadableFile, match="lacks the tensor 'v'"):
        open_checkpoint(path)
    for name, said in {
        "a.npz": "shards are .safetensors files",
        "a.onnx": "shards are .safetensors files",
        "a.bin": r"safetensors\.torch\.save_file",
    }.items():
        (tmp_path / name).write_bytes((tmp_path / "a.safetensors").read_bytes())
        path.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(UnknownFormat, match=said) as refused:
            open_checkpoint(path)
        assert name in str(refused.value)
    for text in ("[]", "{}", '{"weight_map": []}', "\x00"):
        path.write_text(text)
        with pytest.raises(UnreadableFile, match="no index of shards"):
            open_checkpoint(path)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    """Of two, one would be written with the mask of the other."""
    tensor = FileTensor(np.ones((4, 4), "f4"), "float32")
    for name in ("a", "b"):
        write_tensors(tmp_path / f"{name}.safetensors", {"w": tensor, name: tensor})
    homes = {name: f"{name}.safetensors" for name in ("a", "b")}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    array = np.ones((4, 4), "f4")
    for other in (array, array.astype("i8")):
        model = onnx_model({"w": array})
        model.graph.initializer.append(numpy_helper.from_array(other, "w"))
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        for path in (tmp_path / "m.safetensors.index.json", tmp_path / "m.onnx"):
            with pytest.raises(UnreadableFile, match=r"holds two tensors 'w'.*export it again"):
                open_checkpoint(path)
    model = onnx_model({"w": array})
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(array[0], "w"), numpy_helper.from_array(np.arange(4)), [9]
    )
    model.graph.sparse_initializer.append(sparse)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnreadableFile, match="holds two tensors 'w'"):
        open_checkpoint(tmp_path / "m.onnx")


def test_an_inner_graph_has_its_own_tensor_of_an_outer_name(tmp_path: Path) -> None:
    array = np.random.default_rng(2).normal(size=(8, 8)).astype("f4")
    model = onnx_model({"w": array})
    inner = helper.make_graph([], "then", [], [], [numpy_helper.from_array(array + 1, "w")])
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=inner))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert prune(tmp_path / "m.onnx").removed == 32
    after = onnx.load(tmp_path / "m.pruned.onnx").graph
    (left,) = after.node[1].attribute[0].g.initializer
    assert np.array_equal(numpy_helper.to_array(left), array + 1)
    assert np.count_nonzero(numpy_helper.to_array(after.initializer[0])) == 32


def test_what_one_shard_left_out_and_another_holds_is_no_alias(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    tensors = {n: weights(rng, (4, 4 + len(n)), "float32", "none") for n in ("w", "own")}
    write_tensors(tmp_path / "a.safetensors", {"w": tensors["w"]}, {"own": "w", "tied": "w"})
    write_tensors(tmp_path / "b.safetensors", {"own": tensors["own"]})
    homes = {"w": "a.safetensors", "own": "b.safetensors"}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    assert open_checkpoint(tmp_path / "m.safetensors.index.json").aliases == {"tied": "w"}
    result = prune(tmp_path / "m.safetensors.index.json")
    assert {n: t.removed for n, t in result.tensors.items()} == {"w": 10, "own": 14}


@pytest.mark.parametrize("shard", ["pruning.masks.safetensors", "pruning.masks.safetensors/w"])
def test_a_file_of_the_checkpoint_is_not_written_over_by_the_masks(
    tmp_path: Path, shard: str
) -> None:
    if shard.endswith("/w"):
        (tmp_path / shard).parent.mkdir()
        path = tmp_path / "m.onnx"
        onnx.save(
            onnx_model({"w": np.ones((40, 30), "f4")}), path, save_as_external_data=True,
            location="w", size_threshold=0,
        )  # fmt: skip
        (tmp_path / "w").rename(tmp_path / shard)
        relocate(path, {"w": shard})
    else:
        write_tensors(tmp_path / shard, {"w": FileTensor(np.ones((4, 4), "f4"), "float32")})
        path = tmp_path / "m.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(CannotPrune, match=r"pruning\.masks\.safetensors would be both"):
        prune(path)
    assert not (tmp_path / "pruned").exists()


# -- .onnx ----------------------------------------------------------------------------------------


def onnx_model(arrays: dict[str, np.ndarray], **how: Any) -> onnx.ModelProto:
    first = next(iter(arrays))
    nodes = [helper.make_node("MatMul", ["x", first], ["y"])]
    tensors = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    for name in how.get("typed", ()):
        at = next(i for i, t in enumerate(tensors) if t.name == name)
        a = arrays[name]
        tensors[at] = helper.make_tensor(name, tensors[at].data_type, a.shape, a.ravel())
    inputs = [helper.make_tensor_value_info("x", 1, [1, arrays[first].shape[0]])]
    outputs = [helper.make_tensor_value_info("y", 1, [1, arrays[first].shape[1]])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, producer_name="ours")


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    model = onnx.load(path)
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "w": rng.normal(size=(40, 30)).astype(np.float32),
        "typed": rng.normal(size=(30, 30)).astype(np.float32),
        "double": rng.normal(size=(10, 30)),
        "half": rng.normal(size=(10, 33)).astype(np.float16),
        "shape": np.arange(400).reshape(20, 20),
        "bias": rng.normal(size=5).astype(np.float32),
    }


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("allocation", pruning.SPREADS)
def test_an_onnx_model_keeps_its_graph(
    tmp_path: Path, arrays: dict[str, np.ndarray], external: bool, allocation: str
) -> None:
    path = tmp_path / "m.onnx"
    if external:
        onnx.save(
            onnx_model(arrays, typed=["typed"]), path, save_as_external_data=True,
            location="data/w.bin" if False else "w.bin", size_threshold=0,
        )  # fmt: skip
    else:
        onnx.save(onnx_model(arrays, typed=["typed", "double"]), path)
    out = tmp_path / "out" if external else tmp_path / "small.onnx"
    prune(path, out, allocation=allocation)
    made = out / "m.onnx" if external else out
    order = [t.name for t in open_checkpoint(path).tensors]
    assert set(order) == {"w", "typed", "double", "half", "bias"}
    tensors = {n: FileTensor(arrays[n], arrays[n].dtype.name) for n in order}
    expected = in_memory(tensors, allocation=allocation)
    after = arrays_of(made)
    for name, array in arrays.items():
        wanted = np.where(expected[name], array, 0) if name in expected else array
        assert after[name].tobytes() == wanted.astype(array.dtype).tobytes(), name
    before, model = (
        onnx.load(path, load_external_data=False),
        onnx.load(made, load_external_data=False),
    )
    assert (model.producer_name, model.graph.node) == (before.producer_name, before.graph.node)
    assert made.stat().st_size == path.stat().st_size
    onnx.checker.check_model(str(made))


def test_numbers_that_lie_nowhere_plainly_are_left(tmp_path: Path) -> None:
    """float16 in `int32_data`: two to five bytes each."""
    rng = np.random.default_rng(3)
    arrays = {"w": rng.normal(size=(9, 9)).astype("f4"), "half": rng.random((9, 9)).astype("f2")}
    onnx.save(onnx_model(arrays, typed=["half"]), tmp_path / "m.onnx")
    assert [t.name for t in open_checkpoint(tmp_path / "m.onnx").tensors] == ["w"]


def test_external_data_outside_the_folder_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    model = onnx_model({"w": arrays["w"]})
    (tmp_path / "in").mkdir()
    onnx.save(
        model,
        tmp_path / "in/m.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
    )
    model = onnx.load(tmp_path / "in/m.onnx", load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../w.bin"
    (tmp_path / "in/m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsafePath):
        open_checkpoint(tmp_path / "in/m.onnx")


def relocate(path: Path, locations: dict[str, str]) -> None:
    """Have a model call its files of external data otherwise, by the names of the tensors."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = locations.get(tensor.name, entry.value)
    path.write_bytes(model.SerializeToString())


def test_external_data_keep_the_names_that_the_model_has_for_them(
    tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    """Links, as in a cache of huggingface_hub; two files of one name; one that holds no floats."""
    snapshot, blobs = tmp_path / "snapshots/main", tmp_path / "blobs"
    for folder in (snapshot / "a", snapshot / "b", blobs):
        folder.mkdir(parents=True)
    names = ["w", "half", "shape"]
    onnx.save(
        onnx_model({n: arrays[n] for n in names}), blobs / "m", save_as_external_data=True,
        all_tensors_to_one_file=False, size_threshold=0,
    )  # fmt: skip
    locations = {"w": "a/data", "half": "b/data", "shape": "m.onnx_data"}
    relocate(blobs / "m", locations)
    for name, location in {**locations, "m": "m.onnx"}.items():
        up = "../../../blobs" if "/" in location else "../../blobs"
        (snapshot / location).symlink_to(f"{up}/{name}")
    out = tmp_path / "out"
    result = prune(snapshot / "m.onnx", out)
    made = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert made == {"m.onnx", *locations.values(), "pruning.masks.safetensors"}
    after = arrays_of(out / "m.onnx")
    expected = in_memory({n: FileTensor(arrays[n], arrays[n].dtype.name) for n in ("w", "half")})
    for name in names:
        wanted = np.where(expected[name], arrays[name], 0) if name in expected else arrays[name]
        assert after[name].tobytes() == wanted.astype(arrays[name].dtype).tobytes(), name
    assert result.removed == 600 + 165


def test_two_names_of_one_file_stay_two(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(
        onnx_model({n: arrays[n] for n in ("w", "half")}), path, save_as_external_data=True,
        location="w.bin", size_threshold=0,
    )  # fmt: skip
    (tmp_path / "half.bin").symlink_to("w.bin")
    relocate(path, {"half": "half.bin"})
    prune(path)
    after = arrays_of(tmp_path / "pruned/m.onnx")
    assert {n: int((a == 0).sum()) for n, a in after.items()} == {"w": 600, "half": 165}


def test_external_data_of_a_constant_go_along(tmp_path: Path) -> None:
    array = np.ones((4, 4), "f4")
    model = onnx_model({"w": array + np.arange(4, dtype="f4")})
    constant = numpy_helper.from_array(array, "c")
    constant.ClearField("raw_data")
    constant.data_location = onnx.TensorProto.EXTERNAL
    constant.external_data.add(key="location", value="c.bin")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=constant))
    (tmp_path / "c.bin").write_bytes(array.tobytes())
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    prune(tmp_path / "m.onnx")
    assert (tmp_path / "pruned/c.bin").read_bytes() == array.tobytes()
    assert np.count_nonzero(arrays_of(tmp_path / "pruned/m.onnx")["w"]) == 8


@pytest.mark.parametrize("location", ["m.onnx", "link.bin"])
def test_external_data_in_the_model_itself_are_refused(tmp_path: Path, location: str) -> None:
    path = tmp_path / "m.onnx"
    model = onnx_model({"w": np.ones((4, 4), "f4")})
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "link.bin").symlink_to("m.onnx")
    relocate(path, {"w": location})
    with pytest.raises(UnreadableFile, match="'w' has its external data in the model itself"):
        open_checkpoint(path)


def beside(
    name: str, dims: list[int], at: int, length: int | None = None, dtype: int = 1
) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, dims=dims, data_type=dtype, data_location=1)
    entries = {"location": "w.bin", "offset": at, "length": length}
    for key, value in entries.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


@pytest.mark.parametrize("length", [None, 256])
@pytest.mark.parametrize(
    ("dims", "at", "dtype", "inner"),
    [
        ([64], 0, 1, False),
        ([8, 8], 128, 1, False),
        ([64], 0, 6, False),
        ([8, 8], 0, 1, True),
    ],
)
def test_bytes_that_another_tensor_shares_are_not_zeroed(
    tmp_path: Path, dims: list[int], at: int, dtype: int, inner: bool, length: int | None
) -> None:
    """Another shape, a part, integers, and a tensor of an inner graph."""
    array = np.random.default_rng(2).normal(size=200).astype("f4")
    (tmp_path / "w.bin").write_bytes(array.tobytes())
    model = onnx_model({"w": array[:4].reshape(2, 2)})
    model.graph.initializer[0].CopyFrom(beside("w", [8, 8], 0, length))
    model.graph.initializer.append(beside("free", [4, 4], 400, length and 64))
    other = beside("other", dims, at, length, dtype)
    if inner:
        graph = helper.make_graph([], "then", [], [], [other])
        model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=graph))
    else:
        model.graph.initializer.append(other)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CannotPrune, match=r"share bytes of m\.onnx's external data.*--exclude"):
        prune(path)
    assert not (tmp_path / "pruned").exists()
    result = prune(path, exclude=("w", "other"))
    assert result.removed == 8
    assert (tmp_path / "pruned/w.bin").read_bytes()[:400] == array.tobytes()[:400]


def test_two_tensors_that_are_one_in_the_file_are_tied(tmp_path: Path) -> None:
    array = np.random.default_rng(2).normal(size=(8, 8)).astype("f4")
    (tmp_path / "w.bin").write_bytes(array.tobytes())
    model = onnx_model({"w": array})
    del model.graph.initializer[:]
    model.graph.initializer.extend([beside("w", [8, 8], 0), beside("v", [8, 8], 0)])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    result = prune(tmp_path / "m.onnx")
    assert (result.prunable, result.removed, result.tensors["v"].same_as) == (64, 32, "w")
    assert np.count_nonzero(arrays_of(tmp_path / "pruned/m.onnx")["v"]) == 32


def framed(number: int, data: bytes) -> bytes:
    """A field of protobuf that holds bytes."""
    length, head = len(data), [number << 3 | 2]
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*head, length]) + data


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (framed(1, b"\xff" * 2_000_000 + b"\x01"), "a number is too long"),
        (framed(1, b"\x80\x00"), "not written in its shortest form"),
        (framed(1, b"\xff"), "ends inside a number"),
        (framed(1, b"\x01" * 2_000_000), "more than 32 dimensions"),
        (b"\x08\x01" * 1_000_000, "more than 32 dimensions"),
        (framed(1, b"\x01" * 33), "more than 32 dimensions"),
    ],
)
def test_shapes_that_would_cost_without_bounds_are_refused(
    tmp_path: Path, tensor: bytes, said: str
) -> None:
    named = b"\x10\x01" + framed(8, b"w")
    (tmp_path / "m.onnx").write_bytes(framed(7, framed(5, tensor + named)))
    with pytest.raises(UnreadableFile, match=said):
        open_checkpoint(tmp_path / "m.onnx")


def test_a_tensor_that_protobuf_does_not_read_is_refused(tmp_path: Path) -> None:
    """Packed floats of three bytes: the fields are sound, what is in them is not."""
    entry = framed(13, framed(1, b"location") + framed(2, b"w.bin"))
    tensor = b"\x10\x01" + framed(8, b"w") + b"\x70\x01" + entry + framed(4, b"abc")
    (tmp_path / "m.onnx").write_bytes(framed(7, framed(5, tensor)))
    (tmp_path / "w.bin").write_bytes(b"abcd")
    with pytest.raises(UnreadableFile, match=r"is not a readable \.onnx model"):
        open_checkpoint(tmp_path / "m.onnx")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_hostile_onnx_bytes_raise_our_errors_only(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    rng = np.random.default_rng(3)
    raw = bytearray(onnx_model({"w": rng.normal(size=(9, 9)).astype("f4")}).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("hostile") / "m.onnx"
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        checkpoint = open_checkpoint(path)
        for tensor in checkpoint.tensors:
            assert tensor.offset + tensor.spec.nbytes <= len(raw)
        prune_checkpoint(checkpoint, default_targets(checkpoint), Pruning(0.5, min_size=1))
    except FilesError:
        pass


# -- tied weights ---------------------------------------------------------------------------------


def tied(tmp_path: Path) -> tuple[Path, Tensors]:
    rng = np.random.default_rng(4)
    table = weights(rng, (30, 20), "float32", "ties")
    tensors = {"head": table, "layer": weights(rng, (20, 20), "float32", "none"), "tokens": table}
    zeros = FileTensor(np.zeros((20, 20), "f4"), "float32")
    tensors |= {"z1": zeros, "z2": zeros}
    write_tensors(tmp_path / "m.safetensors", tensors, {"left_out": "layer"})
    return tmp_path / "m.safetensors", tensors


@pytest.mark.parametrize("allocation", pruning.SPREADS)
def test_tied_weights_count_once_and_share_a_mask(tmp_path: Path, allocation: str) -> None:
    path, tensors = tied(tmp_path)
    result = prune(path, allocation=allocation, exclude=("z*",))
    masks = read_masks(tmp_path / "m.pruned.masks.safetensors")
    assert np.array_equal(masks["head"], masks["tokens"])
    assert result.tensors["tokens"].same_as == "head"
    assert result.tensors["z2"].same_as == ""
    assert (result.prunable, result.removed) == (1000, 500)
    assert_masked(tmp_path / "m.pruned.safetensors", tensors, masks)


@pytest.mark.parametrize("exclude", ["head", "tokens", "left_out", "layer"])
def test_tied_weights_are_not_pruned_apart(tmp_path: Path, exclude: str) -> None:
    path, _ = tied(tmp_path)
    with pytest.raises(CannotPrune, match="tied weights would be pruned apart"):
        prune(path, exclude=(exclude,))
    prune(path, exclude=("head", "tokens"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("other", ["zz.weight", "a.weight"])
@pytest.mark.parametrize("allocation", ["layer", "global"])
def test_weights_that_are_tied_with_an_adapter_are_not_pruned_apart(
    tmp_path: Path, other: str, allocation: str
) -> None:
    """Whichever of the two comes first."""
    rng = np.random.default_rng(6)
    factor = weights(rng, (8, 40), "float32", "none")
    tensors = {"a.lora_A.weight": factor, "a.lora_B.weight": weights(rng, (40, 8), "float32", "")}
    tensors |= {other: factor, "layer": weights(rng, (20, 20), "float32", "none")}
    write_tensors(tmp_path / "m.safetensors", tensors)
    with pytest.raises(CannotPrune, match=r"pruned apart.*'a\.lora_A\.weight' stays whole") as told:
        prune(tmp_path / "m.safetensors", allocation=allocation)
    assert repr(other) in str(told.value)
    both = ("a.lora_A.weight", other)
    assert all(f"--exclude {name!r}" in str(told.value) for name in both)
    assert prune(tmp_path / "m.safetensors", allocation=allocation, exclude=both).removed == 200
    assert prune(tmp_path / "m.safetensors", allocation=allocation, adapters=True).removed == 520


@pytest.mark.parametrize("pattern", ["", "2:4"])
@pytest.mark.parametrize("criterion", selection.SCORED)
def test_tied_weights_share_a_mask_by_every_criterion(
    tmp_path: Path, criterion: str, pattern: str
) -> None:
    """What is drawn is drawn for the first of them, as a publisher does."""
    path, tensors = tied(tmp_path)
    chosen = {"criterion": criterion, "pattern": pattern}
    result = prune(path, exclude=("z*",), **chosen)
    masks = read_masks(tmp_path / "m.pruned.masks.safetensors")
    expected = in_memory({n: tensors[n] for n in ("head", "layer")}, **chosen)
    for name, first in {"head": "head", "tokens": "head", "layer": "layer"}.items():
        assert np.array_equal(masks[name], expected[first]), name
    assert result.removed == 500
    assert_masked(tmp_path / "m.pruned.safetensors", tensors, masks)


def test_tied_weights_whose_patterns_run_along_other_axes_are_not_pruned_apart(
    tmp_path: Path,
) -> None:
    array = np.random.default_rng(2).normal(size=(8, 8)).astype("f4")
    model = onnx_model({"w": array, "v": array})
    model.graph.node.append(helper.make_node("Gemm", ["x", "v"], ["z"], transB=1))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        CannotPrune, match=r"pruned apart: 'w' and 'v' .* 2:4 runs along other axes"
    ):
        prune(tmp_path / "m.onnx", pattern="2:4")
    assert prune(tmp_path / "m.onnx").removed == 32


# -- what is refused ------------------------------------------------------------------------------


def one(tmp_path: Path, values: np.ndarray, name: str = "w") -> Path:
    write_tensors(tmp_path / "m.safetensors", {name: FileTensor(values, str(values.dtype))})
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"sparsity": 1.0}, "sparsity 1 removes all: give one above 0 and below 1"),
        ({"sparsity": 0.0}, "sparsity 0 removes nothing"),
        ({"sparsity": float("nan")}, "sparsity nan"),
        (
            {"criterion": "taylor"},
            "what the criterion 'taylor' looks at: choose one of magnitude, l2",
        ),
        ({"allocation": "any"}, "the allocation 'any' cannot be computed in pieces"),
        ({"exclude": ("*",)}, "has no tensor that may be pruned"),
        ({"min_size": 401}, "has no tensor that may be pruned"),
        ({"pattern": "2:3"}, "2:3 comes to a sparsity of 0.333333, not 0.5"),
        ({"pattern": "3:6"}, r"3:6 does not divide 'w' of shape \[20, 20\]: 20 input channels"),
        ({"pattern": "4x4"}, "blocks such as 4x4 cannot be ranked in pieces"),
        ({"pattern": "2/4"}, "'2/4' is no pattern"),
        ({"pattern": "2:4", "allocation": "global"}, "choose the allocation layer"),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, chosen: dict[str, Any], message: str) -> None:
    path = one(tmp_path, np.random.default_rng(0).normal(size=(20, 20)).astype("f4"))
    with pytest.raises(CannotPrune, match=message):
        prune(path, **chosen)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_layer_that_would_vanish_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {f"w{i}": weights(rng, (4, 4 + i), "float32", "none") for i in range(5)}
    write_tensors(tmp_path / "m.safetensors", tensors)
    with pytest.raises(CannotPrune, match="for 5 tensors, so layers such as 'w0' would vanish"):
        prune(tmp_path / "m.safetensors", sparsity=0.97, allocation="global")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float, dtype: str) -> None:
    values = np.ones((20, 20), np.float32 if dtype == "bfloat16" else dtype)
    values[3, 4] = value
    bits = values.view(np.uint32) >> 16 if dtype == "bfloat16" else values
    tensor = FileTensor(bits.astype(np.uint16) if dtype == "bfloat16" else bits, dtype)
    write_tensors(tmp_path / "m.safetensors", {"w": tensor})
    with pytest.raises(CannotPrune, match=r"'w' holds NaN or an infinity \(weight 64\)"):
        prune(tmp_path / "m.safetensors")


def test_a_pickle_is_not_read_and_the_remedy_is_named(tmp_path: Path) -> None:
    for name in ("m.pt", "m.bin", "m.npz", "m.pcc"):
        (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
        with pytest.raises(UnknownFormat, match=r"\.safetensors"):
            open_checkpoint(tmp_path / name)
    with pytest.raises(UnknownFormat, match=r"safetensors\.torch\.save_file"):
        open_checkpoint(tmp_path / "m.bin")


def test_memory_that_is_not_enough_is_told(tmp_path: Path) -> None:
    path = one(tmp_path, np.ones((20, 20), np.float32))
    with pytest.raises(CannotPrune, match=r"'w' of shape \[20, 20\] takes 252 MB of memory, more"):
        prune(path, memory=200_000_000)
    with pytest.raises(CannotPrune, match="allow more with --memory"):
        prune(path, memory=300_000_000, allocation="lamp")
    assert prune(path, memory=300_000_000).memory < 300_000_000


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = one(tmp_path, np.random.default_rng(0).normal(size=(20, 20)).astype("f4"))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(zeroing.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CannotPrune, match=r"1\.00 kB free and the pruned checkpoint takes 1\.7"):
        prune(path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_the_checkpoint_itself_is_never_overwritten(tmp_path: Path) -> None:
    path = one(tmp_path, np.ones((20, 20), np.float32))
    (tmp_path / "link.safetensors").symlink_to(path)
    for target in (path, tmp_path / "link.safetensors"):
        with pytest.raises(CannotPrune, match="is the checkpoint itself"):
            prune(path, target)
    with pytest.raises(CannotPrune, match="name it so"):
        prune(path, tmp_path / "m.onnx")


@pytest.mark.parametrize("when", ["reading", "writing"])
def test_what_is_interrupted_leaves_nothing_behind(tmp_path: Path, when: str) -> None:
    path = one(tmp_path, np.random.default_rng(0).normal(size=(20, 20)).astype("f4"))

    def run(function: Callable[[Any], Any], jobs: Any) -> Any:
        if (function.__name__ == "_write_part") is (when == "writing"):
            function(jobs[0])
            raise KeyboardInterrupt
        return map(function, jobs)

    checkpoint = open_checkpoint(path)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(checkpoint, default_targets(checkpoint), Pruning(0.5, min_size=1), run=run)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def sharded(tmp_path: Path) -> Path:
    rng = np.random.default_rng(8)
    homes = {f"w{i}": f"{i}.safetensors" for i in range(3)}
    for name, home in homes.items():
        write_tensors(tmp_path / home, {name: weights(rng, (20, 20), "float32", "none")})
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    return tmp_path / "m.safetensors.index.json"


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_no_mixture_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: bool, call: str
) -> None:
    """At each fsync all is as it was; at a rename the file that names the others is missing."""
    source = sharded(tmp_path) if several else one(tmp_path, np.arange(400.0).reshape(20, 20))
    checkpoint = open_checkpoint(source)
    targets = default_targets(checkpoint, tmp_path / ("out" if several else "n.safetensors"))
    naming, files = targets.all[0], targets.all[:-1]
    real, refused = getattr(os, call), 0
    for fails_at in range(100):
        monkeypatch.setattr(os, call, real)
        prune_checkpoint(checkpoint, targets, Pruning(0.5, min_size=1))
        targets.report.write_text("old")
        old = {path: path.read_bytes() for path in targets.all}
        calls = iter(range(100))

        def failing(*arguments: Any, at: int = fails_at, calls: Any = calls) -> None:
            if next(calls) == at:
                raise OSError(5, "Input/output error")
            real(*arguments)

        monkeypatch.setattr(os, call, failing)
        try:
            prune_checkpoint(checkpoint, targets, Pruning(0.9, min_size=1))
        except StorageError:
            refused += 1
        else:
            break
        if call == "fsync" and fails_at < len(files):
            assert {path: path.read_bytes() for path in targets.all} == old
        elif naming.exists():  # only the sync of the last name is missing
            assert fails_at == len(files) + 2
            shards = [p for p in targets.files.values() if p.suffix == ".safetensors"]
            assert not any(path.read_bytes() == old[path] for path in shards)
        assert not targets.report.exists() or targets.report.read_text() == "old"
        assert not list(naming.parent.glob(".*"))
    assert refused == (len(files) if call == "replace" else len(files) + 3)
    assert not targets.report.exists()


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    path = one(tmp_path, np.random.default_rng(0).normal(size=(20, 20)).astype("f4"))
    left = [
        tmp_path / f".{name}.0123456789abcdef"
        for name in ("m.pruned.safetensors", "m.pruned.masks.safetensors", "m.pruned.report.json")
    ]
    others = [tmp_path / ".other.0123456789abcdef", tmp_path / ".m.pruned.safetensors.txt"]
    for file in (*left, *others):
        file.write_bytes(b"x")
    prune(path)
    assert not any(file.exists() for file in left)
    assert all(file.exists() for file in others)


def test_a_tensor_that_a_file_of_masks_cannot_name_is_refused(tmp_path: Path) -> None:
    model = onnx_model({"__metadata__": np.ones((4, 4), "f4")})
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedTensor, match="can hold no tensor '__metadata__': rename it"):
        prune(tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_checkpoint_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = one(tmp_path, np.random.default_rng(0).normal(size=(20, 20)).astype("f4"))

    def run(function: Callable[[Any], Any], jobs: Any) -> Any:
        if function.__name__ == "_write_part":
            one(tmp_path, np.random.default_rng(1).normal(size=(20, 20)).astype("f4"))
        return map(function, jobs)

    checkpoint = open_checkpoint(path)
    with pytest.raises(UnreadableFile, match="changed while it was read"):
        prune_checkpoint(checkpoint, default_targets(checkpoint), Pruning(0.5, min_size=1), run=run)


def test_masks_that_are_none_are_refused(tmp_path: Path) -> None:
    path = one(tmp_path, np.ones((20, 20), np.float32))
    with pytest.raises(UnreadableFile, match="is no file of masks"):
        read_masks(path)
    prune(path)
    masks = tmp_path / "m.pruned.masks.safetensors"
    masks.write_bytes(masks.read_bytes().replace(b"[20, 20]", b"[20, 99]"))
    with pytest.raises(UnreadableFile, match="'w' has not the size of its shape"):
        read_masks(masks)
