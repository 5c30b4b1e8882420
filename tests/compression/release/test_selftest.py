from __future__ import annotations

import io
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from prunecast.compression.release import SelfTestFailed
from prunecast.compression.release.selftest import (
    Tolerance,
    check_outputs,
    decided,
    pack_arrays,
    unpack_arrays,
)

EXPECTED = {"output": np.array([[0.0, 1.0, 3.0], [2.0, 1.99999, 0.0]], np.float32)}
TOLERANCE = Tolerance(atol=1e-3, rtol=0.0)


def test_arrays_survive_the_archive_and_its_bytes_are_fixed() -> None:
    arrays = {"x": np.arange(6, dtype=np.int64).reshape(2, 3), "y": np.float32(3.5)}
    data = pack_arrays(arrays)
    again = unpack_arrays(data)
    assert pack_arrays(again) == data
    assert again["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert np.load(io.BytesIO(data))["y"] == 3.5


def test_archives_with_objects_or_bombs_are_refused() -> None:
    out = io.BytesIO()
    np.savez(out, x=np.array([object()], dtype=object))
    with pytest.raises(SelfTestFailed, match="plain arrays"):
        unpack_arrays(out.getvalue())
    with pytest.raises(SelfTestFailed, match="inflates"):
        unpack_arrays(pack_arrays({"x": np.zeros(10**6)}), max_bytes=10**6)
    with pytest.raises(SelfTestFailed):
        unpack_arrays(b"not a zip")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY broken")
    with pytest.raises(SelfTestFailed):
        unpack_arrays(out.getvalue())
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)}
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("x.npy", header.getvalue())
    with pytest.raises(SelfTestFailed, match="declares"):
        unpack_arrays(out.getvalue())
    damaged = bytearray(pack_arrays({"x": np.arange(500)}))
    damaged[80] ^= 0xFF
    with pytest.raises(SelfTestFailed):
        unpack_arrays(bytes(damaged))


def test_values_within_the_tolerance_pass_and_the_distance_is_reported() -> None:
    actual = {"output": EXPECTED["output"] + np.float32(5e-4)}
    assert check_outputs(EXPECTED, actual, TOLERANCE) == pytest.approx(5e-4, rel=1e-2)


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        ({}, "missing"),
        ({"output": EXPECTED["output"].astype(np.float64)}, "float64"),
        ({"output": EXPECTED["output"][:1]}, r"\[1, 3\]"),
        ({"output": EXPECTED["output"] + np.float32(2e-3)}, "6 of 6 values"),
        ({"output": np.full((2, 3), np.nan, np.float32)}, "differ"),
    ],
)
def test_outputs_that_differ_fail(actual: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(SelfTestFailed, match=message):
        check_outputs(EXPECTED, actual, TOLERANCE)


def test_another_class_fails_even_within_the_tolerance() -> None:
    loose = Tolerance(atol=1.5, rtol=0.0)
    swapped = {"output": np.array([[0.0, 2.2, 2.1], [2.0, 1.9, 0.0]], np.float32)}
    with pytest.raises(SelfTestFailed, match="another class in 1 of 2"):
        check_outputs(EXPECTED, swapped, loose)
    assert check_outputs(EXPECTED, swapped, replace(loose, argmax=False)) == pytest.approx(1.2)


def test_a_class_that_hangs_on_rounding_is_recognised() -> None:
    assert decided({"output": EXPECTED["output"][:1]})
    assert not decided({"output": np.array([[1.0, 1.000001]], np.float32)})
    assert decided({"n": np.array([[1, 1]]), "scores": np.array([0.0, 0.0], np.float32)})


def test_integers_must_be_equal_and_nan_may_match_nan() -> None:
    with pytest.raises(SelfTestFailed, match="differs"):
        check_outputs({"n": np.array([1, 2])}, {"n": np.array([1, 3])}, TOLERANCE)
    same = {"output": np.array([np.nan, np.inf], np.float32)}
    assert check_outputs(same, same, TOLERANCE) == 0.0


def test_tolerances_are_finite() -> None:
    with pytest.raises(SelfTestFailed, match="finite"):
        Tolerance(atol=float("nan"))
