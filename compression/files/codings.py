"""How a tensor lies in a payload: as it is, as bits, or on a lattice. See ``docs/files.md``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import dequantise, quantise
from prunecast.compression.files.tensors import FOREIGN, FileTensor

__all__ = [
    "BITS",
    "HELD",
    "LATTICE",
    "PLAIN",
    "Coded",
    "keep",
    "lattice_coding",
    "put_on_lattice",
    "restore",
]

# The number of each coding in a file.
PLAIN = 0
LATTICE = {1: "float16", 2: "float32", 3: "float64", 4: "bfloat16"}
BITS = {
    16: "bfloat16", 17: "float8_e4m3fn", 18: "float8_e4m3fnuz", 19: "float8_e5m2",
    20: "float8_e5m2fnuz", 21: "float8_e8m0fnu",
}  # fmt: skip
HELD = {name: "float16" if name == "bfloat16" else "int8" for name in BITS.values()}


@dataclass(frozen=True, eq=False)
class Coded:
    """A tensor as a payload holds it.

    Attributes:
        values: the array in the payload.
        coding: number of its coding.
        step: lattice step, of a quantised tensor.
    """

    values: NDArray[Any]
    coding: int = PLAIN
    step: float = 0.0


def keep(tensor: FileTensor) -> Coded:
    """Code a tensor losslessly."""
    for number, dtype in BITS.items():
        if tensor.dtype == dtype:
            return Coded(_hold(tensor.values, dtype), number)
    return Coded(tensor.values)


def _hold(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Bits of a dtype that numpy lacks, as numbers whose coding follows their magnitude.

    bfloat16 as float16: the codec splits floats into bytes with the sign moved last, which leaves
    the exponent of bfloat16 in a byte of its own. float8 as sign and magnitude, minus zero as
    -128; the exponents of e8m0 less 128.
    """
    if dtype == "bfloat16":
        return bits.view(np.float16)
    if dtype == "float8_e8m0fnu":
        return (bits ^ np.uint8(128)).view(np.int8)
    magnitude = (bits & np.uint8(127)).view(np.int8)
    negative = np.where(magnitude == 0, np.int8(-128), -magnitude)
    return np.asarray(np.where(bits > 127, negative, magnitude), np.int8)


def _release(held: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Inverse of `_hold`."""
    if dtype == "bfloat16":
        return held.view(np.uint16)
    bits = held.view(np.uint8)
    if dtype == "float8_e8m0fnu":
        return bits ^ np.uint8(128)
    # -128 is its own negative, which is the pattern of minus zero.
    return np.asarray(np.where(held < 0, np.negative(bits) | np.uint8(128), bits), np.uint8)


def put_on_lattice(
    tensor: FileTensor, step: float, *, dead_zone: float = 0.5, name: str = ""
) -> Coded:
    """Quantise a floating tensor.

    Raises:
        QuantiseError: a value is not finite, or the step does not fit.
    """
    q = quantise(tensor.real(), step, dead_zone=dead_zone, name=name)
    return Coded(q, lattice_coding(tensor.dtype), step)


def lattice_coding(dtype: str) -> int:
    """Number of the coding that puts a floating dtype on a lattice."""
    return next(number for number, known in LATTICE.items() if known == dtype)


def restore(coded: Coded) -> FileTensor:
    """Inverse of `keep`; of `put_on_lattice`, but for what rounding lost."""
    if coded.coding in LATTICE:
        dtype = LATTICE[coded.coding]
        real = dequantise(coded.values, coded.step, "float32" if dtype in FOREIGN else dtype)
        return FileTensor.rounded(real, dtype)
    if coded.coding in BITS:
        dtype = BITS[coded.coding]
        return FileTensor(_release(coded.values, dtype), dtype)
    return FileTensor(coded.values, coded.values.dtype.name)
