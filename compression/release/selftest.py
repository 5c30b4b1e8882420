"""The self-test of a release: real inputs, recorded outputs, a stated tolerance; numpy only."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunecast.common.npz import NpzArchive, NpzError
from prunecast.compression.release import SelfTestFailed

__all__ = [
    "Arrays",
    "Tolerance",
    "check_outputs",
    "decided",
    "distances",
    "dtype_name",
    "pack_arrays",
    "same_values",
    "unpack_arrays",
]

Arrays = Mapping[str, NDArray[np.generic]]
_ROUNDING = 1e-5  # relative; float32 sums in another order stay well below
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Tolerance:
    """How far a device's outputs may lie from the recorded ones.

    A value passes when ``|actual - expected| <= atol + rtol * |expected|``. CPUs sum in different
    orders, so exact equality across devices cannot be asked for.

    Attributes:
        atol: absolute part, in units of the output.
        rtol: relative part.
        argmax: whether the class (argmax over the last axis) must be equal as well; recorded as
            true only where no class hangs on rounding, see `decided`.
    """

    atol: float
    rtol: float = 1e-3
    argmax: bool = True

    def __post_init__(self) -> None:
        for value in (self.atol, self.rtol):
            if not (math.isfinite(value) and value >= 0):
                raise SelfTestFailed(f"a tolerance must be finite and not negative, not {value}")


def dtype_name(array: NDArray[np.generic]) -> str:
    """numpy's name of an array's dtype; ``str`` for text of any length, also as objects.

    >>> dtype_name(np.array(["a", "bc"]))
    'str'
    """
    return "str" if array.dtype.kind in "UO" else str(array.dtype.name)


def pack_arrays(arrays: Arrays, *, level: int = 9) -> bytes:
    """An ``.npz`` archive with fixed timestamps: the same arrays give the same bytes.

    Args:
        arrays: by name.
        level: of zlib; 0 for what is written and read once.

    Raises:
        SelfTestFailed: a text ends in NUL, which numpy does not keep.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, array in arrays.items():
            member, values = io.BytesIO(), np.asarray(array)
            if dtype_name(values) == "str":
                values = values.astype(str)
                if not np.array_equal(values.astype(object), array):
                    raise SelfTestFailed(f"{name!r} holds a text that ends in NUL: leave that out")
            np.lib.format.write_array(member, values, allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, member.getvalue(), compresslevel=level)
    return out.getvalue()


def unpack_arrays(
    data: bytes, *, max_bytes: int | None = 256 * 2**20
) -> dict[str, NDArray[np.generic]]:
    """Read an ``.npz`` archive without pickle and without inflating more than `max_bytes`.

    Args:
        data: content of the archive.
        max_bytes: most bytes of all arrays together; by default what a device allows a release,
            None for what every reader allows, see `prunecast.common.bounds.byte_limit`.

    Raises:
        SelfTestFailed: no such archive, or larger than allowed.
    """
    try:
        return NpzArchive(data, max_bytes=max_bytes).read_all()
    except NpzError as error:
        raise SelfTestFailed(f"not a readable .npz archive of plain arrays: {error}") from error


def check_outputs(expected: Arrays, actual: Arrays, tolerance: Tolerance) -> float:
    """Compare outputs by name; returns the largest absolute difference.

    Raises:
        SelfTestFailed: an output is missing, has another shape, lies outside the tolerance, is
            not finite where a finite value was recorded, or decides for another class.
    """
    worst = 0.0
    for name, want in expected.items():
        got = actual.get(name)
        if got is None or got.shape != want.shape or dtype_name(got) != dtype_name(want):
            shape = "missing" if got is None else f"{dtype_name(got)}{list(got.shape)}"
            raise SelfTestFailed(
                f"self-test: output {name!r} is {shape}, expected "
                f"{dtype_name(want)}{list(want.shape)}"
            )
        if want.dtype.kind != "f":
            if not same_values(want, got):
                raise SelfTestFailed(f"self-test: output {name!r} differs from the recorded one")
            continue
        worst = max(worst, _check_floats(name, want, got, tolerance))
    return worst


def same_values(wanted: NDArray[np.generic], found: NDArray[np.generic]) -> bool:
    """Whether all values of two arrays of integers, booleans or texts are equal."""
    if dtype_name(wanted) == "str":  # as objects: one long text must not set the size of all
        wanted, found = wanted.astype(object), found.astype(object)
    return bool(np.array_equal(wanted, found))


def _check_floats(
    name: str, want: NDArray[np.generic], got: NDArray[np.generic], tolerance: Tolerance
) -> float:
    distance = distances(want, got)
    with np.errstate(invalid="ignore"):
        allowed = tolerance.atol + tolerance.rtol * np.abs(want.astype(np.float64))
        bad = (distance != 0) & ~(distance <= allowed)
    if bad.any():
        far = float(np.max(np.where(np.isnan(distance), np.inf, distance)))
        raise SelfTestFailed(
            f"self-test: {int(bad.sum())} of {bad.size} values of output {name!r} differ by up to "
            f"{far:.3g} (allowed: {tolerance.atol:.3g} + {tolerance.rtol:.3g} of the value)"
        )
    if tolerance.argmax and _has_classes(want):
        other = want.argmax(axis=-1) != got.argmax(axis=-1)
        if other.any():
            raise SelfTestFailed(
                f"self-test: output {name!r} decides for another class in {int(other.sum())} of "
                f"{other.size} cases"
            )
    return float(distance.max()) if distance.size else 0.0


def distances(wanted: NDArray[np.generic], found: NDArray[np.generic]) -> NDArray[np.float64]:
    """Absolute difference of each value, in float64; 0 where both are NaN or equally infinite."""
    a, b = wanted.astype(np.float64), found.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        return np.where(same, 0.0, np.abs(a - b))


def decided(outputs: Arrays, margin: float = 0.0) -> bool:
    """Whether no class in `outputs` hangs on rounding, so that `argmax` can be asked for.

    Args:
        outputs: by name.
        margin: how far the first class must lead, at least, in units of the outputs.
    """
    for values in outputs.values():
        if values.dtype.kind != "f" or not _has_classes(values):
            continue
        top = np.sort(values.astype(np.float64), axis=-1)
        lead = top[..., -1] - top[..., -2]
        least = np.maximum(margin, _ROUNDING * np.maximum(1.0, np.abs(top).max(axis=-1)))
        if not np.all(lead > least):
            return False
    return True


def _has_classes(values: NDArray[np.generic]) -> bool:
    return values.ndim >= 2 and values.shape[-1] > 1 and values.size > 0
