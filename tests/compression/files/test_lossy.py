"""Quantised files: as close, or as small, as was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunecast.compression.codec import QuantiseError, dequantise, quantise
from prunecast.compression.files import FilesError, UnsupportedTensor
from prunecast.compression.files.archive import open_archive
from prunecast.compression.files.compressing import Lossy, compress_file
from prunecast.compression.files.tensors import FileTensor, TensorFile
from support.checkpoints import assert_same


def network(dtype: str = "float32", seed: int = 1) -> TensorFile:
    """Two layers whose scales lie far apart, with biases, statistics and a counter."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int, scale: float = 1.0) -> FileTensor:
        return FileTensor.rounded((rng.laplace(size=shape) * scale).astype(np.float32), dtype)

    tensors = {
        "1.weight": draw(120, 200, scale=0.05),
        "1.bias": draw(120, scale=0.01),
        "norm.weight": draw(120),
        "norm.running_mean": draw(120),
        "norm.running_var": draw(120),
        "norm.num_batches_tracked": FileTensor(np.array(77), "int64"),
        "2.weight": draw(300, 120, scale=2.0),
        "2.bias": draw(10),
        "pruned": draw(100, 100),
        "zeros": FileTensor.rounded(np.zeros((20, 20), np.float32), dtype),
    }
    kept = rng.random((100, 100)) < 0.1
    tensors["pruned"] = FileTensor(tensors["pruned"].values * kept, dtype)
    return in_memory(tensors)


def in_memory(tensors: dict[str, FileTensor]) -> TensorFile:
    specs = {name: tensor.spec for name, tensor in tensors.items()}
    return TensorFile(Path("memory"), "npz", specs, tensors.__getitem__)


QUANTISED = {"1.weight", "1.bias", "norm.weight", "2.weight", "pruned", "zeros"}


def wide(tensor: FileTensor) -> np.ndarray:
    return tensor.real().astype(np.float64)


def error_of(original: FileTensor, restored: FileTensor) -> float:
    energy = float((wide(original) ** 2).sum())
    return float(np.sqrt(((wide(original) - wide(restored)) ** 2).sum() / energy)) if energy else 0


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("wanted", [0.3, 0.02, 0.001])
def test_every_tensor_meets_the_error(tmp_path: Path, dtype: str, wanted: float) -> None:
    source = network(dtype)
    result = compress_file(source, tmp_path / "x.pcc", lossy=Lossy(error=wanted))
    archive = open_archive(tmp_path / "x.pcc")
    assert set(archive.steps) == QUANTISED
    for name, tensor in source.items():
        restored = archive[name]
        assert restored.spec == tensor.spec
        if name not in QUANTISED:
            assert_same(restored, tensor)
            assert result.tensors[name].error is None
            continue
        error = error_of(tensor, restored)
        assert error <= wanted
        assert result.tensors[name].error == pytest.approx(error, rel=1e-6)
        if tensor.values.ndim > 1 and tensor.values.any() and wanted > 0.01:
            assert error > 0.95 * wanted
    assert result.lossy


def test_restored_values_lie_on_the_lattice(tmp_path: Path) -> None:
    source = network()
    compress_file(source, tmp_path / "x.pcc", lossy=Lossy(step=0.03, dead_zone=0.6))
    archive = open_archive(tmp_path / "x.pcc")
    step = float(np.float32(0.03))
    assert set(archive.steps.values()) == {step}
    for name in QUANTISED:
        q = quantise(source[name].values, step, dead_zone=0.6)
        assert archive[name].values.tobytes() == dequantise(q, step).tobytes()


@pytest.mark.parametrize("bits", [4.0, 2.0, 0.8])
@pytest.mark.parametrize("part_bytes", [1 << 25, 60_000])
@pytest.mark.parametrize("common", [False, True])
def test_the_whole_file_meets_the_rate(
    tmp_path: Path, bits: float, part_bytes: int, common: bool
) -> None:
    source = network()
    lossy = Lossy(bits=bits, common=common)
    compress_file(source, tmp_path / "x.pcc", lossy=lossy, part_bytes=part_bytes)
    size = (tmp_path / "x.pcc").stat().st_size
    assert abs(size * 8 / source.size / bits - 1) <= 0.02 + 1e-9
    steps = open_archive(tmp_path / "x.pcc").steps
    assert (len(set(steps.values())) == 1) == common


def test_steps_follow_the_spread_and_vectors_are_finer(tmp_path: Path) -> None:
    source = network()
    compress_file(source, tmp_path / "x.pcc", lossy=Lossy(bits=2))
    steps = open_archive(tmp_path / "x.pcc").steps
    spreads = {name: float(wide(source[name]).std()) for name in steps}
    units = {name: steps[name] / spreads[name] for name in steps if spreads[name]}
    assert units["1.weight"] == pytest.approx(units["2.weight"], rel=1e-5)
    assert units["1.bias"] == pytest.approx(units["1.weight"] / 4, rel=1e-5)


def test_one_step_for_an_error_over_all(tmp_path: Path) -> None:
    source = network()
    compress_file(source, tmp_path / "x.pcc", lossy=Lossy(error=0.05, common=True))
    archive = open_archive(tmp_path / "x.pcc")
    assert len(set(archive.steps.values())) == 1
    energy = sum(float((wide(source[n]) ** 2).sum()) for n in QUANTISED)
    lost = sum(float(((wide(source[n]) - wide(archive[n])) ** 2).sum()) for n in QUANTISED)
    assert 0.0495 <= np.sqrt(lost / energy) <= 0.05


def test_patterns_keep_tensors(tmp_path: Path) -> None:
    source = network()
    compress_file(source, tmp_path / "x.pcc", lossy=Lossy(step=0.1, kept=["1.*", "?eros"]))
    archive = open_archive(tmp_path / "x.pcc")
    assert set(archive.steps) == QUANTISED - {"1.weight", "1.bias", "zeros"}
    assert_same(archive["1.weight"], source["1.weight"])


@pytest.mark.parametrize("lossy", [Lossy(step=1), Lossy(error=0.1), Lossy(bits=2)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_name_the_remedy(
    tmp_path: Path, lossy: Lossy, bad: float
) -> None:
    values = np.arange(20, dtype=np.float32)
    values[7] = bad
    source = in_memory({"w": FileTensor(values, "float32")})
    with pytest.raises(UnsupportedTensor, match=r"'w' holds NaN or an infinity.*--keep 'w'"):
        compress_file(source, tmp_path / "x.pcc", lossy=lossy)
    assert list(tmp_path.iterdir()) == []
    kept = Lossy(step=lossy.step or 1, kept=["w"])
    compress_file(source, tmp_path / "x.pcc", lossy=kept)
    assert_same(open_archive(tmp_path / "x.pcc")["w"], source["w"])


def test_what_cannot_be_had_is_said(tmp_path: Path) -> None:
    source = network("float64")
    with pytest.raises(QuantiseError, match=r"no step leaves a relative error of 1e-12"):
        compress_file(source, tmp_path / "x.pcc", lossy=Lossy(error=1e-12))
    with pytest.raises(QuantiseError, match=r"payload still takes \d+ bytes"):
        compress_file(source, tmp_path / "x.pcc", lossy=Lossy(bits=0.001))
    with pytest.raises(QuantiseError, match="use a larger step"):
        compress_file(network(), tmp_path / "x.pcc", lossy=Lossy(step=1e-12))
    for wrong in ({}, {"step": 1.0, "bits": 1.0}, {"step": 0.0}, {"bits": np.inf}):
        with pytest.raises(FilesError):
            Lossy(**wrong)


def test_without_floats_there_is_nothing_to_lose(tmp_path: Path) -> None:
    source = in_memory({"ids": FileTensor(np.arange(99), "int64")})
    for options in ({"error": 0.1}, {"step": 1.0}):
        result = compress_file(source, tmp_path / "x.pcc", lossy=Lossy(**options))
        assert not result.lossy
        assert_same(open_archive(tmp_path / "x.pcc")["ids"], source["ids"])
    with pytest.raises(UnsupportedTensor, match="no floats"):
        compress_file(source, tmp_path / "x.pcc", lossy=Lossy(bits=2))


def test_a_name_with_brackets_can_be_kept(tmp_path: Path) -> None:
    source = in_memory({"w[0]": FileTensor(np.arange(20, dtype=np.float32), "float32")})
    compress_file(source, tmp_path / "x.pcc", lossy=Lossy(step=3, kept=["w[0]"]))
    assert_same(open_archive(tmp_path / "x.pcc")["w[0]"], source["w[0]"])


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1))
def test_bfloat16_rounds_to_nearest_even(bits: int) -> None:
    value = np.array([bits], np.uint32).view(np.float32)
    if not np.isfinite(value[0]):
        return
    import ml_dtypes

    rounded = FileTensor.rounded(value, "bfloat16")
    assert rounded.values.tobytes() == value.astype(ml_dtypes.bfloat16).tobytes()
    back: Any = rounded.real()
    assert back.tobytes() == value.astype(ml_dtypes.bfloat16).astype(np.float32).tobytes()
