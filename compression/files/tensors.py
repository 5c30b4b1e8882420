"""Tensors as files hold them: numpy's dtypes, and the small floats that numpy lacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FOREIGN",
    "MOST_DIMENSIONS",
    "NATIVE",
    "FileSpec",
    "FileTensor",
    "TensorFile",
    "raw_dtype",
]

NATIVE = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64",
)  # fmt: skip
FOREIGN: Mapping[str, str] = {
    "bfloat16": "uint16",
    "float8_e4m3fn": "uint8",
    "float8_e4m3fnuz": "uint8",
    "float8_e5m2": "uint8",
    "float8_e5m2fnuz": "uint8",
    "float8_e8m0fnu": "uint8",
}
"""Dtypes that numpy lacks, and the integers that hold their bits."""
MOST_DIMENSIONS = 32
"""Of a tensor, in the codec's format."""


def raw_dtype(dtype: str) -> np.dtype[Any]:
    """Return the numpy dtype that holds a dtype's values or bits, little-endian."""
    return np.dtype(FOREIGN.get(dtype, dtype)).newbyteorder("<")


@dataclass(frozen=True)
class FileSpec:
    """dtype (by name) and shape of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the plain tensor."""
        return self.size * raw_dtype(self.dtype).itemsize

    @property
    def floating(self) -> bool:
        """Whether it can be put on a lattice: a float of at least 16 bits."""
        return self.dtype in ("float16", "float32", "float64", "bfloat16")


@dataclass(frozen=True, eq=False)
class FileTensor:
    """A tensor of a file.

    Attributes:
        values: the values; for a dtype that numpy lacks, their bits as unsigned integers.
        dtype: name of the dtype.
    """

    values: NDArray[Any]
    dtype: str

    @property
    def spec(self) -> FileSpec:
        """dtype and shape."""
        return FileSpec(self.dtype, self.values.shape)

    def real(self) -> NDArray[Any]:
        """The values of a floating tensor as numpy computes with them; bfloat16 as float32."""
        if self.dtype == "bfloat16":
            return (self.values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return self.values

    @classmethod
    def rounded(cls, real: NDArray[Any], dtype: str) -> FileTensor:
        """Return finite float32 values as bfloat16 (to nearest, halves to even) or as they are."""
        if dtype != "bfloat16":
            return cls(real.astype(dtype, copy=False), dtype)
        bits = np.asarray(real, np.float32).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        return cls(((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16), dtype)


class TensorFile(Mapping[str, FileTensor]):
    """Named tensors of a file, read one at a time.

    Attributes:
        path: the file.
        kind: ``safetensors``, ``npz``, ``onnx`` or ``pcc``.
        specs: name to dtype and shape, in the file's order.
        metadata: texts that travel with the tensors.
        graph: of an ``.onnx`` file, the model without the tensors, serialised; None of others.
        offsets: of tensors that lie in the file as `raw_dtype` has them, the byte where they begin.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        specs: Mapping[str, FileSpec],
        load: Callable[[str], FileTensor],
        *,
        metadata: Mapping[str, str] | None = None,
        graph: bytes | None = None,
        offsets: Mapping[str, int] | None = None,
    ) -> None:
        self.path, self.kind, self.specs = path, kind, dict(specs)
        self.metadata, self.graph = dict(metadata or {}), graph
        self.offsets = dict(offsets or {})
        self._load = load

    def __getitem__(self, name: str) -> FileTensor:
        if name not in self.specs:
            raise KeyError(name)
        return self._load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def size(self) -> int:
        """Number of elements of all tensors."""
        return sum(spec.size for spec in self.specs.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the file's own structure."""
        return sum(spec.nbytes for spec in self.specs.values())
