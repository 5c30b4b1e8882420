"""Weights of .onnx models wherever they lie: taken out, compressed, and put back with the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from prunecast.compression.files import (
    FilesError,
    FileTooLarge,
    UnreadableFile,
    UnsupportedTensor,
    compressing,
    onnx_skeleton,
)
from prunecast.compression.files.archive import open_archive
from prunecast.compression.files.checkpoints import open_checkpoint
from prunecast.compression.files.compressing import Lossy, compress_file, restore_file
from prunecast.compression.files.formats import open_tensors
from prunecast.compression.files.onnx_skeleton import write_onnx
from prunecast.compression.files.tensors import FileTensor

RNG = np.random.default_rng(5)


def weights(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


def sparse(name: str) -> Any:
    values = numpy_helper.from_array(weights(3), name)
    return helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([1, 4, 7])), [9])


def hidden() -> Any:
    """A model with values in every place that ONNX has for them."""
    constants = [
        helper.make_node("Constant", [], ["dense"], value=numpy_helper.from_array(weights(4, 5))),
        helper.make_node("Constant", [], ["floats"], value_floats=[0.1, -2.5, float("inf")]),
        helper.make_node("Constant", [], ["ints"], value_ints=[5, -(2**40)]),
        helper.make_node("Constant", [], ["float"], value_float=0.25),
        helper.make_node("Constant", [], ["few"], sparse_value=sparse("few")),
        helper.make_node("Constant", [], ["text"], value_strings=["a", "b"]),
    ]
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(weights(6)))],
        "then",
        [],
        [],
        [numpy_helper.from_array(weights(2, 2), "i")],
    )
    branch = helper.make_node("If", ["x"], ["y"], "branch", then_branch=inner, else_branch=inner)
    odd = helper.make_node("Odd", [], ["z"], "odd", domain="own")
    odd.attribute.append(
        AttributeProto(
            name="many",
            type=AttributeProto.TENSORS,
            tensors=[numpy_helper.from_array(weights(2)), numpy_helper.from_array(weights(3))],
        )
    )
    function = helper.make_function(
        "own",
        "Layer",
        ["a"],
        ["b"],
        [
            helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weights(3, 3))),
            helper.make_node("MatMul", ["a", "w"], ["b"]),
        ],
        [helper.make_opsetid("", 17)],
    )
    four = TensorProto(name="four", data_type=TensorProto.INT4, dims=[3], int32_data=[1, 2])
    graph = helper.make_graph(
        [*constants, branch, odd],
        "g",
        [],
        [],
        [
            numpy_helper.from_array(weights(3), "w"),
            helper.make_tensor("typed", TensorProto.FLOAT, [2], [0.5, float("nan")]),
            helper.make_tensor("half", TensorProto.FLOAT16, [2], np.array([1, -0.0], np.float16)),
            numpy_helper.from_array(np.array([1, -2], ml_dtypes.bfloat16), "brain"),
            helper.make_tensor("name", TensorProto.STRING, [1], [b"x"]),
            four,
        ],
    )
    graph.sparse_initializer.append(sparse("sparse"))
    model = helper.make_model(graph, functions=[function])
    model.training_info.add().initialization.initializer.append(
        numpy_helper.from_array(weights(2), "seed")
    )
    return model


TAKEN = {
    "w", "typed", "half", "brain", "sparse", "sparse.indices", "dense", "floats", "ints", "few",
    "few.indices", "branch.then_branch/i", "branch.then_branch/c", "branch.else_branch/i",
    "branch.else_branch/c", "odd.many0", "odd.many1", "Layer/w", "initialization/seed",
}  # fmt: skip


def save(model: Any, path: Path) -> bytes:
    data = bytes(model.SerializeToString(deterministic=True))
    path.write_bytes(data)
    return data


def test_values_are_found_wherever_they_lie(tmp_path: Path) -> None:
    save(hidden(), tmp_path / "m.onnx")
    source = open_tensors(tmp_path / "m.onnx")
    assert set(source) == TAKEN
    assert source["floats"].values.tolist() == [np.float32(0.1), -2.5, np.inf]
    assert source["ints"].values.tolist() == [5, -(2**40)]
    assert source["few.indices"].values.tolist() == [1, 4, 7]
    assert source["brain"].dtype == "bfloat16"


@pytest.mark.parametrize("part_bytes", [1 << 25, 64])
def test_a_model_comes_back_byte_for_byte(tmp_path: Path, part_bytes: int) -> None:
    data = save(hidden(), tmp_path / "m.onnx")
    compress_file(open_tensors(tmp_path / "m.onnx"), tmp_path / "m.pcc", part_bytes=part_bytes)
    archive = open_archive(tmp_path / "m.pcc")
    assert set(archive) == TAKEN
    restore_file(archive, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == data


def test_external_data_of_constants_are_taken_in(tmp_path: Path) -> None:
    model = hidden()
    wanted = numpy_helper.to_array(model.graph.node[0].attribute[0].t)
    (tmp_path / "w.bin").write_bytes(wanted.tobytes())
    tensor = model.graph.node[0].attribute[0].t
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    save(model, tmp_path / "m.onnx")
    compress_file(open_tensors(tmp_path / "m.onnx"), tmp_path / "m.pcc")
    (tmp_path / "w.bin").unlink()
    restore_file(open_archive(tmp_path / "m.pcc"), tmp_path / "again.onnx")
    again = onnx.load(tmp_path / "again.onnx", load_external_data=False)
    found = again.graph.node[0].attribute[0].t
    assert np.array_equal(numpy_helper.to_array(found), wanted)
    assert found.data_location == TensorProto.DEFAULT


def test_external_data_of_a_type_without_a_coding_stay_with_the_graph(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"\x21\x03")
    four = TensorProto(name="four", data_type=TensorProto.INT4, dims=[3])
    four.data_location = TensorProto.EXTERNAL
    four.external_data.add(key="location", value="w.bin")
    save(helper.make_model(helper.make_graph([], "g", [], [], [four])), tmp_path / "m.onnx")
    compress_file(open_tensors(tmp_path / "m.onnx"), tmp_path / "m.pcc")
    restore_file(open_archive(tmp_path / "m.pcc"), tmp_path / "again.onnx")
    again = onnx.load(tmp_path / "again.onnx", load_external_data=False)
    assert again.graph.initializer[0].raw_data == b"\x21\x03"


def test_weights_in_constants_are_quantised_too(tmp_path: Path) -> None:
    values = weights(40, 50)
    node = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(values))
    save(helper.make_model(helper.make_graph([node], "g", [], [])), tmp_path / "m.onnx")
    result = compress_file(
        open_tensors(tmp_path / "m.onnx"), tmp_path / "m.pcc", lossy=Lossy(error=0.05)
    )
    assert result.nbytes < values.nbytes / 4
    restore_file(open_archive(tmp_path / "m.pcc"), tmp_path / "again.onnx")
    again = numpy_helper.to_array(onnx.load(tmp_path / "again.onnx").graph.node[0].attribute[0].t)
    error = np.linalg.norm(again - values) / np.linalg.norm(values)
    assert 0.01 < error <= 0.05


def test_what_does_not_come_back_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim is checked on the bytes: a coder with a fault cannot make it."""
    save(hidden(), tmp_path / "m.onnx")
    real = compressing.pack_part

    def faulty(coded: Any, **options: Any) -> bytes:
        changed = dict(coded)
        changed["w"] = compressing.keep(FileTensor(coded["w"].values + 1, "float32"))
        return real(changed, **options)

    monkeypatch.setattr(compressing, "pack_part", faulty)
    with pytest.raises(UnreadableFile, match="'w' does not come back"):
        compress_file(open_tensors(tmp_path / "m.onnx"), tmp_path / "m.pcc")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_graph_that_does_not_belong_to_the_tensors_is_refused(tmp_path: Path) -> None:
    save(hidden(), tmp_path / "m.onnx")
    source = open_tensors(tmp_path / "m.onnx")
    assert source.graph is not None
    tensors = dict(source)
    for wrong in (
        {"unknown": tensors["w"]},
        {"w": FileTensor(np.zeros(2, np.float32), "float32")},
        {"w": FileTensor(np.zeros(3, np.int32), "int32")},
        {"floats": FileTensor(np.zeros((1, 3), np.float32), "float32")},
    ):
        with pytest.raises(UnreadableFile, match="damaged"):
            write_onnx(tmp_path / "x.onnx", wrong, source.graph)
    for graph in (b"\xff" * 9, b""):
        with pytest.raises(FilesError, match="damaged"):
            write_onnx(tmp_path / "x.onnx", tensors, graph)
    assert not (tmp_path / "x.onnx").exists()


def test_two_initialisers_of_one_name_are_refused_by_name(tmp_path: Path) -> None:
    """Which of them a runtime would take, nothing says."""
    tensor = numpy_helper.from_array(weights(3), "w")
    twice = helper.make_model(helper.make_graph([], "g", [], [], [tensor, tensor]))
    mixed = helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
    mixed.graph.sparse_initializer.append(sparse("w"))
    for model in (twice, mixed):
        data = save(model, tmp_path / "m.onnx")
        with pytest.raises(UnreadableFile, match=r"m\.onnx.* two initialisers named 'w'.* again"):
            open_tensors(tmp_path / "m.onnx")
        with pytest.raises(UnreadableFile, match="two initialisers named 'w'"):
            write_onnx(tmp_path / "n.onnx", {}, data)


def test_names_of_inner_graphs_shadow_outer_ones_and_come_back(tmp_path: Path) -> None:
    tensors = [numpy_helper.from_array(weights(3), "w") for _ in range(3)]
    inner = helper.make_graph([], "then", [], [], tensors[1:])
    node = helper.make_node("If", ["c"], ["y"], "if", then_branch=inner)
    data = save(
        helper.make_model(helper.make_graph([node], "g", [], [], tensors[:1])), tmp_path / "m.onnx"
    )
    source = open_tensors(tmp_path / "m.onnx")
    assert list(source) == ["w", "if.then_branch/w", "if.then_branch/w_2"]
    for name, tensor in zip(source, tensors, strict=True):
        assert source[name].values.tobytes() == tensor.raw_data
    compress_file(source, tmp_path / "m.pcc")
    restore_file(open_archive(tmp_path / "m.pcc"), tmp_path / "n.onnx")
    assert (tmp_path / "n.onnx").read_bytes() == data


def test_many_places_of_one_name_take_no_search_each() -> None:
    value = numpy_helper.from_array(np.ones(1, np.float32))
    model = helper.make_model(helper.make_graph([], "g", [], []))
    taken = [helper.make_node("Constant", [], [n], value=value) for n in ("c", "c_3", "c_7")]
    model.graph.node.extend([*taken, *[taken[0]] * 20_000])
    found = [place.name for place in onnx_skeleton.places(model)]
    assert found[:9] == ["c", "c_3", "c_7", "c_2", "c_4", "c_5", "c_6", "c_8", "c_9"]
    assert found[-1] == "c_20003"
    assert len(set(found)) == 20_003


def test_names_that_inner_graphs_repeat_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of outer nodes begins that of everything inside."""
    tensors = [numpy_helper.from_array(weights(1), str(i)) for i in range(100)]
    inner = helper.make_graph([], "then", [], [], tensors)
    node = helper.make_node("If", ["c"], ["y"], "n" * 1000, then_branch=inner)
    model = helper.make_model(helper.make_graph([node], "g", [], []))
    assert len(onnx_skeleton.places(model)) == 100
    monkeypatch.setattr(onnx_skeleton, "_MOST_NAMES", 100_000)
    with pytest.raises(FileTooLarge, match=r"more than 100,000 bytes: give shorter ones"):
        onnx_skeleton.places(model)


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    model = helper.make_model(
        helper.make_graph([], "g", [], [], [numpy_helper.from_array(weights(3), "name")])
    )
    data = save(model, tmp_path / "m.onnx").replace(b"name", b"\xff\xffme")
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(UnreadableFile, match=r"m\.onnx.* not UTF-8"):
        open_tensors(tmp_path / "m.onnx")
    with pytest.raises(UnreadableFile, match="not UTF-8"):
        write_onnx(tmp_path / "n.onnx", {}, data)
    assert not (tmp_path / "n.onnx").exists()


@pytest.mark.parametrize(
    ("dims", "error", "said"),
    [
        ([2**62] * 100_000, UnsupportedTensor, "'w' has 100,000 dimensions, more than 32"),
        ([1] * 33, UnsupportedTensor, "'w' has 33 dimensions, more than 32"),
        ([0, 2**62, 2**62], UnreadableFile, "'w' is damaged: the impossible shape"),
        ([2**62, 2**62], UnreadableFile, "'w' is damaged: the impossible shape"),
        ([-1, -1], UnreadableFile, "'w' is damaged: the impossible shape"),
    ],
)
def test_shapes_that_cannot_be_are_refused_before_they_are_multiplied(
    tmp_path: Path, dims: list[int], error: type[FilesError], said: str
) -> None:
    tensor = numpy_helper.from_array(weights(1), "w")
    tensor.dims[:] = dims
    save(helper.make_model(helper.make_graph([], "g", [], [], [tensor])), tmp_path / "m.onnx")
    with pytest.raises(error, match=said):
        open_tensors(tmp_path / "m.onnx")


@pytest.mark.parametrize("location", ["a" * 5000, "circle"])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.INT4])
def test_external_data_that_cannot_be_looked_up_are_refused(
    tmp_path: Path, location: str, dtype: int
) -> None:
    """A name that no file can have, and links in a circle."""
    (tmp_path / "circle").symlink_to("circle")
    tensor = TensorProto(name="w", dims=[4], data_type=dtype, data_location=1)
    tensor.external_data.add(key="location", value=location)
    save(helper.make_model(helper.make_graph([], "g", [], [], [tensor])), tmp_path / "m.onnx")
    for read in (open_tensors, open_checkpoint):
        with pytest.raises(UnreadableFile, match=r"'w': external data at .* cannot be looked up"):
            read(tmp_path / "m.onnx")
