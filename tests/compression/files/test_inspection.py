"""What a file's tensors are like: by hand on small ones; sums agree with the files."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest

from prunecast.compression.files.archive import open_archive
from prunecast.compression.files.compressing import Lossy, compress_file
from prunecast.compression.files.formats import open_tensors
from prunecast.compression.files.inspection import entropy_bits, inspect_archive, inspect_tensors
from prunecast.compression.files.tensors import FileTensor
from support.checkpoints import every_kind


def tensor(values: object, dtype: str) -> FileTensor:
    return FileTensor(np.array(values, dtype), dtype)


def test_inspecting_a_checkpoint_costs_what_compressing_it_costs(
    checkpoint: Path, tmp_path: Path
) -> None:
    source = open_tensors(checkpoint)
    found = inspect_tensors(source)
    written = compress_file(source, tmp_path / "m.pcc")
    assert found.nbytes == written.nbytes == (tmp_path / "m.pcc").stat().st_size
    assert sum(found.sections.values()) == found.nbytes
    assert sum(t.nbytes for t in found.tensors.values()) + found.common == found.nbytes
    assert list(found.tensors) == list(source)
    assert {n: t.nbytes for n, t in found.tensors.items()} == {
        n: t.nbytes for n, t in written.tensors.items()
    }
    plain = [t.values.tobytes() for t in every_kind().values()]
    assert found.zlib == sum(len(zlib.compress(data, 6)) for data in plain)


@pytest.mark.parametrize("part_bytes", [1 << 25, 3000])
def test_inspecting_a_compressed_file(checkpoint: Path, tmp_path: Path, part_bytes: int) -> None:
    lossy = Lossy(error=0.05, kept=["specials", "bfloat16"])
    source = open_tensors(checkpoint)
    written = compress_file(source, tmp_path / "m.pcc", lossy=lossy, part_bytes=part_bytes)
    found = inspect_archive(open_archive(tmp_path / "m.pcc"))
    assert found.nbytes == written.nbytes
    assert found.parts == written.parts
    assert sum(found.sections.values()) == found.nbytes
    for name, t in written.tensors.items():
        assert found.tensors[name].nbytes == t.nbytes
        assert found.tensors[name].step == t.step
        assert found.tensors[name].spec == t.spec
        assert sum(found.tensors[name].sections.values()) == t.nbytes


def test_entropies_by_hand() -> None:
    assert entropy_bits(tensor([], "float32")) == 0
    assert entropy_bits(tensor([5, 5, 5], "int32")) == 0
    assert entropy_bits(tensor([0, 1, 2, 3], "int64")) == 2
    assert entropy_bits(tensor([-1, 1, 1, 1], "int8")) == pytest.approx(0.8113, abs=1e-4)
    assert entropy_bits(tensor([True, False], "bool")) == 1
    assert entropy_bits(tensor([300, 7], "uint16")) == 1
    # The exponents differ in one bit, which lies in the top byte once the sign is moved away.
    assert entropy_bits(tensor([1.0, 4.0], "float32")) == 1
    assert entropy_bits(tensor([1.0, -1.0], "float32")) == 1
    assert entropy_bits(tensor([1.0, -1.5], "float64")) == 2
    assert entropy_bits(FileTensor(np.uint16([0x3F80, 0xBF80]), "bfloat16")) == 1
    assert entropy_bits(FileTensor(np.uint8([1, 2]), "float8_e5m2")) == 1
    rng = np.random.default_rng(0)
    gauss = rng.normal(size=(100, 1000)).astype(np.float32)
    assert 25 < entropy_bits(FileTensor(gauss, "float32")) < 28


def test_zeros_of_every_kind(tmp_path: Path) -> None:
    from prunecast.compression.files.formats import write_tensors

    tensors = {
        "floats": tensor([0.0, -0.0, 1.0, np.nan], "float32"),
        "integers": tensor([0, 0, 0, -1], "int16"),
        "nothing": tensor([], "float32"),
        "brain": FileTensor(np.uint16([0, 0x8000, 1, 0x8001]), "bfloat16"),
        "eighth": FileTensor(np.uint8([0, 0x80, 1, 0x81]), "float8_e4m3fn"),
        "eighth uz": FileTensor(np.uint8([0, 0x80, 1, 0x81]), "float8_e4m3fnuz"),
        "exponents": FileTensor(np.uint8([0, 0]), "float8_e8m0fnu"),
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    found = inspect_tensors(open_tensors(tmp_path / "x.safetensors")).tensors
    zeros = {name: t.zeros for name, t in found.items()}
    assert zeros == {
        "floats": 0.5, "integers": 0.75, "nothing": 0, "brain": 0.5, "eighth": 0.5,
        "eighth uz": 0.25, "exponents": 0,
    }  # fmt: skip
