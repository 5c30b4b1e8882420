"""Compressed files: every bit comes back, and nothing else than a whole file is read."""

from __future__ import annotations

import tracemalloc
import zlib
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunecast.common.files import StorageError
from prunecast.compression.codec import Context, decode, encode, payload_length
from prunecast.compression.files import FilesError, FileTooLarge, UnreadableFile, UnsupportedTensor
from prunecast.compression.files.archive import describe_payloads, open_archive, plan_parts
from prunecast.compression.files.compressing import compress_file, restore_file
from prunecast.compression.files.formats import open_tensors
from prunecast.compression.files.tensors import FileTensor, TensorFile
from support.checkpoints import assert_same


def in_memory(tensors: dict[str, FileTensor], **options: Any) -> TensorFile:
    specs = {name: tensor.spec for name, tensor in tensors.items()}
    return TensorFile(Path("memory"), "npz", specs, tensors.__getitem__, **options)


def plain(**arrays: Any) -> dict[str, FileTensor]:
    made = {name: np.asarray(values) for name, values in arrays.items()}
    return {name: FileTensor(values, values.dtype.name) for name, values in made.items()}


def split(data: bytes) -> list[bytes]:
    parts = []
    while data:
        length = payload_length(data[:16])
        parts.append(data[:length])
        data = data[length:]
    return parts


@pytest.mark.parametrize("part_bytes", [1 << 25, 4000, 1])
def test_every_bit_comes_back(
    checkpoint: Path, kinds: dict[str, FileTensor], tmp_path: Path, part_bytes: int
) -> None:
    source = open_tensors(checkpoint)
    result = compress_file(source, tmp_path / "m.pcc", part_bytes=part_bytes)
    assert not result.lossy
    assert result.nbytes == (tmp_path / "m.pcc").stat().st_size
    assert sum(t.nbytes for t in result.tensors.values()) + result.common == result.nbytes
    assert (result.parts > 1) == (part_bytes < 1 << 25)
    archive = open_archive(tmp_path / "m.pcc")
    assert list(archive) == list(source)
    assert archive.metadata == source.metadata
    for name in reversed(list(source)):
        assert archive.specs[name] == kinds[name].spec
        assert_same(archive[name], kinds[name])
    restore_file(archive, tmp_path / "back.safetensors")
    back = open_tensors(tmp_path / "back.safetensors")
    assert back.metadata == source.metadata
    for name in source:
        assert_same(back[name], kinds[name])


def test_a_plain_payload_is_a_compressed_file(tmp_path: Path) -> None:
    arrays = {"a": np.arange(5), "b": np.float32([[1.5]])}
    path = tmp_path / "x.pcc"
    path.write_bytes(encode(arrays))
    archive = open_archive(path)
    assert {n: t.dtype for n, t in archive.items()} == {"a": "int64", "b": "float32"}
    compress_file(in_memory(plain(**arrays)), tmp_path / "y.pcc")
    assert (tmp_path / "y.pcc").read_bytes() == path.read_bytes()


def test_every_part_can_be_read_with_the_codec_alone(tmp_path: Path) -> None:
    tensors = plain(a=np.arange(600), b=np.arange(600) * 2, c=np.float32([1, 2]))
    compress_file(in_memory(tensors), tmp_path / "x.pcc", part_bytes=5000)
    parts = [decode(payload) for payload in split((tmp_path / "x.pcc").read_bytes())]
    assert [sorted(p) for p in parts] == [["a", "prunecast:part"], ["b", "c", "prunecast:part"]]
    assert [p["prunecast:part"].tolist() for p in parts] == [[0, 2], [1, 2]]
    assert (parts[1]["b"] == tensors["b"].values).all()


def test_parts_hold_neighbours_up_to_a_size() -> None:
    specs = {n: t.spec for n, t in plain(a=np.zeros(10), b=np.zeros(20), c=np.zeros(9)).items()}
    assert plan_parts(specs, 200) == [["a"], ["b"], ["c"]]
    assert plan_parts(specs, 240) == [["a", "b"], ["c"]]
    assert plan_parts(specs, 1) == [["a"], ["b"], ["c"]]
    assert plan_parts({}, 1) == [[]]
    bits = {"x": plain(x=np.zeros(100, np.bool_))["x"].spec}
    assert plan_parts({**bits, "y": bits["x"]}, 400) == [["x"], ["y"]]  # four bytes an element
    many = {str(i): bits["x"] for i in range(40_000)}
    assert max(map(len, plan_parts(many))) == 1 << 14


def test_no_tensors_at_all(tmp_path: Path) -> None:
    compress_file(in_memory({}), tmp_path / "x.pcc")
    archive = open_archive(tmp_path / "x.pcc")
    assert len(archive) == 0
    restore_file(archive, tmp_path / "x.npz")
    assert len(open_tensors(tmp_path / "x.npz")) == 0


@cache
def three_parts() -> bytes:
    tensors = plain(a=np.arange(600), b=np.arange(600) * 3, c=np.arange(600) * 7)
    steps = {"big": FileTensor(np.arange(600, dtype=np.uint16), "bfloat16")}
    source = in_memory({**tensors, **steps}, metadata={"k": "v"})
    with TemporaryDirectory() as folder:
        compress_file(source, Path(folder) / "x.pcc", part_bytes=8000)
        return (Path(folder) / "x.pcc").read_bytes()


@pytest.mark.parametrize(
    "order",
    [(0,), (0, 1), (1, 2), (0, 2, 1), (0, 1, 1), (0, 1, 2, 2), (0, 0, 0), (0, 1, 2, 0)],
    ids=str,
)
def test_only_all_parts_in_order_are_a_file(tmp_path: Path, order: tuple[int, ...]) -> None:
    parts = split(three_parts())
    assert len(parts) == 3
    path = tmp_path / "x.pcc"
    path.write_bytes(b"".join(parts[i] for i in order))
    with pytest.raises(UnreadableFile, match=r"cut off|parts are not those of one file"):
        open_archive(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = three_parts()
    ends = np.cumsum([len(p) for p in split(data)])[:-1].tolist()
    path = tmp_path / "x.pcc"
    for cut in {*range(0, len(data), 37), *range(30), *ends, len(data) - 1}:
        path.write_bytes(data[:cut])
        with pytest.raises(UnreadableFile, match=r"x\.pcc"):
            open_archive(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(UnreadableFile, match="not a compressed file"):
        open_archive(path)


def test_what_is_not_there_or_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="No such file"):
        open_archive(tmp_path / "x.pcc")
    (tmp_path / "x.pcc").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(UnreadableFile, match="not a payload of this codec"):
        open_archive(tmp_path / "x.pcc")
    (tmp_path / "x.pcc").write_bytes(b"")
    with pytest.raises(UnreadableFile, match="empty"):
        open_archive(tmp_path / "x.pcc")


def test_a_payload_with_a_context_says_which(tmp_path: Path) -> None:
    q = np.arange(50).reshape(5, 10)
    path = tmp_path / "x.pcc"
    path.write_bytes(encode({"q": q}, context=Context(previous={"q": q})))
    with pytest.raises(UnreadableFile, match="coded with previous as context"):
        open_archive(path)
    (said,) = describe_payloads(path)
    assert said.needs == ("previous",)


Q = np.arange(6, dtype=np.int32).reshape(2, 3)
STEP = np.float32([0.5])
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "unknown note": ({"prunecast:future": Q}, "not known to this release"),
    "unknown coding": ({"q": Q, "prunecast:codings": np.uint8([99])}, "coding 99, unknown"),
    "too few codings": ({"q": Q, "r": Q, "prunecast:codings": np.uint8([0])}, "codings"),
    "codings of another dtype": ({"q": Q, "prunecast:codings": np.int8([0])}, "uint8"),
    "no steps": ({"q": Q, "prunecast:codings": np.uint8([2])}, "steps' is missing"),
    "steps for none": ({"q": Q, "prunecast:steps": STEP}, "not 0 values"),
    "two steps for one": (
        {"q": Q, "prunecast:codings": np.uint8([2]), "prunecast:steps": np.float32([1, 2])},
        "not 1 values",
    ),
    "part of another shape": ({"q": Q, "prunecast:part": np.arange(3)}, "2 values of int64"),
    "part beyond": ({"q": Q, "prunecast:part": np.array([0, 5])}, "1 of 5 parts"),
    "negative count": ({"q": Q, "prunecast:part": np.array([0, -1])}, "1 of -1 parts"),
    "metadata no text": ({"prunecast:metadata": Q}, "no text"),
    "metadata no JSON": ({"prunecast:metadata": np.frombuffer(b"{", "u1")}, "no JSON"),
    "metadata deep": ({"prunecast:metadata": np.full(200_000, ord("["), "u1")}, "no JSON"),
    "metadata a list": ({"prunecast:metadata": np.frombuffer(b"[1]", "u1")}, "object of strings"),
    "metadata numbers": (
        {"prunecast:metadata": np.frombuffer(b'{"a":1}', "u1")},
        "object of strings",
    ),
    "escaped twin": ({"prunecast:=a": Q, "a": Q}, "'a' appears twice"),
}
for bad in (0.0, -1.0, np.nan, np.inf):
    notes = {"prunecast:codings": np.uint8([2]), "prunecast:steps": np.float32([bad])}
    HOSTILE[f"step {bad}"] = ({"q": Q, **notes}, "lattice step")
for code, array in ((2, Q.astype(np.int64)), (16, Q), (17, Q.astype(np.uint8))):
    notes = {"prunecast:codings": np.uint8([code]), "prunecast:steps": STEP[: code == 2]}
    if code != 2:
        del notes["prunecast:steps"]
    HOSTILE[f"coding {code} of {array.dtype}"] = ({"q": array, **notes}, "is held as")


@pytest.mark.parametrize("name", HOSTILE)
def test_notes_that_contradict_the_tensors_are_refused(tmp_path: Path, name: str) -> None:
    arrays, message = HOSTILE[name]
    path = tmp_path / "x.pcc"
    path.write_bytes(encode(arrays))
    with pytest.raises(UnreadableFile, match=message):
        open_archive(path)


def test_a_huge_claim_is_refused_before_allocating(tmp_path: Path) -> None:
    path = tmp_path / "x.pcc"
    path.write_bytes(encode({"zeros": np.zeros((1 << 13, 1 << 13), np.int8)}))
    assert path.stat().st_size < 100
    tracemalloc.start()
    try:
        with pytest.raises(FileTooLarge, match="--max-bytes"):
            open_archive(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    archive = open_archive(path, max_bytes=1 << 28)
    assert not archive["zeros"].values.any()
    with pytest.raises(FileTooLarge):
        open_archive(path, max_bytes=1 << 25)


def test_many_small_claims_are_summed(tmp_path: Path) -> None:
    """Parts that each stay below the codec's limits, together far above the file's."""
    path = tmp_path / "x.pcc"
    zeros = np.zeros(1 << 22, np.int8)
    path.write_bytes(
        b"".join(encode({f"z{i}": zeros, "prunecast:part": np.array([i, 40])}) for i in range(40))
    )
    assert open_archive(path, max_bytes=1 << 28).nbytes == 40 << 22
    with pytest.raises(FileTooLarge, match="more than 67,108,864 bytes"):
        open_archive(path, max_bytes=1 << 26)


def test_only_one_part_is_in_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = plain(**{f"w{i}": rng.integers(0, 1 << 60, 40_000) for i in range(12)})
    compress_file(in_memory(tensors), tmp_path / "x.pcc", part_bytes=1)
    total = (tmp_path / "x.pcc").stat().st_size
    tracemalloc.start()
    try:
        archive = open_archive(tmp_path / "x.pcc")
        assert tracemalloc.get_traced_memory()[0] < total / 3
    finally:
        tracemalloc.stop()
    for name in ("w3", "w0", "w11", "w0"):
        assert_same(archive[name], tensors[name])


def test_what_a_reader_would_refuse_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "x.pcc"
    for tensors in ({"n" * 70_000: plain(a=1)["a"]}, plain(a=np.zeros((1,) * 33))):
        with pytest.raises(UnsupportedTensor, match="dimensions"):
            compress_file(in_memory(tensors), path)
    with pytest.raises(UnsupportedTensor, match="metadata"):
        compress_file(in_memory({}, metadata={"k": "v" * (1 << 24)}), path)
    assert list(tmp_path.iterdir()) == []
    long = "n" * 60_000
    compress_file(in_memory({long: plain(a=1)["a"]}), path)
    assert list(open_archive(path)) == [long]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    def broken(name: str) -> FileTensor:
        raise UnreadableFile("the disk is gone")

    path = tmp_path / "x.pcc"
    path.write_bytes(b"old")
    source = replace_load(in_memory(plain(a=np.arange(9))), broken)
    with pytest.raises(UnreadableFile, match="gone"):
        compress_file(source, path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pcc"]
    assert path.read_bytes() == b"old"
    with pytest.raises(StorageError, match="cannot write"):
        compress_file(in_memory({}), path / "below.pcc")


def replace_load(source: TensorFile, load: Any) -> TensorFile:
    return TensorFile(source.path, source.kind, source.specs, load)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_mutated_files(data: st.DataObject, tmp_path: Path) -> None:
    """With the checksums set right, so that what lies behind them is reached."""
    parts = split(three_parts())
    number = data.draw(st.integers(0, len(parts) - 1))
    mutated = bytearray(parts[number])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(9, len(mutated) - 5) | st.integers(9, 80))
        mutated[at] = data.draw(st.integers(0, 255))
    parts[number] = bytes(mutated[:-4]) + zlib.crc32(mutated[:-4]).to_bytes(4, "little")
    path = tmp_path / "x.pcc"
    path.write_bytes(b"".join(parts))
    try:
        archive = open_archive(path)
    except FilesError:
        return
    for name in archive:
        try:
            tensor = archive[name]
        except FilesError:
            continue
        assert tensor.spec == archive.specs[name]


def test_progress_ends_at_the_whole(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = open_tensors(checkpoint)
    compress_file(
        source, tmp_path / "m.pcc", part_bytes=3000, on_progress=lambda d, t, w: seen.append((d, t))
    )
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert seen[-1] == (source.nbytes, source.nbytes)


def test_written_files_have_the_users_permissions(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    compress_file(open_tensors(checkpoint), tmp_path / "m.pcc")
    archive = open_archive(tmp_path / "m.pcc")
    restore_file(archive, tmp_path / "m.safetensors")
    assert (tmp_path / "m.pcc").stat().st_mode == usual
    assert (tmp_path / "m.safetensors").stat().st_mode == usual


def test_vectors_are_read_as_written() -> None:
    """Files that earlier releases wrote; see make_vectors.py."""
    folder = Path(__file__).parent / "vectors"
    archive = open_archive(folder / "every_kind.pcc")
    expected = open_tensors(folder / "every_kind.safetensors")
    assert archive.metadata == expected.metadata
    assert len(archive.places) == 3
    assert set(archive.steps) == {"weight", "half", "double", "brain"}
    assert set(archive) == set(expected)
    for name in expected:
        assert_same(archive[name], expected[name])
