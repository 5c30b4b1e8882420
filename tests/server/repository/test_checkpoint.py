from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunecast.common.files import StorageError
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor, save_model
from prunecast.server.repository import RepositoryError
from prunecast.server.repository.authoring.sources import from_arrays, read_checkpoint

ARRAYS = {
    "w": np.array([[0.5, -1.27], [0.0, 0.01]], np.float32),
    "b": np.array([1.5, -2.5], np.float32),
    "n": np.array(3, np.int64),
}


def _safetensors_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    names = {"float32": "F32", "int64": "I64", "float16": "F16", "bool": "BOOL"}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, values in arrays.items():
        data = values.tobytes()
        header[name] = {
            "dtype": names[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_dense_checkpoints_are_kept_exactly(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".npz":
        np.savez(path, **ARRAYS)
    else:
        path.write_bytes(_safetensors_bytes(ARRAYS))
    model = read_checkpoint(path)
    assert all(isinstance(t, RawTensor) for t in model.tensors.values())
    for name, values in model.arrays().items():
        assert values.dtype == ARRAYS[name].dtype
        assert np.array_equal(values, ARRAYS[name])


def test_bits_put_matrices_on_a_lattice(tmp_path: Path) -> None:
    model = from_arrays(ARRAYS, bits=8)
    w = model.tensors["w"]
    assert isinstance(w, LatticeTensor)
    assert w.q.tolist() == [[50, -127], [0, 1]]
    assert w.step == pytest.approx(0.01)
    assert np.abs(w.dense() - ARRAYS["w"]).max() <= w.step / 2
    assert isinstance(model.tensors["b"], RawTensor)
    assert from_arrays({"z": np.zeros((2, 2), np.float32)}, bits=4).arrays()["z"].sum() == 0


def test_a_saved_model_is_read_as_it_is(tmp_path: Path) -> None:
    model = PublishedModel({"w": LatticeTensor(np.array([[1, 2]]), 0.5)}, 7)
    save_model(model, tmp_path / "m.model")
    again = read_checkpoint(tmp_path / "m.model")
    assert (again.digest, again.counter) == (model.digest, 7)
    with pytest.raises(RepositoryError, match="fixed already"):
        read_checkpoint(tmp_path / "m.model", bits=8)
    with pytest.raises(StorageError):
        read_checkpoint(tmp_path / "absent.model")


def test_a_prefix_is_dropped_on_request(tmp_path: Path) -> None:
    path = tmp_path / "wrapped.npz"
    wrapped = {f"module.{name}": values for name, values in ARRAYS.items()}
    np.savez(path, n_averaged=np.array(5), **wrapped)
    model = read_checkpoint(path, prefix="module.")
    assert list(model.tensors) == list(ARRAYS)
    assert np.array_equal(model.arrays()["w"], ARRAYS["w"])
    assert "module.w" in read_checkpoint(path).tensors
    with pytest.raises(
        RepositoryError, match=r"no name begins with 'net\.'; there are 'n_averaged'"
    ):
        read_checkpoint(path, prefix="net.")
    np.savez(path, **{"_orig_mod.w": ARRAYS["w"], "part._orig_mod.b": ARRAYS["b"], "n": 1})
    assert list(read_checkpoint(path, prefix="_orig_mod.").tensors) == ["w", "part.b", "n"]
    np.savez(path, **{"_orig_mod.w": ARRAYS["w"], "w": ARRAYS["w"]})
    with pytest.raises(RepositoryError, match="two tensors have the same name"):
        read_checkpoint(path, prefix="_orig_mod.")


def test_a_checkpoint_has_the_limit_of_every_file(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros(10_000))
    with pytest.raises(RepositoryError, match=r"more than 1,000 bytes.*--max-bytes"):
        read_checkpoint(tmp_path / "x.npz", max_bytes=1000)
    save_model(PublishedModel({"w": LatticeTensor(np.zeros((100, 100), int), 0.5)}), tmp_path / "m")
    assert read_checkpoint(tmp_path / "m", max_bytes=1 << 20).tensors
    with pytest.raises(RepositoryError, match=r"40000 bytes, above the limits.*--max-bytes"):
        read_checkpoint(tmp_path / "m", max_bytes=1000)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("m.onnx", b"\x08\x08", "give it with --from"),
        ("m.pt", b"PK\x03\x04\x00\x00archive/data.pkl", r"safetensors\.torch\.save_file"),
        ("m.pcc", b"PCC2 and more", "prunecast decompress"),
        ("m.model", b"<html>", "a page of HTML"),
    ],
)
def test_other_files_say_what_they_are(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RepositoryError, match=says):
        read_checkpoint(tmp_path / name)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="bits"):
        from_arrays(ARRAYS, bits=1)
    with pytest.raises(RepositoryError, match="'w' holds a value that is not finite"):
        from_arrays({"w": np.array([[np.inf]], np.float32)}, bits=8)
    with pytest.raises(RepositoryError, match="cannot read"):
        read_checkpoint(tmp_path / "absent.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK nonsense")
    with pytest.raises(RepositoryError, match="not a readable"):
        read_checkpoint(tmp_path / "bad.npz")
    good = _safetensors_bytes(ARRAYS)
    for change in (
        good[:-1],
        b"\xff" * 8 + good[8:],
        good.replace(b'"F32"', b'"F8X"', 1),
        good.replace(b"[2, 2]", b"[2, 9]", 1),
        good.replace(b"[2, 2]", b"[-2,2]", 1),
    ):
        (tmp_path / "bad.safetensors").write_bytes(change)
        with pytest.raises(RepositoryError, match="not a readable"):
            read_checkpoint(tmp_path / "bad.safetensors")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.binary(max_size=120), st.sampled_from([".safetensors", ".npz"]))
def test_arbitrary_bytes_raise_one_error(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(data)
    with suppress(RepositoryError):
        read_checkpoint(path)


def test_bfloat16_is_read_as_float32_and_smaller_floats_are_not(tmp_path: Path) -> None:
    data = _safetensors_bytes({"w": np.array([1.5, -2.0], np.float16)})
    values = np.array([1.5, -2.0], np.float32).view(np.uint32) >> 16
    data = data[:-4].replace(b'"F16"', b'"BF16"') + values.astype("<u2").tobytes()
    size = int.from_bytes(data[:8], "little") + 1  # the name of the dtype is longer
    path = tmp_path / "w.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + data[8:])
    found = read_checkpoint(path).arrays()["w"]
    assert (found.dtype, found.tolist()) == (np.float32, [1.5, -2.0])
    text = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(RepositoryError, match="float8_e4m3fn: convert it"):
        read_checkpoint(path)


def test_the_steps_of_the_version_before_are_held(tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    np.savez(path, **ARRAYS)
    first = read_checkpoint(path, bits=8, steps="held")
    np.savez(path, **(ARRAYS | {"w": np.float32(1.05) * ARRAYS["w"]}))
    after = read_checkpoint(path, bits=8, steps="held", held=first)
    assert after["w"].step == first["w"].step  # type: ignore[union-attr]
    assert read_checkpoint(path, bits=8)["w"].step != first["w"].step  # type: ignore[union-attr]
