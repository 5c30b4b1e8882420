"""Archives of arrays: everything numpy writes is read, and no file makes more of itself."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunecast.common.npz import NpzArchive, NpzError, NpzTooLarge

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def header(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return b"\x93NUMPY\x01\x00" + out.getvalue().removeprefix(b"\x93NUMPY\x01\x00")


def archive(method: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return out.getvalue()


def patched(data: bytes, **fields: int) -> bytes:
    """An archive of one member whose central directory states other sizes."""
    at = data.rindex(b"PK\x01\x02")
    places = {"method": (10, "<H"), "stored": (20, "<I"), "size": (24, "<I"), "offset": (42, "<I")}
    out = bytearray(data)
    for name, value in fields.items():
        place, form = places[name]
        struct.pack_into(form, out, at + place, value)
    return bytes(out)


@contextmanager
def little_memory(most: int = 24 << 20) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_zipfile_is_read(method: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(70_000, 3)).astype(np.float32)
    arrays = {
        "a": values, "fortran": np.asfortranarray(values), "big": np.arange(5, dtype=">i4"),
        "scalar": np.array(2.5), "empty": np.zeros((0, 4)), "text": np.array(["ä", "bc"]),
    }  # fmt: skip
    members = {}
    for name, array in arrays.items():
        out = io.BytesIO()
        np.lib.format.write_array(out, array, allow_pickle=False)
        members[name] = out.getvalue()
    path = tmp_path / "x.npz"
    path.write_bytes(archive(method, **members))
    for source in (path, path.read_bytes()):
        opened = NpzArchive(source)
        assert list(opened.members) == list(arrays)
        for name, array in opened.read_all().items():
            assert array.dtype == arrays[name].dtype
            assert array.shape == arrays[name].shape == opened.members[name].shape
            assert np.array_equal(array, arrays[name])


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_member_of_gigabytes_is_refused_before_it_is_inflated(method: int) -> None:
    """And one that lies about its size gives no more than that."""
    size = 1 << 25
    data = archive(method, x=header((size,)) + bytes(size))
    assert len(data) < 1 << 17
    with little_memory():
        with pytest.raises(NpzTooLarge, match=r"more than 1,048,576 bytes.*--max-bytes"):
            NpzArchive(data, max_bytes=1 << 20)
        with pytest.raises(NpzError, match=r"'x' declares uint8\[33554432\] in a member of 1,000"):
            NpzArchive(patched(data, size=1000))
    short = archive(method, x=header((872,)) + bytes(size))
    with little_memory(), pytest.raises(NpzError, match="more than it states"):
        NpzArchive(patched(short, size=1000)).read("x")


def test_the_default_is_declared() -> None:
    data = archive(zipfile.ZIP_DEFLATED, x=header((1 << 31,)) + bytes(1 << 10))
    with pytest.raises(NpzTooLarge, match="more than 1,073,741,824 bytes"):
        NpzArchive(patched(data, size=(1 << 31) + 128))


def test_members_that_share_their_bytes_are_counted_each() -> None:
    one = archive(x=header((1 << 10,)) + bytes(1 << 10))
    entry = one[one.index(b"PK\x01\x02") : one.index(b"PK\x05\x06")]
    entries = b"".join(entry.replace(b"x.npy", b"%c.npy" % (97 + i)) for i in range(20))
    end = struct.pack(
        "<4s4H2IH", b"PK\x05\x06", 0, 0, 20, 20, len(entries), one.index(b"PK\x01\x02"), 0
    )
    data = one[: one.index(b"PK\x01\x02")] + entries + end
    with pytest.raises(NpzTooLarge):
        NpzArchive(data, max_bytes=10 << 10)


def test_headers_are_bounded() -> None:
    long = b"\x93NUMPY\x02\x00" + (1 << 30).to_bytes(4, "little") + b" " * (1 << 26)
    with little_memory(), pytest.raises(NpzError, match="a header of 1,073,741,824 bytes"):
        NpzArchive(archive(zipfile.ZIP_BZIP2, x=long))
    with pytest.raises(NpzError, match="declares"):
        NpzArchive(archive(x=header((1 << 50,)) + bytes(8)))
    for shape in ("(-1,)", "(((((1,),),),),)", "__import__('os')", "(" * 4000):
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
        with pytest.raises(NpzError):
            NpzArchive(archive(x=b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text))
    with pytest.raises(NpzError, match="without bytes"):
        NpzArchive(archive(x=header((1 << 40,), "|S0")))


def test_an_lzma_dictionary_counts() -> None:
    data = bytearray(archive(zipfile.ZIP_LZMA, x=header((1000,)) + bytes(1000)))
    at = data.index(b"\x05\x00", 30 + len("x.npy"))
    data[at + 3 : at + 7] = (0xFFFFFFF0).to_bytes(4, "little")
    with pytest.raises(NpzTooLarge, match="'x' needs an LZMA dictionary"):
        NpzArchive(bytes(data))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"offset": 1 << 20}, "damaged"),
        ({"stored": 500}, "cut off"),
        ({"stored": 10}, "expected .* got"),
        ({"method": 99}, r"compressed by method 99.*numpy\.savez"),
    ],
    ids=lambda given: str(given)[:20],
)
def test_lies_of_the_directory_are_our_errors(fields: dict[str, int], says: str) -> None:
    data = archive(x=header((1000,)) + bytes(1000))
    with pytest.raises(NpzError, match=says):
        NpzArchive(patched(data, **fields)).read("x")


def test_objects_are_refused_by_name_and_without_a_harmful_hint(tmp_path: Path) -> None:
    held: Any = np.array([{}, 1], dtype=object)
    np.savez(tmp_path / "x.npz", fine=np.arange(3), odd=held)
    with pytest.raises(NpzError, match=r"'odd' holds Python objects.*convert it") as told:
        NpzArchive(tmp_path / "x.npz")
    assert "allow_pickle" not in str(told.value)


def test_damage_is_noticed() -> None:
    data = bytearray(archive(x=header((1000,)) + bytes(1000)))
    data[500] ^= 1
    with pytest.raises(NpzError, match="checksum"):
        NpzArchive(bytes(data)).read("x")
    with pytest.raises(NpzError, match="No such file"):
        NpzArchive(Path("missing.npz"))


def test_the_directory_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read for each array, the directory of many would take time that grows with their square."""
    reads: list[object] = []

    class Counted(zipfile.ZipFile):
        def __init__(self, *args: Any, **options: Any) -> None:
            reads.append(args)
            super().__init__(*args, **options)

    data = archive(**{f"a{i}": header((1,)) + bytes([i]) for i in range(100)})
    monkeypatch.setattr(zipfile, "ZipFile", Counted)
    found = NpzArchive(data).read_all()
    assert [int(array[0]) for array in found.values()] == list(range(100))
    assert len(reads) == 1
