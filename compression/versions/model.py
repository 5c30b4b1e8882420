"""The published model: integers on a lattice, steps, mask, digest."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import TensorSpec, dequantise
from prunecast.compression.versions.errors import InvalidModel

__all__ = ["LatticeTensor", "PublishedModel", "RawTensor", "Tensor", "narrowest", "refine"]

_FLOATS = ("float16", "float32", "float64")
_INT32 = np.iinfo(np.int32)


def _frozen(array: NDArray[np.generic]) -> bool:
    """Whether nobody can write to the array through numpy, nor to what it is a view of."""
    owner: object = array
    while isinstance(owner, np.ndarray):
        if owner.flags.writeable:
            return False
        owner = owner.base
    return True


def narrowest(q: NDArray[np.integer]) -> NDArray[np.signedinteger]:
    """The same integers in the narrowest of int8, int16, int32 that holds them all.

    A copy, unless they are so already in an array that is read-only (a mapped file, for one).

    Raises:
        InvalidModel: a value lies outside int32.
    """
    low, high = (int(q.min()), int(q.max())) if q.size else (0, 0)
    for dtype in (np.int8, np.int16, np.int32):
        info = np.iinfo(dtype)
        if info.min <= low and high <= info.max:
            return np.array(q, dtype=dtype, order="C", copy=None if _frozen(q) else True)
    raise InvalidModel(f"lattice integers reach [{low}, {high}], beyond int32: use a larger step")


def refine(q: NDArray[np.integer], old_step: float, new_step: float) -> NDArray[np.int32] | None:
    """Carry integers from one lattice to another whose step is a power of two away.

    A finer lattice is nested in the coarser one, so ``q -> q * 2**k`` is exact; a coarser one
    rounds (half up). Both sides of a delta compute this, in integers only.

    Returns:
        int32 integers on the new lattice, or None when the steps are not a power of two apart
        or the result leaves int32.
    """
    if not (old_step > 0 and new_step > 0):
        return None
    mantissa, exponent = math.frexp(new_step / old_step)
    shift = exponent - 1
    if mantissa != 0.5 or not -31 < shift < 31:
        return None
    # int64 only where it takes that: of a large tensor it is eight times the integers themselves
    wide: NDArray[np.signedinteger] = q.astype(
        np.int32 if q.dtype.itemsize <= 2 and abs(shift) < 15 else np.int64
    )
    if shift > 0:
        wide += 1 << (shift - 1)
        wide >>= shift
    else:
        wide <<= -shift
    if wide.size and (int(wide.min()) < _INT32.min or int(wide.max()) > _INT32.max):
        return None
    return wide.astype(np.int32, copy=False)


@dataclass(frozen=True, eq=False)
class LatticeTensor:
    """A tensor whose values are ``q * step``.

    Attributes:
        q: integers, any shape; kept in the narrowest of int8, int16, int32.
        step: the lattice constant, a positive finite float32 value.
        pruned: whether the tensor is pruned. The mask is then *derived*: exactly the
            coordinates with ``q != 0`` are kept. An unpruned tensor has no mask.
        dtype: dtype of the dense array: float16, float32 or float64.
    """

    q: NDArray[np.signedinteger]
    step: float
    pruned: bool = False
    dtype: np.dtype[np.floating] = field(default_factory=lambda: np.dtype(np.float32))

    def __post_init__(self) -> None:
        step = float(np.float32(self.step))
        if not (math.isfinite(step) and step > 0):
            raise InvalidModel(f"a lattice step must be a positive float32, not {self.step!r}")
        if np.dtype(self.dtype).name not in _FLOATS:
            raise InvalidModel(f"a lattice tensor is float16, float32 or float64, not {self.dtype}")
        if self.q.dtype.kind not in "iu":
            raise InvalidModel(f"lattice coordinates are integers, not {self.q.dtype}")
        q = narrowest(self.q)
        q.flags.writeable = False
        object.__setattr__(self, "q", q)
        object.__setattr__(self, "step", step)
        object.__setattr__(self, "dtype", np.dtype(self.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.q.shape

    def dense(self) -> NDArray[np.floating]:
        """``float32(q) * float32(step)`` cast to `dtype`; one IEEE multiplication, no -0.0."""
        return np.asarray(dequantise(self.q, self.step), dtype=self.dtype)

    def mask(self) -> NDArray[np.bool_] | None:
        """Boolean array, True where a coordinate is kept; None where nothing is pruned."""
        return np.asarray(self.q != 0) if self.pruned else None


@dataclass(frozen=True, eq=False)
class RawTensor:
    """A tensor that travels losslessly: integers, scalars, statistics, empty arrays."""

    values: NDArray[np.generic]

    def __post_init__(self) -> None:
        if self.values.dtype.kind not in "biuf" or self.values.dtype.itemsize > 8:
            raise InvalidModel(
                f"dtype {self.values.dtype} has no lossless coding: use bool, integer or float"
            )
        # order="C" without ascontiguousarray, which would turn a scalar into shape (1,)
        native = self.values.dtype.newbyteorder("=")
        copy = None if _frozen(self.values) else True
        values = np.array(self.values, dtype=native, order="C", copy=copy)
        values.flags.writeable = False
        object.__setattr__(self, "values", values)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Dtype of the tensor."""
        return self.values.dtype

    def dense(self) -> NDArray[np.generic]:
        """The values themselves (read-only)."""
        return self.values

    def mask(self) -> None:
        """A raw tensor is never pruned."""
        return


Tensor = LatticeTensor | RawTensor


@dataclass(frozen=True, eq=False)
class PublishedModel:
    """A version of the global model as every participant holds it.

    Attributes:
        tensors: name to tensor, in the order of the original record.
        counter: number of the version within its stream; says nothing about the content.
    """

    tensors: Mapping[str, Tensor]
    counter: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.counter < 2**32:
            raise InvalidModel(f"version counter {self.counter} is outside 0..2**32-1")
        object.__setattr__(self, "tensors", dict(self.tensors))

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over names, dtypes, shapes, steps, pruned flags and values; 32 bytes."""
        sha = hashlib.sha256(b"prunecast model 2\0")
        for name, tensor in self.tensors.items():
            encoded = name.encode()
            sha.update(struct.pack("<I", len(encoded)) + encoded)
            sha.update(np.dtype(tensor.dtype).str[1:].encode().ljust(4, b"\0"))
            sha.update(struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape))
            if isinstance(tensor, LatticeTensor):
                sha.update(struct.pack("<BBf", tensor.q.itemsize, tensor.pruned, tensor.step))
                values: NDArray[np.generic] = tensor.q
            else:
                sha.update(b"\0")
                values = tensor.values
            little = values.astype(values.dtype.newbyteorder("<"), copy=False)
            sha.update(little.reshape(-1).view(np.uint8).data)
        return sha.digest()

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every dense array."""
        return {k: TensorSpec(np.dtype(t.dtype), t.shape) for k, t in self.tensors.items()}

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Every tensor as the dense array that clients train from and devices run."""
        return {name: tensor.dense() for name, tensor in self.tensors.items()}

    def masks(self) -> dict[str, NDArray[np.bool_]]:
        """Masks of the pruned tensors only; True where a coordinate is kept."""
        found = ((name, tensor.mask()) for name, tensor in self.tensors.items())
        return {name: mask for name, mask in found if mask is not None}

    def sparsity(self) -> float:
        """Fraction of zeros among the coordinates of all pruned tensors; 0.0 without any."""
        pruned = [t.q for t in self.tensors.values() if isinstance(t, LatticeTensor) and t.pruned]
        total = sum(q.size for q in pruned)
        return 1.0 - sum(int(np.count_nonzero(q)) for q in pruned) / total if total else 0.0
