"""Reading and writing checkpoints: every dtype, and nothing that a hostile file could want."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from prunecast.common.files import is_locked, remove_abandoned
from prunecast.compression.files import (
    FilesError,
    FileTooLarge,
    UnknownFormat,
    UnreadableFile,
    UnsafePath,
    UnsupportedTensor,
)
from prunecast.compression.files.compressing import compress_file
from prunecast.compression.files.formats import open_tensors, write_tensors
from prunecast.compression.files.onnx_skeleton import write_onnx
from prunecast.compression.files.tensors import FileTensor
from support.checkpoints import FLOAT8, assert_same, every_kind

FOREIGN = ("bfloat16", *FLOAT8)


# --- .safetensors ----------------------------------------------------------------------------


def test_safetensors_round_trip(checkpoint: Path, kinds: dict[str, FileTensor]) -> None:
    source = open_tensors(checkpoint)
    assert set(source) == set(kinds)
    assert source.metadata == {"format": "pt", "ключ": "значение"}
    assert source.nbytes == sum(t.spec.nbytes for t in kinds.values())
    for name, tensor in kinds.items():
        assert source.specs[name] == tensor.spec
        assert_same(source[name], tensor)


def test_safetensors_of_the_library_itself(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=ml_dtypes.bfloat16),
        "c": np.array([1.5, -2], ml_dtypes.float8_e4m3fn),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    source = open_tensors(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        assert source[name].dtype == array.dtype.name
        assert source[name].values.tobytes() == array.tobytes()
    assert np.array_equal(source["b"].real(), [0, 1, 2, 3])


def test_written_safetensors_are_read_by_the_library(checkpoint: Path) -> None:
    with safetensors.safe_open(checkpoint, "np") as opened:
        assert np.array_equal(opened.get_tensor("int16"), every_kind()["int16"].values)
        assert opened.get_slice("bfloat16").get_dtype() == "BF16"


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".onnx", ".pcc"])
def test_what_a_killed_writer_left_goes_with_the_next(
    tmp_path: Path, kinds: dict[str, FileTensor], suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And while one writes, nothing lies beside its file that the next would not know."""
    path, seen = tmp_path / f"m{suffix}", set()
    tensors = {n: t for n, t in kinds.items() if t.dtype not in FOREIGN}
    left, other = tmp_path / f".m{suffix}.0123456789abcdef", tmp_path / ".n.npz.0123456789abcdef"
    for file in (left, other):
        file.write_bytes(b"x")
    skeleton = helper.make_model(helper.make_graph([], "g", [], [])).SerializeToString()
    source = None
    if suffix == ".pcc":
        write_tensors(tmp_path / "source.npz", tensors)
        source = open_tensors(tmp_path / "source.npz")
    sync = os.fsync

    def look(handle: int) -> None:
        seen.update(p.name for p in tmp_path.glob(".*"))
        sync(handle)

    monkeypatch.setattr(os, "fsync", look)
    if suffix == ".onnx":
        write_onnx(path, {}, skeleton)
    elif source is not None:
        compress_file(source, path)
    else:
        write_tensors(path, tensors)
    assert path.is_file()
    assert left.name not in seen
    assert all(name == other.name or name.startswith(f".m{suffix}.") for name in seen)
    assert [p.name for p in tmp_path.glob(".*")] == [other.name]


def test_a_file_of_safetensors_stays_the_locked_one_while_it_is_written(
    tmp_path: Path, kinds: dict[str, FileTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose lock is gone is taken for abandoned, and removed by the next writer."""
    replace = os.replace

    def look(temporary: Path, path: Path) -> None:
        assert is_locked(temporary)
        remove_abandoned(tmp_path)
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", look)
    write_tensors(tmp_path / "m.safetensors", kinds)
    assert set(open_tensors(tmp_path / "m.safetensors")) == set(kinds)


@pytest.mark.parametrize(
    ("name", "metadata"),
    [("__metadata__", {}), ("\ud800", {}), ("w", {"a": "\udfff"}), ("w", {"\udc80": "a"})],
)
def test_names_and_texts_that_safetensors_cannot_hold_are_refused(
    tmp_path: Path, name: str, metadata: dict[str, str]
) -> None:
    tensor = FileTensor(np.ones(4, "f4"), "float32")
    with pytest.raises(UnsupportedTensor, match=r"a \.safetensors file can hold no"):
        write_tensors(tmp_path / "m.safetensors", {name: tensor}, metadata)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a\0b", "n" * 65_000])
def test_names_that_an_archive_would_cut_off_are_refused(tmp_path: Path, name: str) -> None:
    tensors = {name: FileTensor(np.ones(4, "f4"), "float32")}
    with pytest.raises(UnsupportedTensor, match=r"an \.npz file can hold no tensor .*safetensors"):
        write_tensors(tmp_path / "m.npz", tensors)
    write_tensors(tmp_path / "m.safetensors", tensors)
    assert list(open_tensors(tmp_path / "m.safetensors")) == [name]


def safetensors_file(header: Any, body: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + body


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x08",
        safetensors_file(b"not json"),
        safetensors_file({"a": ENTRY}, bytes(7)),
        safetensors_file({"a": ENTRY}, bytes(9)),
        safetensors_file({"a": {**ENTRY, "shape": [3]}}, bytes(8)),
        safetensors_file({"a": {**ENTRY, "shape": [1 << 62]}}, bytes(8)),
        safetensors_file({"a": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
        safetensors_file({"a": {**ENTRY, "dtype": "PICKLE"}}, bytes(8)),
        (1 << 60).to_bytes(8, "little") + bytes(100),
    ],
    ids=str,
)
def test_damaged_safetensors_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(UnreadableFile, match=r"bad\.safetensors"):
        open_tensors(path)


def test_a_dtype_that_cannot_be_coded_is_named(tmp_path: Path) -> None:
    path = tmp_path / "complex.safetensors"
    path.write_bytes(safetensors_file({"z": {**ENTRY, "dtype": "C64", "shape": [1]}}, bytes(8)))
    with pytest.raises(UnsupportedTensor, match="'z' is C64"):
        open_tensors(path)


def test_more_dimensions_than_arrays_have_are_refused_by_name(tmp_path: Path) -> None:
    header = {"deep": {"dtype": "F32", "shape": [1] * 100 + [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    path = tmp_path / "deep.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(UnsupportedTensor, match=r"'deep' has 101 dimensions.*reshape it"):
        open_tensors(path)
    np.savez(tmp_path / "deep.npz", deep=np.zeros([1] * 40, np.float32))
    with pytest.raises(
        UnsupportedTensor, match=r"'deep' has .* more than 32 dimensions: .*reshape it"
    ):
        compress_file(open_tensors(tmp_path / "deep.npz"), tmp_path / "deep.pcc")


def test_a_file_that_shrinks_meanwhile_is_noticed(checkpoint: Path) -> None:
    source = open_tensors(checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:300])
    with pytest.raises(UnreadableFile, match="became shorter"):
        dict(source)


# --- .npz ------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_numpy(tmp_path: Path, save: Callable[..., None]) -> None:
    arrays = {n: t.values for n, t in every_kind().items() if t.dtype not in FOREIGN}
    arrays["fortran"] = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    arrays["big"] = np.arange(5, dtype=">i4")
    save(tmp_path / "x.npz", **arrays)
    source = open_tensors(tmp_path / "x.npz")
    assert list(source) == list(arrays)
    for name, array in arrays.items():
        found = source[name].values
        assert found.dtype == array.dtype.newbyteorder("=")
        assert found.shape == array.shape == source.specs[name].shape
        assert np.array_equal(found, array, equal_nan=array.dtype.kind == "f")


def test_written_npz_are_read_by_numpy(tmp_path: Path, kinds: dict[str, FileTensor]) -> None:
    native = {n: t for n, t in kinds.items() if t.dtype not in FOREIGN}
    write_tensors(tmp_path / "x.npz", native)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as archive:
        assert archive.files == list(native)
        for name, tensor in native.items():
            assert_same(FileTensor(archive[name], archive[name].dtype.name), tensor)
    again = tmp_path / "y.npz"
    write_tensors(again, native)
    assert again.read_bytes() == (tmp_path / "x.npz").read_bytes()


@pytest.mark.parametrize("dtype", FOREIGN)
def test_npz_cannot_hold_small_floats(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(UnsupportedTensor, match=rf"'x' is {dtype}.*safetensors"):
        write_tensors(tmp_path / "x.npz", {"x": every_kind()[dtype]})
    assert list(tmp_path.iterdir()) == []


def npy(header: str, body: bytes = b"") -> bytes:
    raw = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw + body


def npz(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "."), data)
    return out.getvalue()


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK",
        npz(readme__txt=b"hello"),
        npz(a__npy=b"hello"),
        npz(a__npy=npy(GOOD, bytes(7))),
        npz(a__npy=npy(GOOD, bytes(9))),
        npz(a__npy=npy(GOOD.replace("(2,)", f"({1 << 60},)"), bytes(8))),
        npz(a__npy=npy(GOOD.replace("(2,)", "(-2,)"), bytes(8))),
        npz(a__npy=npy(GOOD.replace("(2,)", "__import__('os')"), bytes(8))),
        npz(a__npy=npy(GOOD.replace("<f4", "|O"), bytes(8))),
        npz(a__npy=npy(GOOD, bytes(8)))[:-30],
        npz(a__npy=npy(GOOD, bytes(8))).replace(b"<f4", b"<f8"),
    ],
    ids=range(12),  # the bytes hold the time
)
def test_damaged_npz_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(data)
    with pytest.raises(UnreadableFile, match=r"bad\.npz"):
        open_tensors(path)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("a pickle was loaded",))

    path = tmp_path / "bomb.npz"
    np.savez(path, a=np.array([Bomb()], dtype=object))
    with pytest.raises(UnreadableFile, match="pickle"):
        open_tensors(path)


@pytest.mark.parametrize(
    ("array", "remedy"),
    [
        (np.array([1j], np.complex64), r"complex64.*two float32 arrays \(array\.real"),
        (np.array([1j]), r"complex128.*two float64 arrays"),
        (np.array(["text"]), "which is text: leave the array out"),
        (np.zeros(2, np.longdouble), r"astype\('float64'\)"),
        (np.zeros(2, "M8[s]"), "convert it or leave it out"),
    ],
    ids=lambda given: str(getattr(given, "dtype", "")),
)
def test_a_dtype_that_cannot_be_coded_says_what_to_do(
    tmp_path: Path, array: np.ndarray, remedy: str
) -> None:
    np.savez(tmp_path / "x.npz", fine=np.zeros(2), odd=array)
    with pytest.raises(UnsupportedTensor, match=rf"x\.npz: array 'odd' has dtype .*{remedy}"):
        open_tensors(tmp_path / "x.npz")


def test_objects_are_named_and_no_pickle_is_suggested(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", fine=np.zeros(2), odd=np.array([1, {}], dtype=object))
    with pytest.raises(UnreadableFile, match=r"x\.npz: array 'odd' holds .*astype") as told:
        open_tensors(tmp_path / "x.npz")
    assert "allow_pickle" not in str(told.value)


def test_what_files_state_has_one_limit(tmp_path: Path) -> None:
    """Of every format: 1 GiB or 64 times the file, or what the caller allows."""
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros(1 << 20))
    header = {"x": {"dtype": "U8", "shape": [1 << 31], "data_offsets": [0, 1 << 31]}}
    (tmp_path / "x.safetensors").write_bytes(safetensors_file(header))
    os.truncate(tmp_path / "x.safetensors", (tmp_path / "x.safetensors").stat().st_size + (1 << 31))
    assert len(open_tensors(tmp_path / "x.npz")) == 1
    with pytest.raises(FileTooLarge, match=r"more than 1,073,741,824 bytes.*--max-bytes"):
        open_tensors(tmp_path / "x.safetensors")
    assert open_tensors(tmp_path / "x.safetensors", max_bytes=1 << 31).nbytes == 1 << 31
    save_model(tmp_path / "x.onnx", [raw_proto("w", WEIGHT)])
    for name in ("x.npz", "x.safetensors", "x.onnx"):
        with pytest.raises(FileTooLarge, match="more than 10 bytes"):
            open_tensors(tmp_path / name, max_bytes=10)


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([1j]), np.zeros(2, "f4,i4")])
def test_npz_dtypes_that_cannot_be_coded_are_named(tmp_path: Path, array: np.ndarray) -> None:
    np.savez(tmp_path / "x.npz", odd=array)
    with pytest.raises(UnsupportedTensor, match="'odd' has dtype"):
        open_tensors(tmp_path / "x.npz")


# --- .onnx -----------------------------------------------------------------------------------

ONNX_TYPES = {
    "float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int8": TensorProto.INT8,
    "uint16": TensorProto.UINT16, "int16": TensorProto.INT16, "int32": TensorProto.INT32,
    "int64": TensorProto.INT64, "bool": TensorProto.BOOL, "float16": TensorProto.FLOAT16,
    "float64": TensorProto.DOUBLE, "uint32": TensorProto.UINT32, "uint64": TensorProto.UINT64,
    "bfloat16": TensorProto.BFLOAT16, "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,
    "float8_e4m3fnuz": TensorProto.FLOAT8E4M3FNUZ, "float8_e5m2": TensorProto.FLOAT8E5M2,
    "float8_e5m2fnuz": TensorProto.FLOAT8E5M2FNUZ, "float8_e8m0fnu": TensorProto.FLOAT8E8M0,
}  # fmt: skip


def raw_proto(name: str, tensor: FileTensor) -> Any:
    proto = TensorProto(name=name, data_type=ONNX_TYPES[tensor.dtype])
    proto.dims.extend(tensor.values.shape)
    proto.raw_data = tensor.values.tobytes()
    return proto


def save_model(path: Path, protos: list[Any]) -> None:
    graph = helper.make_graph([], "g", [], [], initializer=protos)
    path.write_bytes(helper.make_model(graph).SerializeToString())


def test_onnx_raw_data(tmp_path: Path, kinds: dict[str, FileTensor]) -> None:
    save_model(tmp_path / "m.onnx", [raw_proto(n, t) for n, t in kinds.items()])
    source = open_tensors(tmp_path / "m.onnx")
    assert list(source) == list(kinds)
    for name, tensor in kinds.items():
        assert_same(source[name], tensor)


def test_onnx_typed_data(tmp_path: Path, kinds: dict[str, FileTensor]) -> None:
    """Values in float_data, int32_data and so on, as other tools write them."""
    some = {n: t for n, t in kinds.items() if n != "bfloat16"}
    some["bfloat16"] = FileTensor(np.array([0x3F80, 0xC000, 0x7F80], np.uint16), "bfloat16")
    protos = []
    for name, tensor in some.items():
        values = tensor.values
        if tensor.dtype in FOREIGN:
            values = values.view(getattr(ml_dtypes, tensor.dtype))
        proto = TensorProto(name=name, data_type=ONNX_TYPES[tensor.dtype])
        proto.dims.extend(values.shape)
        field = helper.tensor_dtype_to_field(proto.data_type)
        bits = values.reshape(-1)
        if tensor.dtype in (*FOREIGN, "float16"):
            bits = tensor.values.reshape(-1).view(f"u{values.itemsize}")
        getattr(proto, field).extend(bits.tolist())
        protos.append(proto)
    save_model(tmp_path / "m.onnx", protos)
    source = open_tensors(tmp_path / "m.onnx")
    for name, tensor in some.items():
        assert_same(source[name], tensor)


def external(name: str, tensor: FileTensor, **entries: str) -> Any:
    proto = raw_proto(name, tensor)
    proto.ClearField("raw_data")
    proto.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        entry = proto.external_data.add()
        entry.key, entry.value = key, value
    return proto


def test_onnx_external_data(tmp_path: Path, kinds: dict[str, FileTensor]) -> None:
    model = onnx.load_model_from_string(
        helper.make_model(
            helper.make_graph(
                [],
                "g",
                [],
                [],
                initializer=[
                    numpy_helper.from_array(t.values, n)
                    for n, t in kinds.items()
                    if t.dtype not in FOREIGN
                ],
            )
        ).SerializeToString()
    )
    onnx.save_model(
        model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    assert (tmp_path / "w.bin").stat().st_size > 8000
    source = open_tensors(tmp_path / "m.onnx")
    for name, tensor in kinds.items():
        if tensor.dtype not in FOREIGN:
            assert_same(source[name], tensor)


WEIGHT = FileTensor(np.arange(4, dtype=np.float32), "float32")


@pytest.mark.parametrize(
    "location",
    [
        "../secret.bin", "/etc/passwd", "sub/../../secret.bin", "..\\secret.bin", "C:\\secret.bin",
        "\\\\host\\secret.bin", "link.bin", "linked/secret.bin", "", "a\0b",
    ],
)  # fmt: skip
def test_external_data_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "linked").symlink_to(tmp_path)
    save_model(folder / "m.onnx", [external("w", WEIGHT, location=location)])
    with pytest.raises(UnsafePath, match="folder"):
        open_tensors(folder / "m.onnx")


@pytest.mark.parametrize(
    "entries",
    [
        {"location": "missing.bin"},
        {"location": "."},
        {"location": "w.bin", "offset": "-4"},
        {"location": "w.bin", "offset": "8"},
        {"location": "w.bin", "offset": "four"},
        {"location": "w.bin", "length": "12"},
        {"location": "w.bin", "offset": str(1 << 70)},
    ],
    ids=str,
)
def test_external_data_that_do_not_fit_are_refused(tmp_path: Path, entries: dict[str, str]) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(20))
    save_model(tmp_path / "m.onnx", [external("w", WEIGHT, **entries)])
    with pytest.raises(UnreadableFile):
        open_tensors(tmp_path / "m.onnx")


def test_external_data_below_the_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w.bin").write_bytes(bytes(3) + WEIGHT.values.tobytes() + b"rest")
    proto = external("w", WEIGHT, location="sub/w.bin", offset="3", length="16")
    save_model(tmp_path / "m.onnx", [proto])
    assert_same(open_tensors(tmp_path / "m.onnx")["w"], WEIGHT)


def test_damaged_onnx_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    short = raw_proto("w", WEIGHT)
    short.raw_data = short.raw_data[:-1]
    negative = TensorProto(name="w", data_type=1, dims=[-1])
    for protos in ([short], [negative], [raw_proto("w", WEIGHT)] * 2):
        save_model(path, protos)
        with pytest.raises(UnreadableFile, match=r"bad\.onnx"):
            open_tensors(path)
    for data in (b"", b"\xff" * 40, b"hello world, this is no model"):
        path.write_bytes(data)
        with pytest.raises(UnreadableFile, match=r"bad\.onnx"):
            open_tensors(path)
    typed = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 40], float_data=[1.0])
    save_model(path, [typed])
    with pytest.raises(UnreadableFile, match="'w' is damaged"):
        open_tensors(path)["w"]
    model = helper.make_model(helper.make_graph([], "g", [], []))
    model.graph.initializer.add(name="w").dims.append(1)
    path.write_bytes(model.SerializeToString().replace(b"\x42\x01w", b"\x42\x01\xff"))
    with pytest.raises(UnreadableFile, match="UTF-8"):
        open_tensors(path)


# --- all ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("model.pth", r"weights_only=True.*safetensors\.torch\.save_file"),
        ("model.ckpt", "is a pickle and is not read"),
        ("model.pt2", "export the program to"),
        ("x.npy", r"numpy\.savez"),
        ("x.pcc", "prunecast decompress"),
    ],
)
def test_other_formats_say_how_to_convert(tmp_path: Path, name: str, remedy: str) -> None:
    with pytest.raises(UnknownFormat, match=remedy):
        open_tensors(tmp_path / name)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".onnx"])
@pytest.mark.parametrize(
    ("start", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n", "git lfs pull"),
        (b"<!doctype html><html>", "a page of HTML"),
        (b"\x1f\x8b\x08 and more of it", "compressed with gzip"),
        (
            b"\x80\x02}q\x00X\x03\x00\x00\x00aaaq",
            "a pickle, of torch perhaps, which is never loaded",
        ),
        (b"", "it is empty"),
    ],
    ids=["lfs", "html", "gzip", "pickle", "empty"],
)
def test_what_a_file_really_is_is_said(
    tmp_path: Path, suffix: str, start: bytes, says: str
) -> None:
    (tmp_path / f"x{suffix}").write_bytes(start)
    with pytest.raises(UnreadableFile, match=says):
        open_tensors(tmp_path / f"x{suffix}")


def test_pipes_folders_and_links_to_nowhere_are_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "link.npz").symlink_to("nowhere")
    for name, says in (("pipe", "no regular"), ("folder", "is a folder"), ("link", "to nowhere")):
        with pytest.raises(UnreadableFile, match=says):
            open_tensors(tmp_path / f"{name}.npz")


def test_suffix_decides_and_others_are_named(tmp_path: Path, checkpoint: Path) -> None:
    upper = checkpoint.rename(tmp_path / "MODEL.SAFETENSORS")
    assert len(open_tensors(upper)) > 10
    with pytest.raises(UnknownFormat, match=r"'\.pt' is none of \.safetensors, \.npz, \.onnx"):
        open_tensors(tmp_path / "model.pt")
    with pytest.raises(UnknownFormat, match=r"\.onnx"):
        write_tensors(tmp_path / "model.onnx", {})
    for name in ("x.safetensors", "x.npz", "x.onnx"):
        with pytest.raises(UnreadableFile, match="no such file"):
            open_tensors(tmp_path / name)


@cache
def originals() -> dict[str, bytes]:
    """A small file of every format."""
    kinds = {n: t for n, t in every_kind().items() if n not in FOREIGN and t.values.size < 100}
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_tensors(folder / "s.safetensors", kinds)
        write_tensors(folder / "s.npz", kinds)
        save_model(folder / "s.onnx", [raw_proto(n, t) for n, t in kinds.items()])
        return {p.suffix: p.read_bytes() for p in folder.iterdir()}


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_whatever_the_bytes_only_own_errors_leave(data: st.DataObject, tmp_path: Path) -> None:
    suffix = data.draw(st.sampled_from(sorted(originals())))
    mutated = bytearray(originals()[suffix])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(mutated) - 1) | st.integers(0, 400))
        mutated[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del mutated[data.draw(st.integers(0, len(mutated))) :]
    path = tmp_path / f"m{suffix}"
    path.write_bytes(mutated)
    try:
        source = open_tensors(path)
    except FilesError:
        return
    for name in source:
        try:
            tensor = source[name]
        except FilesError:
            continue
        assert tensor.spec == source.specs[name]
