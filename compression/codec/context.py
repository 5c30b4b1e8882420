"""What both sides know: tensor layouts, masks, previous values; and what a receiver accepts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UnsupportedDtype

__all__ = ["DTYPE_CODES", "Context", "Limits", "TensorSpec", "check_dtype", "spec_of"]

# The index is the dtype's code on the wire.
DTYPE_CODES: tuple[str, ...] = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64",
)  # fmt: skip
_DTYPES = frozenset(map(np.dtype, DTYPE_CODES))  # a dtype's name takes numpy longer than its hash


@dataclass(frozen=True)
class TensorSpec:
    """dtype and shape of one tensor."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """Accept anything numpy accepts as dtype or shape, and keep native-endian dtypes."""
        object.__setattr__(self, "dtype", np.dtype(self.dtype).newbyteorder("="))
        object.__setattr__(self, "shape", tuple(int(d) for d in self.shape))

    @property
    def size(self) -> int:
        """Number of elements (exact, never overflows)."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded tensor."""
        return self.size * self.dtype.itemsize


def check_dtype(name: str, dtype: np.dtype[Any]) -> None:
    """UnsupportedDtype when a dtype has no coding."""
    if dtype.newbyteorder("=") not in _DTYPES:
        raise UnsupportedDtype(
            f"tensor {name!r} has dtype {dtype}; the codec takes bool, int8 to int64, "
            "uint8 to uint64 and float16 to float64: convert it first"
        )


def spec_of(name: str, array: NDArray[Any]) -> TensorSpec:
    """Return the spec of ``array``; UnsupportedDtype when it has no coding."""
    check_dtype(name, array.dtype)
    return TensorSpec(array.dtype, array.shape)


@dataclass(frozen=True, eq=False)
class Context:
    """What sender and receiver both know, so that it need not travel.

    The arrays must not change while the object is in use: their digest is computed once.

    Attributes:
        layout: names, dtypes and shapes of the payload's tensors, in order.
        mask: boolean arrays; where False, the tensor of that name is zero and costs nothing.
        previous: integer tensors: what the coded tensor is a difference *to* (it is not
            subtracted, it conditions the coding); float tensors: what it is close to.
        derived: for who reads many payloads against the same masks and previous values: a
            dictionary, empty at first, that keeps what is derived from these. Contexts that
            have masks and previous values in common (the same arrays) may share it.
    """

    layout: Mapping[str, TensorSpec] | None = None
    mask: Mapping[str, NDArray[np.bool_]] | None = None
    previous: Mapping[str, NDArray[Any]] | None = None
    derived: dict[str, Any] | None = None

    @property
    def flags(self) -> int:
        """Bit 0: layout, bit 1: mask, bit 2: previous."""
        return (
            (self.layout is not None)
            | (self.mask is not None) << 1
            | (self.previous is not None) << 2
        )

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over the context's canonical form (docs/format.md, "Context")."""
        h = hashlib.sha256(b"prunecast codec context 1\0" + bytes([self.flags]))

        def head(name: str, spec: TensorSpec) -> None:
            raw = name.encode("utf-8", "surrogatepass")
            code = DTYPE_CODES.index(spec.dtype.name) if spec.dtype.name in DTYPE_CODES else 255
            h.update(len(raw).to_bytes(8, "little") + raw)
            h.update(bytes([code]) + len(spec.shape).to_bytes(8, "little"))
            for d in spec.shape:
                h.update(d.to_bytes(8, "little"))

        if self.layout is not None:
            h.update(len(self.layout).to_bytes(8, "little"))
            for name, spec in self.layout.items():
                head(name, spec)
        if self.mask is not None:
            h.update(len(self.mask).to_bytes(8, "little"))
            for name in sorted(self.mask):
                m = np.asarray(self.mask[name])
                head(name, TensorSpec(m.dtype, m.shape))
                h.update(np.packbits(m != 0, axis=None, bitorder="little").data)
        if self.previous is not None:
            h.update(len(self.previous).to_bytes(8, "little"))
            for name in sorted(self.previous):
                p = np.asarray(self.previous[name])
                head(name, spec_of(name, p))
                h.update(np.ascontiguousarray(p, p.dtype.newbyteorder("<")).data)
        return h.digest()


@dataclass(frozen=True)
class Limits:
    """What a receiver accepts; each is checked before anything of that size is allocated."""

    payload_bytes: int = 1 << 30
    """Length of the payload, in bytes."""
    tensors: int = 1 << 16
    """Number of tensors."""
    name_bytes: int = 1024
    """Length of one tensor's name, in bytes of UTF-8."""
    all_name_bytes: int = 1 << 22
    """Length of all names together."""
    dimensions: int = 32
    """Number of dimensions of one tensor."""
    elements: int = 1 << 29
    """Number of elements of all tensors together."""
    decoded_bytes: int = 1 << 31
    """Size of all decoded tensors together, in bytes."""
    expansion: int = 4096
    """Decoded bytes (at least 4 an element) per payload byte, beyond ``free_bytes``.

    Not applied where the context holds the layout: then the sizes are the receiver's own.
    """
    free_bytes: int = 1 << 26
    """Decoded bytes that any payload may state, whatever its length."""
    serial_symbols: int = 1 << 20
    """Number of symbols coded one at a time, in the head's coder."""
    levels: int = 1 << 22
    """Number of row and column levels of all tensors together."""
    segments: int = 1 << 16
    """Number of separately decodable segments."""
    lanes: int = 1 << 14
    """Number of interleaved coder states in one segment."""
    steps: int = 1 << 22
    """Number of steps in all segments together: symbols divided by lanes, rounded up."""
    table_slots: int = 1 << 21
    """Size of all frequency tables together: ``2**precision`` slots each."""
